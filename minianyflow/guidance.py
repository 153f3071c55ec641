"""Classifier-free guidance fused into the flow map, so that sampling needs no second evaluation.

The guided velocity is v_null + g (v - v_null), with v_null = u(z, t, t | null), the unconditional velocity.
Exact (MeanFlow, eq. 13): this velocity is the target and the tangent; the student learns the map of the guided ODE.
Published (AnyFlow's code): (u - (1 - g) u_null(z, t, r)) / g is regressed on v - (t - r) / g du/dt along the unguided
velocity, in every row, those with the null condition too. The two agree where r = t and nowhere else: the fixed
point is not a flow map, with the condition or without (tests/test_minimisers.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minianyflow.flow_map import pick_rows
from minianyflow.notation import Condition, Mask, Network, State, Times, Velocity
from minianyflow.support.errors import InputError


def guided_velocity(v: State, v_null: State, scale: float) -> State:
    """v_null + scale (v - v_null); scale 1 is no guidance. AnyFlow's fused g = 3 is this scale."""
    return v_null + scale * (v - v_null)


def guided(velocity: Velocity, null: Mapping[str, Tensor], scale: float) -> Velocity:
    """A teacher's velocity(z, t, **condition) under guidance: evaluated with the condition and with `null`.

    null: the null condition, tensors (1, ...) by name. Rows that have it already are evaluated once. For a student's
    own unconditional branch see `Guidance`.
    """

    def both(z, t, **condition):
        v = velocity(z, t, **condition)
        differs = [(condition[name] != value).flatten(1).any(1) for name, value in null.items()]
        rows = torch.stack(differs).any(0).nonzero().squeeze(1)
        if scale == 1 or len(rows) == 0:
            return v
        v_null = velocity(z[rows], t[rows], **_without(null, condition, rows))
        return v.index_copy(0, rows, guided_velocity(v[rows], v_null, scale))

    return both


@dataclass
class Guidance:
    """How the student is guided by its own unconditional branch. Raises InputError for a scale below 1.

    scale: g >= 1. null: the null condition, tensors (1, ...) by name; conditions that it does not name stay as they
    are. published: AnyFlow's form instead of the exact one. Rows that dropped their condition (`dropped` in a batch)
    train the unconditional branch: without such rows, guidance would use a branch that was never trained.
    """

    scale: float
    null: Mapping[str, Tensor]
    published: bool = False

    def __post_init__(self):
        if not 1 <= self.scale < float("inf"):
            raise InputError(f"guidance scale {self.scale}; expected a finite number, at least 1, which is none")

    @torch.no_grad()
    def pull(
        self, u: Network, z: State, t: Times, r: Times, v: State, conditional: Mask, condition: dict[str, Condition]
    ) -> State:
        """(g - 1) (v - u_null(z, t, r)) for the rows `conditional`, zero for rows that dropped their condition.

        Only the conditional rows are evaluated, without gradient.
        """
        out = torch.zeros_like(v)
        rows = conditional.nonzero().squeeze(1)
        if len(rows) and self.scale != 1:
            v_null = u(z[rows], t[rows], r[rows], **_without(self.null, condition, rows))
            out[rows] = guided_velocity(v[rows], v_null, self.scale) - v[rows]
        return out


def _without(null, condition, rows):
    """The condition of some rows, with `null` in place of what it names."""
    expanded = {name: value.expand(len(rows), *value.shape[1:]) for name, value in null.items()}
    return pick_rows(condition, rows) | expanded
