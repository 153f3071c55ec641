"""Counters for tensors without numbers (torch's meta device): FLOP of matrix products, bytes of live storages.

FLOP come from torch's own formulas, those of FlopCounterMode. That mode itself is not used: it keeps alive what a
checkpointed backward recomputes. Bytes are counted by hand: torch's MemTracker is private and attributes memory to
modules, while a plan needs the peaks of a forward and of its backward, without the gradients of weights.
"""

import contextlib
import weakref
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minianyflow.support import host


def tensors_in(tree) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """Counts what operations inside it allocate and compute.

    now, peak: bytes of live storages, and their largest number so far. flop: FLOP of matrix products. recomputed: the
    part of these FLOP that checkpointing recomputes, once a backward runs. stored, fetched: bytes that went
    to CPU memory and came from there, inside `host_memory`. known: tensors that do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = self.flop = self.recomputed = self.stored = self.fetched = 0
        self._host, self._known = set(), list(known)  # held, so that no new storage gets the id of one that is gone
        self._seen = {id(tensor.untyped_storage()) for tensor in self._known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """The call itself, with its result counted."""
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.add_flop(formula(*args, **(kwargs or {}), out_val=out))
        for storage in [tensor.untyped_storage() for tensor in tensors_in(out)]:
            if id(storage) not in self._seen and id(storage) not in self._host:
                self._seen.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return out

    @contextlib.contextmanager
    def host_memory(self):
        """Inside, tensors that support/host.py stores are not live, although they are on meta or a CPU, too."""

        def store(tensor, wait=False):
            with _disable_current_modes():
                copy = tensor.clone()
            self._known.append(storage := copy.untyped_storage())  # a tensor would hold its graph, and what that holds
            self._host.add(id(storage))
            self.stored += copy.nbytes
            return copy

        def send(stored, device):
            self.fetched += stored.nbytes
            return real(stored, device)

        real = host.send
        with patch.object(host, "store", store), patch.object(host, "send", send):
            yield

    def is_live(self, tensor: torch.Tensor) -> bool:
        """Whether it is not in CPU memory."""
        return id(tensor.untyped_storage()) not in self._host

    def _free(self, key, size):
        self._seen.discard(key)
        self.now -= size

    def add_flop(self, flop: int) -> None:
        """Count FLOP. A backward runs without gradient, except where it recomputes a forward."""
        self.flop += flop
        self.recomputed += flop * torch.is_grad_enabled()


def fused_attention(counter: LiveBytes, pairs: int | None = None):
    """Inside this context, scaled_dot_product_attention has the cost of a fused kernel, on tensors without numbers.

    A fused kernel saves queries, keys, values, output and one number per query. pairs: number of (query, key) pairs
    that an attention mask keeps, if there is one; only these are computed.
    """

    def attention(query, key, value, attn_mask=None, **options):
        masked = attn_mask is not None
        flop = 4 * query.shape[0] * query.shape[1] * query.shape[3]
        flop *= pairs if masked else query.shape[2] * key.shape[2]
        return _FusedAttention.apply(query, key, value, counter, flop, masked, torch.is_grad_enabled())

    # replaced by name: torch switches its own modes off in a backward, where checkpointing recomputes attention
    return patch.object(functional, "scaled_dot_product_attention", attention)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, counter, flop, masked, grad):
        ctx.counter, ctx.flop, before = counter, flop, counter.flop
        if masked:
            counter.flop += flop
            out, sums = torch.empty_like(query), torch.empty(query.shape[:3], device=query.device)
        else:  # the kernel itself: the counter sees it, unless checkpointing has saved its output
            out, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
        counter.recomputed += grad * (counter.flop - before)  # gradient is always off in this function
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        ctx.counter.add_flop(2 * ctx.flop)  # the scores that a kernel recomputes are not model FLOP
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), *[None] * 4
