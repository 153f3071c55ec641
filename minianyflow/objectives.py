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
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minianyflow.batch import Batch
from minianyflow.flow_map import displace, pick_rows, rollout
from minianyflow.guidance import Guidance
from minianyflow.interpolant import broadcast_time, data_velocity, interpolate
from minianyflow.notation import Condition, Errors, Losses, Network, Rows, State, Times, Velocity, Weight
from minianyflow.support.checks import check_same_shape, check_times
from minianyflow.support.errors import InputError, choose

DELTA = 2e-3  # half the width of a central difference; on the plane 1e-3 to 5e-3 are equally good, in float32


def sqrt_weight(t: Times) -> Times:
    """sqrt(1 - t): small where the state is almost all noise. AnyFlow's weight t sqrt(1 - t) is poor on the plane."""
    return (1 - t).sqrt()


@torch.no_grad()
def eulerian_target(u: Network, z: State, t: Times, r: Times, v: State, delta: float = DELTA) -> State:
    """v - (t - r) du/dt, the derivative of u along (v, 1, 0) in (z, t, r).

    delta: half the width of a central difference, one-sided where t + delta > 1 or t - delta < r, for any network,
    fused attention too; 0 for the exact derivative, by forward mode.
    """
    if delta == 0:
        du = torch.func.jvp(lambda z, t: u(z, t, r), (z, t), (v, torch.ones_like(t)))[1]
    else:
        later, earlier = (t + delta).clamp(max=1), torch.maximum(t - delta, r)
        ahead, behind = displace(z, v, t, later), displace(z, v, t, earlier)
        du = (u(ahead, later, r) - u(behind, earlier, r)) / broadcast_time(later - earlier, z)
    return v - broadcast_time(t - r, z) * du


@torch.no_grad()
def lagrangian_target(u: Network, z: State, t: Times, r: Times, velocity: Velocity, delta: float = DELTA) -> State:
    """v(Phi, r) + (t - r) du/dr. `velocity(z, t)` is evaluated at Phi = Phi(z; t -> r): one more evaluation.

    delta: as for `eulerian_target`.
    """
    return lagrangian_sides(u, z, t, r, velocity, delta)[1]


def lagrangian_sides(
    u: Network, z: State, t: Times, r: Times, velocity: Velocity, delta: float = DELTA
) -> tuple[State, State]:
    """u(z, t, r), and what `lagrangian_target` says of it, with gradient in all but the velocity: two evaluations.

    Their difference is v(Phi, r) - d/dr Phi: the gradient goes through the derivative too (Boffi et al., LSD).
    """
    if delta == 0:
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
    u: Network, z: State, t: Times, r: Times, s: Times, velocity: Velocity, solver: str = "heun", **condition: Condition
) -> State:
    """The average velocity of one step of the teacher's `velocity` t -> s, then the jump s -> r, r <= s < t.

    solver: "euler", or of second order, with two evaluations, "midpoint" or "heun". Where s = r, no evaluation of `u`.
    This is CTM's soft consistency matching (arXiv 2310.02279); with r = 0 it is consistency distillation.
    """
    v = velocity(z, t, **condition)
    if share := choose("solver", solver, {"euler": 0.0, "midpoint": 0.5, "heun": 1.0}):  # of the step, to look ahead
        ahead = torch.lerp(t, s, share)
        v = v + (velocity(displace(z, v, t, ahead), ahead, **condition) - v) / (2 * share)
    end = rollout(u, displace(z, v, t, s), torch.stack([s, r]), **condition)[-1]
    return (z - end) / broadcast_time(t - r, z)


NEED_VELOCITY = ("lagrangian", "lagrangian_through_end", "teacher_step")  # of all states
OBJECTIVES = ("eulerian", "semigroup", *NEED_VELOCITY)
FLOW_MAPS = {name: {name: 1.0} for name in ("eulerian", "lagrangian", "semigroup")}  # shares of rows
FLOW_MAPS |= {"mixed": {"eulerian": 0.5, "semigroup": 0.5}}


class InnerState:
    """A loss around another one, `self.forward`, which has the state."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the inner loss, {name: tensor}."""
        return getattr(self.forward, "state_dict", dict)()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`."""
        if hasattr(self.forward, "load_state_dict"):
            self.forward.load_state_dict(state)


@dataclass
class FlowMapLoss:
    """The forward stage: rows with r = t learn the velocity, the others a mixture of the targets above.

    shares: the share of rows r < t per objective, e.g. {"eulerian": 0.5, "semigroup": 0.5}; {} is for r = t alone. Rows
    of "lagrangian_through_end" take the gradient through d/dr Phi too, see `lagrangian_sides`.
    velocity: that of a teacher or of exact truth; None takes the data velocity eps - x. weight: the weight of a row,
    a function of its t. adaptive: see `adaptive_weight`. delta: see `eulerian_target`. around: rows r = t learn a jump
    as well, up to so long, with t in its middle, whose velocity is the average one to second order; 0: none.
    Raises InputError for shares, guidance and velocity that do not go together.
    """

    longest_step, solver = 1 / 16, "heun"  # of the teacher
    shares: Mapping[str, float]
    velocity: Velocity | None = None
    guidance: Guidance | None = None
    weight: Weight = sqrt_weight
    adaptive: float = 0.0
    delta: float = DELTA
    around: float = 0.0

    def __post_init__(self):
        for name in self.shares:
            choose("objective", name, dict.fromkeys(OBJECTIVES))
        if self.shares and not (min(self.shares.values()) >= 0 and 0 < sum(self.shares.values()) < float("inf")):
            raise InputError(f"shares {dict(self.shares)}; expected finite shares, not negative and not all zero")
        if not 0 <= self.delta < 1:
            raise InputError(f"delta {self.delta}; expected a small step in time, or 0: exact")
        if set(NEED_VELOCITY) & set(self.shares) and self.velocity is None:
            raise InputError(f"{' and '.join(NEED_VELOCITY)} need velocity=, a teacher's or the exact one")
        if self.guidance and self.guidance.published and (self.around or set(self.shares) - {"eulerian"}):
            got = f"{', '.join(self.shares)}, around={self.around}"
            raise InputError(f"published guidance is for the Eulerian target alone; got {got}")

    def __call__(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """Weighted losses (B,), and the mean squared error, without weights, of the kinds of rows in the batch.

        batch: `x`, `eps`, `draw_pairs(...)`, and, for a network with a condition, `condition` and `dropped`, the rows
        with the null condition.
        """
        t, r = batch["t"], batch["r"]
        check_times(t, r)
        if self.guidance and "dropped" not in batch:
            raise InputError("guidance needs `dropped` in the batch, rows without condition: draw_pairs(..., drop=0.1)")
        if batch["x"].dtype not in (torch.float32, torch.float64):
            raise InputError(f"data of {batch['x'].dtype}; expected float32 or float64: a loss takes differences")
        z = interpolate(batch["x"], batch["eps"], t)
        kinds = self.kinds(batch)
        out, target = torch.empty_like(z), torch.empty_like(z)
        rest = torch.ones_like(t, dtype=torch.bool)  # rows whose output does not come with their target
        for name, rows in kinds.items():
            target[rows], now = self.target(name, u, batch, rows, z[rows])
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
        return loss, {name: error[rows].detach().mean() for name, rows in kinds.items()}

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
    def target(self, name: str, network: Network, batch: Batch, rows: Rows, z: State) -> tuple[State, State | None]:
        """The target of the rows of one kind, whose states are z, and the output if it came with the target.

        With published guidance output and target are g times what is published.
        """
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
            s = torch.maximum(t - self.longest_step, r)
            return teacher_step_target(network, z, t, r, s, velocity, self.solver, **condition), None
        if name == "lagrangian":
            return lagrangian_target(u, z, t, r, velocity, self.delta), None
        if name == "lagrangian_through_end":
            with torch.enable_grad():
                return lagrangian_sides(u, z, t, r, velocity, self.delta)[::-1]
        v = velocity(z, t)
        if name == "tangent" and self.around:
            half = torch.minimum(self.around * batch["split"] / 2, torch.minimum(t, 1 - t))
            with torch.enable_grad():
                return v, u(displace(z, v, t, t + half), t + half, t - half)
        target = v if name == "tangent" else eulerian_target(u, z, t, r, v, self.delta)
        if guidance and guidance.published:
            target = target + guidance.pull(network, z, t, r, v, torch.ones_like(batch["dropped"]), condition)
        return target, None


def adaptive_weight(error: Losses, power: float, floor: float = 5e-3) -> Losses | float:
    """(error + floor)^-power, stop-gradient (MeanFlow, section 4.3): 0 is plain squares, 0.5 nearly absolute values.

    Rows with a large error count less. This is right for targets without noise (a teacher's velocity or the exact
    one). The data velocity is noisy: the weight would move the minimum away from the mean.
    """
    return (error.detach() + floor) ** -power if power else 1.0
