"""What one evaluation of a network costs, counted on the meta device: nothing is computed, no weights are needed.

The real module runs forward and backward on tensors without numbers. Every matrix product is counted by torch's own
formulas, those of FlopCounterMode; bytes by watching every storage come and go. Attention is taken as a fused kernel
has it: it keeps queries, keys, values, output and a number a query, and of a mask it works through what the mask keeps.
"""

import weakref
from dataclasses import astuple, dataclass

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry  # FlopCounterMode itself keeps what a backward computes again alive

from minianyflow.networks.causal_attention import causal_mask, compressed_chunks


@dataclass(frozen=True)
class Cost:
    """Of one call. FLOP: `forward`, `backward` without what checkpointing computes `again`, and that.

    Bytes: `saved` from the forward to the backward; beyond it `transient` in the forward and `returning` in the
    backward; `cache`, what a causal network remembers. The output is none of these, nor are gradients of weights.
    """

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    saved: float = 0.0
    transient: float = 0.0
    returning: float = 0.0
    cache: float = 0.0

    def __add__(self, other):
        return Cost(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, number):
        return Cost(*(number * each for each in astuple(self)))


class Live(TorchDispatchMode):
    """Bytes of the storages made inside that are alive: `now`, and at most, `peak`; the FLOP of matrix products.

    known: tensors that do not count. `again`: those FLOP of a backward that compute something anew.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = self.flop = self.again = 0
        self._seen = {id(tensor.untyped_storage()): None for tensor in known}
        self._known = list(known)  # or another storage could get the number of one that is gone

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """The call itself; what it returns is watched."""
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula:
            self.count(formula(*args, **(kwargs or {}), out_val=out))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self._watch(each.untyped_storage())
        return out

    def count(self, flop):
        """Add to what was taken; a backward is without gradient, but for what it computes again."""
        self.flop += flop
        self.again += flop * torch.is_grad_enabled()

    def forget(self, tensor):
        """Count a tensor no longer: somebody else does."""
        storage = tensor.untyped_storage()
        finalizer = self._seen.get(id(storage))
        if finalizer is not None:
            finalizer.detach()
            self._seen[id(storage)] = None
            self._known.append(tensor)
            self.now -= storage.nbytes()

    def _watch(self, storage):
        if id(storage) not in self._seen:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self._seen[id(storage)] = weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, key, size):
        self._seen.pop(key, None)
        self.now -= size


class FusedAttention:
    """Inside, scaled_dot_product_attention is as a fused kernel has it, on tensors without numbers.

    live: what counts it. pairs: how many (query, key) a mask keeps, where there is one.
    """

    def __init__(self, live, pairs=None):
        self.live, self.pairs = live, pairs

    def __enter__(self):
        # by name: torch's own modes are off in a backward, where checkpointing asks again
        self.before, functional.scaled_dot_product_attention = functional.scaled_dot_product_attention, self
        return self

    def __exit__(self, *problem):
        functional.scaled_dot_product_attention = self.before

    def __call__(self, query, key, value, attn_mask=None, **options):
        """As torch's."""
        pairs = query.shape[2] * key.shape[2] if attn_mask is None else self.pairs
        flop = 4 * query.shape[0] * query.shape[1] * query.shape[3] * pairs
        if attn_mask is not None:
            self.live.count(flop)
        return _Fused.apply(query, key, value, self.live, flop, attn_mask is not None, torch.is_grad_enabled())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, live, flop, masked, grad):
        ctx.live, ctx.flop = live, flop
        if masked:
            out, sums = torch.empty_like(query), torch.empty(query.shape[:3], device=query.device)
        else:  # the kernel by its name: live counts it, unless roles.checkpoint_blocks has kept what it made
            before = live.flop
            out, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
            live.again += grad * (live.flop - before)  # in here all is without gradient
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        ctx.live.count(2 * ctx.flop)  # the scores that it computes again are not model FLOP
        return *(torch.empty_like(each) for each in ctx.saved_tensors[:3]), *[None] * 4


def kept_pairs(partition, full, coarse, limit, clean=False, mode="train"):
    """How many (query, key) pairs causal.causal_mask keeps, by its own rule. full, coarse: tokens a frame."""
    old = sum(partition[: compressed_chunks(partition, limit, mode)])
    recent = sum(partition) - old
    mask = causal_mask(tuple(partition), 1, 1, limit, clean, mode).double()
    tokens = torch.tensor([coarse] * old + [full] * recent * (1 + clean), dtype=torch.double)
    return int(tokens @ mask @ tokens)


def measure(network, inputs, condition, grad, pairs=None):
    """The Cost of `network(*inputs, **condition)` on the meta device, of a backward, too, if `grad`."""
    transformer = network.transformer
    weights = [*transformer.parameters(), *transformer.buffers()]
    weights.append(transformer.rope._build_freqs(torch.device("meta")))  # which it keeps for all calls, as no buffer
    live = Live([*weights, *(each for each in tree_leaves((inputs, condition)) if isinstance(each, torch.Tensor))])
    learns = [each for each in weights if each.requires_grad]
    hooks = [each.register_post_accumulate_grad_hook(lambda weight: live.forget(weight.grad)) for each in learns]
    try:
        with torch.set_grad_enabled(grad), live, FusedAttention(live, pairs):
            out = [each for each in tree_leaves(network(*inputs, **condition)) if isinstance(each, torch.Tensor)]
            size = sum({id(each.untyped_storage()): each.untyped_storage().nbytes() for each in out}.values())
            forward, saved, transient = live.flop, max(live.now - size, 0), live.peak
            before = live.peak = live.now
            live.again = 0
            learnt = [each for each in out if each.requires_grad]
            if grad and learnt:
                torch.autograd.backward(learnt, [torch.empty_like(each) for each in learnt])
    finally:
        for each in hooks:
            each.remove()
        for each in learns:
            each.grad = None
    return Cost(
        forward=forward,
        backward=live.flop - forward - live.again,
        again=live.again,
        saved=saved,
        transient=transient - saved,
        returning=live.peak - before,
        cache=size if condition.get("fill_cache") else 0,
    )
