"""Consistency distillation, the baseline: the bottom edge r = 0 of the flow map, f(z, t) = z - t u(z, t, 0).

Discrete (Consistency Models, algorithm 2): the teacher takes one step from t_n to t_{n-1} on a grid of N times; the
target is the end point that the averaged student predicts from there.
Step: the same step, of the length 1/N, from any time t.
Continuous (sCM, section 3): the limit N -> infinity; the tangent is normalised and warmed up, for stability.
f(z, 0) = z by construction. Letters and types: notation.py.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minianyflow.batch import Batch
from minianyflow.interpolant import broadcast_time, interpolate
from minianyflow.notation import Condition, Errors, Losses, Network, State, Times, Velocity, Weight
from minianyflow.objectives import DELTA, adaptive_weight, eulerian_target, teacher_step_target
from minianyflow.support.errors import InputError, choose


def time_weight(t: Times) -> Times:
    """t: the weight of the network's squared error. (t^2 would weigh the squared error of the end point.)"""
    return t


def consistency_target(
    u_average: Network, z: State, t: Times, s: Times, velocity: Velocity, solver: str = "euler", **condition: Condition
) -> State:
    """The target of u(z, t, 0): (z - f(z', s)) / t, with z' one step of `velocity` from t to s, f that of `u_average`.

    solver: "euler", or "heun", of second order.
    """
    return teacher_step_target(u_average, z, t, torch.zeros_like(t), s, velocity, solver, **condition)


@torch.no_grad()
def continuous_target(
    u: Network,
    z: State,
    t: Times,
    v: State,
    warm: float = 1.0,
    delta: float = DELTA,
    now: State | None = None,
) -> State:
    """u + g / (|g| + 0.1), with the tangent g = (v - u) - warm t du/dt, normalised per row; warm grows 0 to 1.

    now: u(z, t, 0), if it is known: one evaluation less.
    """
    end = torch.zeros_like(t)
    now = u(z, t, end) if now is None else now
    tangent = (1 - warm) * v + warm * eulerian_target(u, z, t, end, v, delta) - now
    size = tangent.flatten(1).norm(dim=1) / tangent[0].numel() ** 0.5  # (B,), root mean square where sCM has the norm
    return now + tangent / broadcast_time(size + 0.1, z)


@dataclass
class ConsistencyLoss:
    """velocity: `velocity(z, t)` of the teacher. average: the averaged student (not in the continuous form).

    form: "discrete" on a grid of `grid` times; "step", 1/`grid` long, from any time; or "continuous", with the tangent
    warmed up over `warmup` calls, one per micro-batch. weight: the weight of a row's squared error, a function of its
    t. adaptive: see `objectives.adaptive_weight`.
    Raises InputError for an unknown form, and for one by steps without average or grid.
    """

    velocity: Velocity
    average: Network | None = None
    form: str = "discrete"
    grid: int = 64
    solver: str = "euler"
    weight: Weight = time_weight
    adaptive: float = 0.0
    warmup: int = 1000
    calls: int = 0

    def __post_init__(self):
        stepping = choose("form", self.form, {"discrete": True, "step": True, "continuous": False})
        if stepping and (self.average is None or self.grid < 1):
            raise InputError("consistency distillation by steps needs average=, an EMA of the student, and grid >= 1")

    def state_dict(self) -> dict[str, Tensor]:
        """The number of calls so far, for the warm-up."""
        return {"calls": torch.tensor(self.calls)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`."""
        self.calls = int(state["calls"])

    def __call__(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """Weighted losses (B,), and the mean squared error without weights.

        batch: x, eps (B, *shape) and a uniform t (B,), from `draw_pairs(count, diagonal=1, end=0)`.
        """
        t, condition = batch["t"], batch.get("condition", {})
        if self.form == "discrete":
            t = (t * self.grid).ceil().clamp(min=1) / self.grid
        z = interpolate(batch["x"], batch["eps"], t)
        out = u(z, t, torch.zeros_like(t), **condition)
        if self.form != "continuous":
            s = (t - 1 / self.grid).clamp(min=0)
            target = consistency_target(self.average, z, t, s, self.velocity, self.solver, **condition)
        else:
            self.calls += 1
            warm, v = min(1.0, self.calls / self.warmup), self.velocity(z, t, **condition)
            target = continuous_target(partial(u, **condition), z, t, v, warm, now=out.detach())
        error = (out - target).square().flatten(1).mean(1)
        loss = self.weight(t) * error * adaptive_weight(error, self.adaptive)
        return loss, {"consistency": error.detach().mean()}
