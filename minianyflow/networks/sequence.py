"""Sequence parallel: several processes share the tokens of one clip (DeepSpeed-Ulysses, arXiv 2309.14509).

Each takes a part of the tokens of every frame through the blocks. Around self-attention they exchange tokens for heads:
each then has all tokens of some heads, so that masks, rotations and causal caches are as without it.

Outside the blocks a gradient is that of the clip's loss, the same on all; inside, it is that of the process's own
tokens, times the number of processes. So the mean over all processes, as DDP and FSDP2 take it, is right for weights
inside as well as outside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor, distributed, nn

from minianyflow.support.errors import InputError

TIMEOUT = timedelta(days=1)  # one process samples while the others wait, longer than the ten minutes of NCCL


class TokenGroup:
    """The `size` processes, with neighbouring numbers, that share a clip; on inside `sharing` alone."""

    def __init__(self, size: int):
        processes, rank, self.size, self.on = distributed.get_world_size(), distributed.get_rank(), size, False
        starts = range(0, processes, size)
        groups = [distributed.new_group([*range(first, first + size)], timeout=TIMEOUT) for first in starts]
        self.rank, self.group = rank % size, groups[rank // size]

    def __deepcopy__(self, memo):
        return self  # the average of whole weights is of the same processes

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, the blocks of `share_tokens` do so: for what all processes of the group evaluate alike."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def swap(self, parts: Tensor) -> Tensor:
        """parts (size, ...): one for each process; returns those for this one."""
        out = torch.empty_like(parts := parts.contiguous())
        distributed.all_to_all_single(out, parts, group=self.group)
        return out

    def gather(self, part: Tensor) -> Tensor:
        """The parts (size, ...) of all."""
        parts = part.new_empty(self.size, *part.shape)
        distributed.all_gather([*parts], part.contiguous(), group=self.group)
        return parts


@dataclass(frozen=True)
class Layout:
    """Where tokens (..., N, D) belong. segments: pairs (frames, tokens per frame), of coarse frames, then full ones."""

    group: TokenGroup
    segments: tuple[tuple[int, int], ...]

    def parts(self, x: Tensor) -> Tensor:
        """(size, ..., N / size, D): a part of every frame for each process."""
        pieces = x.split([frames * size for frames, size in self.segments], -2)
        shapes = [(frames, self.group.size, size // self.group.size) for frames, size in self.segments]
        pieces = [piece.unflatten(-2, shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return torch.cat([piece.movedim(-3, 0).flatten(-3, -2) for piece in pieces], -2)

    def whole(self, parts: Tensor) -> Tensor:
        """(..., N, D), from `parts`."""
        pieces = parts.split([frames * size // self.group.size for frames, size in self.segments], -2)
        pieces = [piece.unflatten(-2, (frames, -1)) for piece, (frames, _) in zip(pieces, self.segments, strict=True)]
        return torch.cat([piece.movedim(0, -3).flatten(-4, -2) for piece in pieces], -2)

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, heads, own tokens, D) to (B, own heads, tokens, D)."""
        return self.whole(_Swap.apply(torch.stack(x.chunk(self.group.size, 1)), self.group))

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, own heads, tokens, D) to (B, heads, own tokens, D)."""
        return _Swap.apply(self.parts(x), self.group).movedim(0, 1).flatten(1, 2)


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, group):
        ctx.group = group
        return group.swap(parts)

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.swap(grad), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return layout.parts(x)[layout.group.rank].clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.layout.whole(ctx.layout.group.gather(grad)) / ctx.layout.group.size, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, layout):
        ctx.layout = layout
        return layout.whole(layout.group.gather(part))

    @staticmethod
    def backward(ctx, grad):
        return ctx.layout.parts(grad)[ctx.layout.group.rank] * ctx.layout.group.size, None


def share_tokens(transformer: nn.Module, group: TokenGroup) -> None:
    """Have the blocks share their tokens, while the group does. After `patches.use_per_frame_modulation`."""
    last = len(transformer.blocks) - 1
    for number, block in enumerate(transformer.blocks):
        block.forward = partial(_shared, group, number == 0, number == last, block.forward)


def _shared(group, first, last, forward, hidden, prompt, modulation, rotations, *rest, **options):
    if not group.on:
        return forward(hidden, prompt, modulation, rotations, *rest, **options)
    (full, coarse), frames = rotations["tokens"], modulation.shape[1]
    old = (frames * full - hidden.shape[1] * (1 if first else group.size)) // (full - coarse)
    layout = Layout(group, ((old, coarse), (frames - old, full))[not old :])
    hidden = _Split.apply(hidden, layout) if first else hidden
    rotations = rotations | {"tokens": (full // group.size, coarse // group.size), "layout": layout}
    hidden = forward(hidden, prompt, modulation, rotations, *rest, **options)
    return _Join.apply(hidden, layout) if last else hidden


def check_tokens(size: int, heads: int, full: int, coarse: int = 0) -> None:
    """Raise InputError unless heads, and tokens per frame, full and coarse, divide into `size` parts."""
    for what, number in (("heads", heads), ("tokens per frame", full), ("tokens per coarse frame", coarse)):
        if number % size:
            fit = [n for n in range(2, heads + 1) if not any(count % n for count in (heads, full, coarse))]
            expected = f"one of {', '.join(map(str, fit))}" if fit else "1: no other number fits"
            raise InputError(f"sequence_parallel={size} with {number} {what}; expected {expected}")
