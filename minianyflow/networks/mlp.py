"""Networks `u(z, t, r)` for the plane: a multilayer perceptron of a state and two times."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minianyflow.notation import FrameTimes, Network, State, Times
from minianyflow.support.errors import InputError
from minianyflow.support.recompute import current_unit
from minianyflow.times import generator


class MLP(nn.Module):
    """Average velocity of states of any `shape`; several independent copies of the network, trained as one.

    seeds: one copy per seed. With S > 1 copies, `u(z, t, r, copy=copy)` takes the copy of each row, in 0..S-1: a
    condition like any other, which an objective passes on with its row. Outputs and gradients of a copy are those of
    a network alone; all copies together cost little more than one network.
    turns: frequencies of the sines and cosines of t and of t - r. They are low, for the sake of derivatives in time:
    these get worse from 1 turn on and are useless at 16. log t and log r enter as well: at time t, details of size t
    are resolved.
    sharp: for small details. The times also scale the argument of every activation, by 1 + a linear function of their
    features that is zero at the start (FiLM, arXiv 1709.07871); sines and cosines of the state enter, of 2 and 4 turns
    per unit, faded where noise of size t hides them; and the weights of the state start four times as large.
    """

    def __init__(
        self,
        shape: Sequence[int] = (2,),
        width: int = 64,
        depth: int = 4,
        seeds: Sequence[int] = (0,),
        turns: Sequence[float] = (0.125, 0.25, 0.5),
        sharp: bool = False,
    ):
        super().__init__()
        self.shape, self.copies, self.layers = tuple(shape), len(seeds), depth + 1
        size = math.prod(shape)
        self.register_buffer("angular", 2 * math.pi * torch.tensor(turns), persistent=False)
        self.register_buffer("details", 2 * math.pi * torch.tensor([2.0, 4.0][: 2 * sharp]), persistent=False)
        times = 4 * len(turns) + 2
        sizes = [size + times + 2 * size * len(self.details), *[width] * depth, size]
        draws = [generator(seed) for seed in seeds]
        for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            weight = torch.stack([torch.randn(fan_in, fan_out, generator=draw) for draw in draws])
            self.register_parameter(f"weight{index}", nn.Parameter(weight / math.sqrt(fan_in)))  # (S, in, out)
            self.register_parameter(f"bias{index}", nn.Parameter(torch.zeros(len(seeds), 1, fan_out)))
        self.scale = nn.Parameter(torch.zeros(len(seeds), times, depth * width)) if sharp else None
        if sharp:
            self.weight0.data[:, :size] *= 4

    def forward(self, z: State, t: Times, r: Times, copy: Int[Tensor, " batch"] | None = None) -> State:
        """u(z, t, r); copy: the copy of each row, if there are several. Raises InputError for other shapes."""
        if z.shape[1:] != self.shape or t.shape != r.shape or t.shape != z.shape[:1]:
            found, wanted = (f"z {tuple(z.shape)}, t {tuple(t.shape)}, r {tuple(r.shape)}", ("B", *self.shape))
            raise InputError(f"{found}; this network expects z ({', '.join(map(str, wanted))}), t and r (B,)")
        if (copy is None) != (self.copies == 1):
            raise InputError(f"a network of {self.copies} copies; pass copy= (B,) if there are several, and only then")
        phase = torch.cat([t[:, None] * self.angular, (t - r)[:, None] * self.angular], 1)
        fine = 0.5 * torch.log(torch.stack([t, r], 1) + 0.02)
        hidden = torch.cat([z.flatten(1), phase.sin(), phase.cos(), fine], 1)  # (B, D + 4 turns + 2)
        if self.scale is not None:
            fade = torch.exp(-(t[:, None, None] * self.details).square() / 2)  # (B, 1, 2)
            angle = z.flatten(1)[..., None] * self.details
            hidden = torch.cat([hidden, (fade * angle.sin()).flatten(1), (fade * angle.cos()).flatten(1)], 1)
        if copy is None:
            return self._layers(hidden[None])[0].reshape(z.shape)
        if self._in_turn(copy):  # the usual case: a reshape instead of an index
            grid = hidden.reshape(-1, self.copies, hidden.shape[1]).transpose(0, 1)
            return self._layers(grid).transpose(0, 1).reshape(z.shape)
        place, longest = self._places(copy)
        grid = hidden.new_zeros(self.copies * longest, hidden.shape[1]).index_copy(0, place, hidden)
        out = self._layers(grid.reshape(self.copies, longest, -1)).flatten(0, 1)
        return out.index_select(0, place).reshape(z.shape)

    def _in_turn(self, copy):
        """Whether the copies of the rows are 0, 1, ..., S-1, 0, 1, ..., S-1, and so on."""
        turns = torch.arange(self.copies, device=copy.device)
        return len(copy) % self.copies == 0 and bool((copy.reshape(-1, self.copies) == turns).all())

    def _places(self, copy):
        """The place of each row in a (copies, longest) grid, with the rows of a copy side by side."""
        belongs = nn.functional.one_hot(copy, self.copies)  # (B, S)
        count = belongs.cumsum(0)
        longest = int(count[-1].max())
        return copy * longest + (count * belongs).sum(1) - 1, longest

    def _layers(self, hidden):
        *inner, last = ((getattr(self, f"weight{i}"), getattr(self, f"bias{i}")) for i in range(self.layers))
        scales = [None] * len(inner)
        if self.scale is not None:
            begin = math.prod(self.shape)
            times = hidden[..., begin : begin + self.scale.shape[1]]
            scales = (1 + times @ self.scale).chunk(len(inner), -1)
        for (weight, bias), scale in zip(inner, scales, strict=True):
            out = torch.baddbmm(bias, hidden, weight)
            out = nn.functional.gelu(out if scale is None else scale * out, approximate="tanh")
            hidden = hidden + out if hidden.shape == out.shape else out  # a residual where widths agree
        return torch.baddbmm(last[1], hidden, last[0])  # (S, n, D)


class EvaluationCounter(nn.Module):
    """Wraps a network and counts its evaluations: `rows` states, `with_grad` of them with gradient.

    A forward-mode derivative counts as one evaluation, though it costs about two. One that `recompute` repeats counts
    once.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.network, self.rows, self.with_grad = network, 0, 0

    def forward(self, z: State, t: FrameTimes | None, r: FrameTimes | None, **condition: Any) -> Any:
        """What the network returns."""
        if not current_unit()[1]:
            self.rows += len(z)
            self.with_grad += len(z) * torch.is_grad_enabled()
        return self.network(z, t, r, **condition)
