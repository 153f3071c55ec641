"""Networks `u(z, t, r)` for the plane: a multilayer perceptron that knows two times."""

import math
from itertools import pairwise

import torch
from torch import nn

from minianyflow.support.errors import InputError
from minianyflow.times import generator


class MLP(nn.Module):
    """Average velocity of states of any `shape`, flattened; several independent copies trained as one.

    seeds: one copy each. With S > 1 copies every row names its own, `u(z, t, r, copy=copy)` with copy (B,) in 0..S-1:
    a condition like any other, so that it follows the row wherever an objective takes it. A copy's outputs and
    gradients are what they would be alone; together they cost little more than one.
    The times enter as slow sines and cosines of t and of t - r, which derivatives in time survive (from one turn on
    they get worse, sixteen ruin them), and as log t and log r, since at time t detail of size t is resolved.
    """

    def __init__(self, shape=(2,), width=64, depth=4, seeds=(0,), turns=(0.125, 0.25, 0.5)):
        super().__init__()
        self.shape, self.copies, self.layers = tuple(shape), len(seeds), depth + 1
        size = math.prod(shape)
        self.register_buffer("angular", 2 * math.pi * torch.tensor(turns), persistent=False)
        sizes = [size + 4 * len(turns) + 2, *[width] * depth, size]
        draws = [generator(seed) for seed in seeds]
        for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            weight = torch.stack([torch.randn(fan_in, fan_out, generator=draw) for draw in draws])
            self.register_parameter(f"weight{index}", nn.Parameter(weight / math.sqrt(fan_in)))  # (S, in, out)
            self.register_parameter(f"bias{index}", nn.Parameter(torch.zeros(len(seeds), 1, fan_out)))

    def forward(self, z, t, r, copy=None):
        """z (B, *shape), t and r (B,), copy (B,) whole numbers if there are several copies; returns (B, *shape)."""
        if z.shape[1:] != self.shape or t.shape != r.shape or t.shape != z.shape[:1]:
            raise InputError(
                f"z {tuple(z.shape)}, t {tuple(t.shape)}, r {tuple(r.shape)}; this network expects z (B, "
                f"{', '.join(map(str, self.shape))}), t and r (B,)"
            )
        if (copy is None) != (self.copies == 1):
            raise InputError(f"a network of {self.copies} copies; pass copy= (B,) if there are several, and only then")
        phase = torch.cat([t[:, None] * self.angular, (t - r)[:, None] * self.angular], 1)
        fine = 0.5 * torch.log(torch.stack([t, r], 1) + 0.02)
        hidden = torch.cat([z.flatten(1), phase.sin(), phase.cos(), fine], 1)  # (B, D + 4 turns + 2)
        if copy is None:
            return self._layers(hidden[None])[0].reshape(z.shape)
        if self._in_turn(copy):  # the usual case, at no cost
            grid = hidden.reshape(-1, self.copies, hidden.shape[1]).transpose(0, 1)
            return self._layers(grid).transpose(0, 1).reshape(z.shape)
        place, longest = self._places(copy)
        grid = hidden.new_zeros(self.copies * longest, hidden.shape[1]).index_copy(0, place, hidden)
        out = self._layers(grid.reshape(self.copies, longest, -1)).flatten(0, 1)
        return out.index_select(0, place).reshape(z.shape)

    def _in_turn(self, copy):
        """Whether the rows belong to the copies 0, 1, ..., S-1, 0, 1, ..., S-1, and so on."""
        turns = torch.arange(self.copies, device=copy.device)
        return len(copy) % self.copies == 0 and bool((copy.reshape(-1, self.copies) == turns).all())

    def _places(self, copy):
        """Where each row goes in a (copies, longest) grid that holds the rows of every copy side by side."""
        mine = nn.functional.one_hot(copy, self.copies)  # (B, S)
        so_far = mine.cumsum(0)
        longest = int(so_far[-1].max())
        return copy * longest + (so_far * mine).sum(1) - 1, longest

    def _layers(self, hidden):
        *inner, last = ((getattr(self, f"weight{i}"), getattr(self, f"bias{i}")) for i in range(self.layers))
        for weight, bias in inner:
            out = nn.functional.gelu(torch.baddbmm(bias, hidden, weight), approximate="tanh")
            hidden = hidden + out if hidden.shape == out.shape else out  # a residual wherever widths agree
        return torch.baddbmm(last[1], hidden, last[0])  # (S, n, D)


class EvaluationCounter(nn.Module):
    """Wraps a network and counts what it evaluates: `rows` states, and how many of them `with_grad`.

    A forward-mode derivative is one call and counts as one, though it costs about two.
    """

    def __init__(self, network):
        super().__init__()
        self.network, self.rows, self.with_grad = network, 0, 0

    def forward(self, z, t, r, **condition):
        """What the network returns, counted."""
        self.rows += len(z)
        self.with_grad += len(z) * torch.is_grad_enabled()
        return self.network(z, t, r, **condition)
