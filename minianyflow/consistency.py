"""Consistency distillation, the baseline: the bottom edge r = 0 of the flow map, f(z, t) = z - t u(z, t, 0).

Discrete (Consistency Models, algorithm 2): the teacher takes one step from t_n to t_{n-1} on a grid of N times; the
target is the end point that the averaged student predicts from there.
Step: the same step, of the length 1/N, from any time t.
f(z, 0) = z by construction. Letters and types: notation.py.
"""

from dataclasses import dataclass

import torch

from minianyflow.batch import Batch
from minianyflow.interpolant import interpolate
from minianyflow.notation import Condition, Errors, Losses, Network, State, Times, Velocity, Weight
from minianyflow.objectives import adaptive_weight, teacher_step_target
from minianyflow.support.errors import InputError, choose


def time_weight(t: Times) -> Times:
    """t: the weight of the network's squared error. (t^2 would weigh the squared error of the end point.)"""
    return t


def consistency_target(
    u_average: Network, z: State, t: Times, s: Times, velocity: Velocity, solver: str = "euler", **condition: Condition
) -> State:
    """The target of u(z, t, 0): (z - f(z', s)) / t, with z' one step of `velocity` from t to s, f that of `u_average`.

    solver: "euler", or of second order "midpoint" or "heun".
    """
    return teacher_step_target(u_average, z, t, torch.zeros_like(t), s, velocity, solver, **condition)


@dataclass
class ConsistencyLoss:
    """velocity: `velocity(z, t)` of the teacher. average: the averaged student.

    form: "discrete" on a grid of `grid` times; or "step", 1/`grid` long, from any time. weight: the weight of a row's
    squared error, a function of its t. adaptive: see `objectives.adaptive_weight`.
    Raises InputError for an unknown form, and without average or grid.
    """

    velocity: Velocity
    average: Network | None = None
    form: str = "discrete"
    grid: int = 64
    solver: str = "euler"
    weight: Weight = time_weight
    adaptive: float = 0.0

    def __post_init__(self):
        choose("form", self.form, dict.fromkeys(("discrete", "step")))
        if self.average is None or self.grid < 1:
            raise InputError("consistency distillation needs average=, an EMA of the student, and grid >= 1")

    def __call__(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """Weighted losses (B,), and the mean squared error without weights.

        batch: x, eps (B, *shape) and a uniform t (B,), from `draw_pairs(count, diagonal=1, end=0)`.
        """
        t, condition = batch["t"], batch.get("condition", {})
        if self.form == "discrete":
            t = (t * self.grid).ceil().clamp(min=1) / self.grid
        z, s = interpolate(batch["x"], batch["eps"], t), (t - 1 / self.grid).clamp(min=0)
        target = consistency_target(self.average, z, t, s, self.velocity, self.solver, **condition)
        error = (u(z, t, torch.zeros_like(t), **condition) - target).square().flatten(1).mean(1)
        loss = self.weight(t) * error * adaptive_weight(error, self.adaptive)
        return loss, {"consistency": error.detach().mean()}
