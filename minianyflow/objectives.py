"""Objectives of the forward stage: what the average velocity `u(z, t, r)` is regressed on.

Four identities hold for a flow map Phi(z; t -> r) = z - (t - r) u(z, t, r) along dz/dt = v(z, t). Each gives a target,
the last one two:

    tangent      u(z, t, t) = v(z, t)                         v
    Eulerian     d/dt Phi(z_t; t -> r) = 0 along the ODE      v - (t - r) du/dt            (MeanFlow, eq. 6; AnyFlow)
    Lagrangian   d/dr Phi(z; t -> r) = v(Phi, r)              v(Phi, r) + (t - r) du/dr    (Boffi et al., prop. 2.1)
    semigroup    Phi(t -> r) = Phi(s -> r) o Phi(t -> s)      average velocity of the two jumps
    teacher_step                                              the same, the first jump one step of a teacher (CTM)

A target is always stop-gradient: these functions run without gradient. A target of a row r < t costs two evaluations
of `u`, that of the teacher's step one of `u` and two of the teacher. Letters and types: notation.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from minianyflow.batch import Batch
from minianyflow.flow_map import displace, pick_rows, rollout
from minianyflow.guidance import Guidance
from minianyflow.interpolant import broadcast_time, check_same_shape, check_times, data_velocity, interpolate
from minianyflow.notation import Condition, Errors, Losses, Mask, Network, Rows, State, Times, Velocity, Weight
from minianyflow.support.errors import InputError, choose
from minianyflow.times import time_grid

DELTA = 2e-3  # half the width of a central difference; on the plane 1e-3 to 5e-3 are equally good, in float32


def sqrt_weight(t: Times) -> Times:
    """sqrt(1 - t): small where the state is almost all noise. AnyFlow's weight t sqrt(1 - t) is poor on the plane."""
    return (1 - t).sqrt()


def anyflow_weight(shift: float = 1.0) -> Weight:
    """AnyFlow's weight of a row, a function of t: t sqrt(1 - t), of mean 1 over the shifted grid of 1000 times."""
    grid = time_grid(1000, shift)[:-1]
    mean = float((grid * sqrt_weight(grid)).mean())
    return lambda t: t * sqrt_weight(t) / mean


@torch.no_grad()
def eulerian_target(
    u: Network, z: State, t: Times, r: Times, v: State, derivative: str = "difference", delta: float = DELTA
) -> State:
    """v - (t - r) du/dt, the derivative of u along (v, 1, 0) in (z, t, r).

    derivative: "difference", a central difference, one-sided where t + delta > 1 or t - delta < r (for any network,
    fused attention too); or "jvp", exact by forward mode.
    """
    if choose("derivative", derivative, {"difference": False, "jvp": True}):
        du = torch.func.jvp(lambda z, t: u(z, t, r), (z, t), (v, torch.ones_like(t)))[1]
    else:
        later, earlier = (t + delta).clamp(max=1), torch.maximum(t - delta, r)
        ahead, behind = displace(z, v, t, later), displace(z, v, t, earlier)
        du = (u(ahead, later, r) - u(behind, earlier, r)) / broadcast_time(later - earlier, z)
    return v - broadcast_time(t - r, z) * du


@torch.no_grad()
def lagrangian_target(
    u: Network, z: State, t: Times, r: Times, velocity: Velocity, derivative: str = "difference", delta: float = DELTA
) -> State:
    """v(Phi, r) + (t - r) du/dr. `velocity(z, t)` is evaluated at Phi = Phi(z; t -> r): one more evaluation.

    derivative: as for `eulerian_target`.
    """
    return lagrangian_sides(u, z, t, r, velocity, derivative, delta)[1]


def lagrangian_sides(
    u: Network, z: State, t: Times, r: Times, velocity: Velocity, derivative: str = "difference", delta: float = DELTA
) -> tuple[State, State]:
    """u(z, t, r), and what `lagrangian_target` says of it, with gradient in all but the velocity: two evaluations.

    Their difference is v(Phi, r) - d/dr Phi: the gradient goes through the derivative too (Boffi et al., LSD).
    """
    if choose("derivative", derivative, {"difference": False, "jvp": True}):
        now, du = torch.func.jvp(lambda r: u(z, t, r), (r,), (torch.ones_like(r),))
    else:
        upper, lower = torch.minimum(r + delta, t), (r - delta).clamp(min=0)
        below = u(z, t, lower)
        du = (u(z, t, upper) - below) / broadcast_time(upper - lower, z)
        now = below + broadcast_time(r - lower, z) * du  # u(z, t, r) to second order, without an evaluation
    with torch.no_grad():
        v = velocity(displace(z, now, t, r), r)
    return now, v + broadcast_time(t - r, z) * du


@torch.no_grad()
def semigroup_target(u: Network, z: State, t: Times, r: Times, s: Times) -> State:
    """The average velocity of two jumps t -> s -> r, for r <= s <= t."""
    first = u(z, t, s)
    second = u(displace(z, first, t, s), s, r)
    share = broadcast_time((t - s) / (t - r), z)
    return share * first + (1 - share) * second


@torch.no_grad()
def teacher_step_target(
    u: Network,
    z: State,
    t: Times,
    r: Times,
    s: Times,
    velocity: Velocity,
    solver: str = "heun",
    **condition: Condition,
) -> State:
    """The average velocity of one step of the teacher's `velocity` t -> s, then the jump s -> r, r <= s < t.

    solver: "euler", or "heun", of second order, which evaluates the velocity twice. Where s = r, no evaluation of `u`.
    This is CTM's soft consistency matching (arXiv 2310.02279); with r = 0 it is consistency distillation.
    """
    v = velocity(z, t, **condition)
    if choose("solver", solver, {"euler": False, "heun": True}):
        v = (v + velocity(displace(z, v, t, s), s, **condition)) / 2
    end = rollout(u, displace(z, v, t, s), torch.stack([s, r]), **condition)[-1]
    return (z - end) / broadcast_time(t - r, z)


TARGETS = {
    "eulerian": eulerian_target,
    "lagrangian": lagrangian_target,
    "semigroup": semigroup_target,
    "teacher_step": teacher_step_target,
}
FLOW_MAPS = {name: {name: 1.0} for name in ("eulerian", "lagrangian", "semigroup")}  # shares of rows
FLOW_MAPS |= {"mixed": {"eulerian": 0.5, "semigroup": 0.5}}


class InnerState:
    """A loss around another one, `self.forward`, which has the state."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the inner loss, {name: tensor}."""
        return self.forward.state_dict() if hasattr(self.forward, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`."""
        if hasattr(self.forward, "load_state_dict"):
            self.forward.load_state_dict(state)


@dataclass
class FlowMapLoss:
    """The forward stage: rows with r = t learn the velocity, the others a mixture of the targets above.

    shares: the share of rows r < t per objective, e.g. {"eulerian": 0.5, "semigroup": 0.5}; {} is for r = t alone.
    velocity: that of a teacher or of exact truth; None takes the data velocity eps - x. weight: the weight of a row,
    a function of its t. adaptive: see `adaptive_weight`. rebalance: see `rebalanced`. derivative, delta: see
    `eulerian_target`. step: the longest step of the teacher. through_end: Lagrangian rows take the gradient through
    d/dr Phi too, see `lagrangian_sides`. average: the network that makes the targets, if not the student itself.
    Raises InputError for shares, guidance and velocity that do not go together.
    """

    shares: Mapping[str, float]
    velocity: Velocity | None = None
    guidance: Guidance | None = None
    weight: Weight = sqrt_weight
    adaptive: float = 0.0
    derivative: str = "difference"
    delta: float = DELTA
    rebalance: bool = False
    step: float = 1 / 16
    through_end: bool = False
    average: Network | None = None
    totals: Tensor | None = field(default=None, init=False)  # of `rebalanced`, up to this micro-batch

    def __post_init__(self):
        for name in self.shares:
            choose("objective", name, TARGETS)
        if self.shares and not (min(self.shares.values()) >= 0 and 0 < sum(self.shares.values()) < float("inf")):
            raise InputError(f"shares {dict(self.shares)}; expected finite shares, not negative and not all zero")
        if not 0 < self.delta < 1:
            raise InputError(f"delta {self.delta}; expected a small step in time, above 0 and below 1")
        if {"lagrangian", "teacher_step"} & set(self.shares) and self.velocity is None:
            raise InputError(
                "Lagrangian targets and a teacher's step need velocity=, a teacher's or the exact one, of all states"
            )
        if self.guidance and self.guidance.published and set(self.shares) - {"eulerian"}:
            raise InputError(f"published guidance is for the Eulerian target alone; got {', '.join(self.shares)}")

    def __call__(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """Weighted losses (B,), and the mean squared error, without weights, of the kinds of rows in the batch.

        batch: `x`, `eps`, `draw_pairs(...)`, and, for a network with a condition, `condition` and `dropped`, the rows
        with the null condition.
        """
        t, r = batch["t"], batch["r"]
        check_times(t, r)
        if self.guidance and "dropped" not in batch:
            raise InputError("guidance needs `dropped` in the batch, rows without condition: draw_pairs(..., drop=0.1)")
        z = interpolate(batch["x"], batch["eps"], t)
        kinds = self.kinds(batch)
        out, target = torch.empty_like(z), torch.empty_like(z)
        rest = torch.ones_like(t, dtype=torch.bool)  # rows whose output does not come with their target
        for name, rows in kinds.items():
            target[rows], now = self._target(name, self.average or u, batch, rows, z[rows])
            if now is not None:
                out[rows], rest[rows] = now, False
        rest = rest.nonzero().squeeze(1)
        if len(rest):
            now = u(z[rest], t[rest], r[rest], **pick_rows(batch.get("condition", {}), rest))
            check_same_shape("the network's output", now, z[rest])
            out[rest] = now
        error = (out - target).square().flatten(1).mean(1)  # (B,)
        scale = self.guidance.scale**-2 if self.guidance and self.guidance.published else 1.0
        loss = scale * self.weight(t) * error * adaptive_weight(error, self.adaptive)
        if self.rebalance:
            goes_on = "part" in batch and bool(batch["part"][0])
            loss, self.totals = rebalanced(loss, t == r, self.totals, goes_on)
        return loss, {name: error[rows].detach().mean() for name, rows in kinds.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The mean loss of the last rows r = t, for rebalancing."""
        return {} if self.totals is None else {"totals": self.totals}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`."""
        self.totals = state.get("totals")

    def kinds(self, batch: Batch) -> dict[str, Rows]:
        """The indices of the rows of each kind in the batch: {"tangent": ..., name: ...}."""
        diagonal, lower = batch["t"] == batch["r"], 0.0
        if not (self.shares or bool(diagonal.all())):
            raise InputError("rows with r < t and no objective for them: name one in `shares`, or draw diagonal=1")
        masks = {"tangent": diagonal}
        for name, share in self.shares.items():
            upper = lower + share / sum(self.shares.values())
            masks[name] = ~diagonal & (batch["objective_draw"] >= lower) & (batch["objective_draw"] < upper)
            lower = upper
        return {name: mask.nonzero().squeeze(1) for name, mask in masks.items() if bool(mask.any())}

    @torch.no_grad()
    def _target(self, name, network, batch, rows, z):
        """The target of the rows of one kind, and the output if it came with the target.

        With published guidance output and target are g times what is published.
        """
        options = {"derivative": self.derivative, "delta": self.delta}
        guidance, batch = self.guidance, pick_rows(batch, rows)
        t, r, condition = batch["t"], batch["r"], batch.get("condition", {})
        u = partial(network, **condition)

        def velocity(z, t, **_):
            v = self.velocity(z, t, **condition) if self.velocity else data_velocity(batch["x"], batch["eps"])
            check_same_shape("the velocity", v, z)
            if guidance and not guidance.published:
                return v + guidance.pull(network, z, t, t, v, ~batch["dropped"], condition)
            return v

        if name == "semigroup":
            return semigroup_target(u, z, t, r, r + batch["split"] * (t - r)), None
        if name == "teacher_step":
            s = torch.maximum(t - self.step, r)
            return teacher_step_target(network, z, t, r, s, velocity, **condition), None
        if name == "lagrangian":
            with torch.set_grad_enabled(self.through_end):
                now, target = lagrangian_sides(u, z, t, r, velocity, **options)
            return target, now if self.through_end else None
        v = velocity(z, t)
        target = v if name == "tangent" else eulerian_target(u, z, t, r, v, **options)
        if guidance and guidance.published:
            target = target + guidance.pull(network, z, t, r, v, torch.ones_like(batch["dropped"]), condition)
        return target, None


def adaptive_weight(error: Losses, power: float, floor: float = 5e-3) -> Losses | float:
    """(error + floor)^-power, stop-gradient (MeanFlow, section 4.3): 0 is plain squares, 0.5 nearly absolute values.

    Rows with a large error count less. This is right for targets without noise (a teacher's velocity or the exact
    one). The data velocity is noisy: the weight would move the minimum away from the mean.
    """
    return (error.detach() + floor) ** -power if power else 1.0


def rebalanced(
    loss: Losses, diagonal: Mask, before: Tensor | None = None, goes_on: bool = False
) -> tuple[Losses, Tensor]:
    """AnyFlow's rebalancing: the loss of each row r < t is scaled to the mean loss of the rows r = t of the whole step.

    diagonal: the rows r = t. Returns the losses and what is known of the step up to here, over all processes: the sum
    of the losses of rows r = t, their number, that of the other rows. before: what the last call returned; goes_on:
    this micro-batch is of the same step. A step without rows r = t takes the mean `before`, or leaves losses as they
    are. Rebalancing cancels the time weight of the rows r < t, and the scaled loss no longer shows the error of the
    flow map: log the error without weights.
    Raises InputError if a row r = t comes after others were scaled.
    """
    known = torch.stack([loss[diagonal].sum(), diagonal.sum(), (~diagonal).sum()]).detach()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(known)
    if goes_on and known[1] and before[2]:
        raise InputError("rows r = t after rows r < t of the same step; expected them first, as batch.deal has them")
    if before is not None and (goes_on or not known[1]):
        known = known + before
    if not known[1]:
        return loss, known
    return torch.where(diagonal, loss, loss * (known[0] / known[1]) / loss.detach().clamp(min=1e-12)), known
