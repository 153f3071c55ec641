"""Objectives of the forward stage: what the average velocity `u(z, t, r)` is regressed on.

Four identities hold for a flow map Phi(z; t -> r) = z - (t - r) u(z, t, r) along dz/dt = v(z, t); each gives a target:

    tangent      u(z, t, t) = v(z, t)                         v
    Eulerian     d/dt Phi(z_t; t -> r) = 0 along the ODE      v - (t - r) du/dt            (MeanFlow, eq. 6; AnyFlow)
    Lagrangian   d/dr Phi(z; t -> r) = v(Phi, r)              v(Phi, r) + (t - r) du/dr    (Boffi et al., prop. 2.1)
    semigroup    Phi(t -> r) = Phi(s -> r) o Phi(t -> s)      average velocity of the two jumps

A target is always stop-gradient: these functions run without one and never see the weights that learn from them.
Shapes: z, v (B, *shape), t, r, s (B,); r < t. Every target of a row r < t costs two evaluations of `u`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from minianyflow.flow_map import displace, pick_rows
from minianyflow.guidance import Guidance
from minianyflow.interpolant import broadcast_time, check_same_shape, check_times, data_velocity, interpolate
from minianyflow.support.errors import InputError, choose
from minianyflow.times import time_grid

DELTA = 2e-3  # half the width of a central difference: flat between 1e-3 and 5e-3 on the plane, in float32


def sqrt_weight(t):
    """sqrt(1 - t): quiet where the state is almost all noise. AnyFlow's own is t sqrt(1 - t), poor on the plane."""
    return (1 - t).sqrt()


def anyflow_weight(shift=1.0):
    """AnyFlow's weight of a row, a function of t: t sqrt(1 - t), of mean 1 over the shifted grid of 1000 times."""
    grid = time_grid(1000, shift)[:-1]
    mean = float((grid * sqrt_weight(grid)).mean())
    return lambda t: t * sqrt_weight(t) / mean


@torch.no_grad()
def eulerian_target(u, z, t, r, v, derivative="difference", delta=DELTA):
    """v - (t - r) du/dt, the derivative of u along (v, 1, 0) in (z, t, r).

    derivative: "difference", central, one-sided where t + delta > 1 or t - delta < r (any network, fused attention
    too); or "jvp", exact by forward mode.
    """
    if choose("derivative", derivative, {"difference": False, "jvp": True}):
        du = torch.func.jvp(lambda z, t: u(z, t, r), (z, t), (v, torch.ones_like(t)))[1]
    else:
        later, earlier = (t + delta).clamp(max=1), torch.maximum(t - delta, r)
        ahead, behind = displace(z, v, t, later), displace(z, v, t, earlier)
        du = (u(ahead, later, r) - u(behind, earlier, r)) / broadcast_time(later - earlier, z)
    return v - broadcast_time(t - r, z) * du


@torch.no_grad()
def lagrangian_target(u, z, t, r, velocity, derivative="difference", delta=DELTA):
    """v(Phi, r) + (t - r) du/dr at Phi = Phi(z; t -> r). `velocity(z, t)` is asked at Phi: one more evaluation."""
    if choose("derivative", derivative, {"difference": False, "jvp": True}):
        here, du = torch.func.jvp(lambda r: u(z, t, r), (r,), (torch.ones_like(r),))
    else:
        upper, lower = torch.minimum(r + delta, t), (r - delta).clamp(min=0)
        below = u(z, t, lower)
        du = (u(z, t, upper) - below) / broadcast_time(upper - lower, z)
        here = below + broadcast_time(r - lower, z) * du  # u(z, t, r) to second order, for free
    return velocity(displace(z, here, t, r), r) + broadcast_time(t - r, z) * du


@torch.no_grad()
def semigroup_target(u, z, t, r, s):
    """The average velocity of two jumps t -> s -> r, for r <= s <= t."""
    first = u(z, t, s)
    second = u(displace(z, first, t, s), s, r)
    share = broadcast_time((t - s) / (t - r), z)
    return share * first + (1 - share) * second


TARGETS = {"eulerian": eulerian_target, "lagrangian": lagrangian_target, "semigroup": semigroup_target}
FLOW_MAPS = {name: {name: 1.0} for name in TARGETS} | {"mixed": {"eulerian": 0.5, "semigroup": 0.5}}  # shares of rows


class InnerState:
    """A loss that carries the state of the loss inside it, `self.forward`, from one step to the next."""

    def state_dict(self):
        """The state of the loss inside, {name: tensor}."""
        return self.forward.state_dict() if hasattr(self.forward, "state_dict") else {}

    def load_state_dict(self, state):
        """Take back what `state_dict` gave."""
        if state:
            self.forward.load_state_dict(state)


@dataclass
class FlowMapLoss:
    """The forward stage: rows with r = t learn the velocity, the others a mixture of the targets above.

    shares: how the rows r < t are divided, e.g. {"eulerian": 0.5, "semigroup": 0.5}; {} is for r = t alone.
    velocity: `velocity(z, t, **condition)` of a teacher or of exact truth; None takes the data velocity eps - x.
    guidance: a `Guidance`, or None. weight: of a row, from its t. adaptive: see `adaptive_weight`. rebalance: see
    `rebalanced`.
    """

    shares: Mapping[str, float]
    velocity: Callable | None = None
    guidance: Guidance | None = None
    weight: Callable = sqrt_weight
    adaptive: float = 0.0
    derivative: str = "difference"
    delta: float = DELTA
    rebalance: bool = False
    diagonal_loss: torch.Tensor | None = field(default=None, init=False)  # of the last part with rows r = t

    def __post_init__(self):
        for name in self.shares:
            choose("objective", name, TARGETS)
        if self.shares and not (min(self.shares.values()) >= 0 and sum(self.shares.values()) > 0):
            raise InputError(f"shares {dict(self.shares)}; expected shares that are not negative and not all zero")
        if "lagrangian" in self.shares and self.velocity is None:
            raise InputError(
                "a Lagrangian target asks for the velocity where a jump lands, and data does not have it: "
                "pass velocity=, a teacher's or the exact one"
            )
        if self.guidance and self.guidance.published and set(self.shares) - {"eulerian"}:
            raise InputError(f"published guidance is for the Eulerian target alone; got {', '.join(self.shares)}")

    def __call__(self, u, batch):
        """Weighted losses (B,), and the raw mean squared error of each kind of row that is present.

        batch: `x`, `eps` (B, *shape), what `times.draw_pairs` draws, and, where the network takes a condition,
        `condition` (a dict of tensors (B, ...)) and `dropped` (B,) bool: rows whose condition is the null one.
        """
        t, r = batch["t"], batch["r"]
        check_times(t, r)
        if self.guidance and "dropped" not in batch:
            raise InputError(
                "guidance without `dropped` in the batch; expected which rows dropped their condition: "
                "draw_pairs(..., drop=0.1) draws them"
            )
        z = interpolate(batch["x"], batch["eps"], t)
        kinds = self.kinds(batch)
        target, scale = torch.empty_like(z), torch.ones_like(t)
        for name, rows in kinds.items():
            target[rows], scale[rows] = self._target(name, u, batch, rows, z[rows])
        out = u(z, t, r, **batch.get("condition", {}))
        check_same_shape("the network's output", out, z)
        error = (out - target).square().flatten(1).mean(1)  # (B,)
        loss = self.weight(t) * scale * error * adaptive_weight(error, self.adaptive)
        if self.rebalance:
            loss, self.diagonal_loss = rebalanced(loss, t == r, self.diagonal_loss)
        return loss, {name: error[rows].detach().mean() for name, rows in kinds.items()}

    def state_dict(self):
        """What goes on from one step to the next: the mean loss of the last rows r = t, for rebalancing."""
        return {} if self.diagonal_loss is None else {"diagonal_loss": self.diagonal_loss}

    def load_state_dict(self, state):
        """Take back what `state_dict` gave."""
        self.diagonal_loss = state.get("diagonal_loss")

    def kinds(self, batch):
        """The rows of each kind that is present: {"tangent": ..., name: ...}, each (n,) indices."""
        off = (batch["t"] > batch["r"]).nonzero().squeeze(1)
        if len(off) and not self.shares:
            raise InputError("rows with r < t and no objective for them: name one in `shares`, or draw diagonal=1")
        rows = {"tangent": (batch["t"] == batch["r"]).nonzero().squeeze(1)}
        lower = 0.0
        for name, share in self.shares.items():
            upper = lower + share / sum(self.shares.values())
            rows[name] = off[(batch["objective_draw"][off] >= lower) & (batch["objective_draw"][off] < upper)]
            lower = upper
        return {name: index for name, index in rows.items() if len(index)}

    @torch.no_grad()
    def _target(self, name, u, batch, rows, z):
        """The target of one kind of row, and what scales its loss."""
        options = {"derivative": self.derivative, "delta": self.delta}
        t, r = batch["t"][rows], batch["r"][rows]
        condition = pick_rows(batch.get("condition", {}), rows)
        kept = ~batch["dropped"][rows] if "dropped" in batch else torch.ones_like(t, dtype=torch.bool)

        def bound(z, t, r):
            return u(z, t, r, **condition)

        def velocity(z, t):
            x, eps = batch["x"][rows], batch["eps"][rows]
            v = self.velocity(z, t, **condition) if self.velocity else data_velocity(x, eps)
            check_same_shape("the velocity", v, z)
            exact = self.guidance and not self.guidance.published
            return v + self.guidance.pull(u, z, t, t, v, kept, condition) if exact else v

        if name == "semigroup":
            return semigroup_target(bound, z, t, r, r + batch["split"][rows] * (t - r)), 1.0
        if name == "lagrangian":
            return lagrangian_target(bound, z, t, r, velocity, **options), 1.0
        v = velocity(z, t)
        target = v if name == "tangent" else eulerian_target(bound, z, t, r, v, **options)
        if self.guidance and self.guidance.published:
            target = target + self.guidance.pull(u, z, t, r, v, kept, condition)
            return target, torch.where(kept, self.guidance.scale**-2, 1.0).to(z)
        return target, 1.0


def adaptive_weight(error, power, floor=5e-3):
    """(error + floor)^-power, stop-gradient (MeanFlow, section 4.3): 0 is plain squares, 0.5 nearly absolute values.

    error (B,). Rows that are far off pull less. Right for targets without noise (an exact or taught velocity): with
    the data velocity, whose noise is in the error, it moves the minimum away from the mean.
    """
    return (error.detach() + floor) ** -power if power else 1.0


def rebalanced(loss, diagonal, before=None):
    """AnyFlow's rebalancing: every row r < t is scaled so that its loss equals the mean loss of the rows r = t.

    loss (B,), diagonal (B,) bool; the mean is taken over all processes, of one part where a step accumulates. A part
    without any row r = t takes the mean `before`; without that, too, its loss is left alone.
    It cancels the time weight of those rows, and the scaled loss no longer shows flow-map error: log the raw one.
    Returns the losses (B,) and the mean.
    """
    total = torch.stack([loss[diagonal].sum(), diagonal.sum()]).detach()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    mean = total[0] / total[1] if total[1] else before
    if mean is None:
        return loss, None
    return torch.where(diagonal, loss, loss * mean / loss.detach().clamp(min=1e-12)), mean
