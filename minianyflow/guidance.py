"""Classifier-free guidance fused into the flow map, so that sampling needs no second forward.

The guided velocity is v_null + g (v - v_null), with v_null = u(z, t, t | null), the unconditional velocity.
Exact (MeanFlow, eq. 13): this velocity is the target and the tangent, and the map learned is that of the guided ODE.
Published (AnyFlow's code): (u - (1 - g) u_null(z, t, r)) / g is regressed on v - (t - r) / g du/dt along the unguided
velocity. The two agree where r = t and nowhere else: the fixed point is not a flow map (tests/test_minimisers.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from minianyflow.flow_map import pick_rows
from minianyflow.support.errors import InputError


def guided_velocity(v, v_null, scale):
    """v_null + scale (v - v_null); scale 1 is no guidance. AnyFlow's fused g = 3 is this scale."""
    return v_null + scale * (v - v_null)


def guided(velocity, null, scale):
    """A teacher's velocity(z, t, **condition) under guidance, asked with the condition and with `null`.

    null: what stands in place of a condition, tensors (1, ...). Rows that have it already are asked once. For a
    student's own null branch see `Guidance`.
    """

    def both(z, t, **condition):
        v = velocity(z, t, **condition)
        differs = [(condition[name] != value).flatten(1).any(1) for name, value in null.items()]
        rows = torch.stack(differs).any(0).nonzero().squeeze(1)
        if scale == 1 or len(rows) == 0:
            return v
        empty = {name: value.expand(len(rows), *value.shape[1:]) for name, value in null.items()}
        v_null = velocity(z[rows], t[rows], **pick_rows(condition, rows) | empty)
        return v.index_copy(0, rows, guided_velocity(v[rows], v_null, scale))

    return both


@dataclass
class Guidance:
    """scale: g >= 1. null: what the unconditional branch has in place of a condition, tensors (1, ...).

    Conditions that are not named in `null` stay as they are. Rows that dropped theirs, `dropped` in a batch, teach the
    branch itself: without any, it would pull towards what nothing has trained.
    """

    scale: float
    null: Mapping[str, torch.Tensor]
    published: bool = False

    def __post_init__(self):
        if not self.scale >= 1:
            raise InputError(f"guidance scale {self.scale}; expected at least 1, which is none")

    @torch.no_grad()
    def pull(self, u, z, t, r, v, kept, condition):
        """(g - 1) (v - u_null(z, t, r)) for the rows `kept` (B,) bool, zero for rows that dropped their condition.

        Only the kept rows are evaluated; no gradient. Returns (B, *shape).
        """
        out = torch.zeros_like(v)
        rows = kept.nonzero().squeeze(1)
        if len(rows) and self.scale != 1:
            null = {name: value.expand(len(rows), *value.shape[1:]) for name, value in self.null.items()}
            v_null = u(z[rows], t[rows], r[rows], **pick_rows(condition, rows) | null)
            out[rows] = guided_velocity(v[rows], v_null, self.scale) - v[rows]
        return out
