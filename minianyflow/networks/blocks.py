"""How the blocks of a transformer run: recomputed in the backward, under the role of their forward; compiled."""

import contextlib
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minianyflow.networks.lora_roles import active_role, bind_role
from minianyflow.networks.resting import recomputing
from minianyflow.support import host

ATTENTION = tuple(  # kernels of scaled_dot_product_attention
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)


def checkpoint_blocks(
    transformer: nn.Module,
    keep_attention: bool = False,
    offload: bool = False,
    embedder: bool = False,
    halves: bool = False,
) -> None:
    """Keep only the input of each block, and recompute the block in its backward, under the role of its forward.

    keep_attention: the output of fused self-attention is kept as well, (B, N, D) per block: it is most of the work.
    offload: what is kept of a block waits for the backward in CPU memory. embedder: that of times and text is
    recomputed, too; RestingBlocks needs that, and comes before. halves: the input of each half is kept, and a half is
    recomputed at a time: the part up to self-attention, and the rest. That is twice as much to keep, and no more work.
    The backward raises RuntimeError if the recomputation finds another role: its gradient would be wrong, silently.
    """

    stack = host.Stack()

    def recompute(block, *arguments, forward=None, **options):
        role = active_role(block)

        def run(*arguments, **options):
            try:
                return (forward or block)(*arguments, **options)
            finally:  # even after an exception: a recomputation stops by one once it has all that it needs
                if (found := active_role(block)) != role:
                    wrong = f"a block of role {role!r} is recomputed under {found!r}: its gradient would be wrong"
                    raise RuntimeError(f"{wrong}; leave the active adapter to RoleNetwork")

        @contextlib.contextmanager
        def under_role(reading):
            with bind_role(block, role), reading, recomputing():
                yield

        def contexts():
            keeping = reading = contextlib.nullcontext()
            if keep_attention:
                keeping, reading = create_selective_checkpoint_contexts(_keep_attention)
            return keeping, under_role(reading)

        options |= {"use_reentrant": False, "preserve_rng_state": False}  # no block draws random numbers
        with _saved_on(stack, arguments[0].shape) if offload else contextlib.nullcontext():
            return checkpoint(run, *arguments, **options, context_fn=contexts)

    if halves:
        for block in transformer.blocks:
            first, second = (partial(recompute, block, forward=partial(block.forward, half=half)) for half in (0, 1))
            block.forward = partial(_in_turn, first, second)
    else:
        transformer.enable_gradient_checkpointing(recompute)
    if embedder:
        module = transformer.condition_embedder
        module.forward = partial(recompute, module, forward=module.forward)


def _in_turn(first, second, hidden, *arguments):
    return second(first(hidden, *arguments), *arguments)


def _saved_on(stack, shape):
    """Inside, what autograd saves of this shape is in CPU memory until the backward: torch's save_on_cpu takes all."""

    def pack(tensor):
        return stack.store(tensor) if tensor.shape == shape else tensor

    def unpack(saved):
        return saved.fetch() if isinstance(saved, host.Kept) else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> nn.Module:
    """torch.compile for each block, as diffusers' compile_repeated_blocks: one graph serves all blocks of a kind.

    A block is traced anew for each role, with and without gradient, and for one row or several.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # beyond it: slow, silently
    for block in transformer.blocks:
        block.compile(backend=backend)
    return transformer


def _keep_attention(context, operation, *arguments, **options):
    # not that of the text, a few tokens: as much to keep, and little to compute
    keep = operation in ATTENTION and arguments[1].shape[2] >= arguments[0].shape[2]
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
