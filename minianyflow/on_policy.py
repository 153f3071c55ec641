"""The on-policy stage: Flow Map Backward Simulation and distribution matching (AnyFlow, section 4; DMD2).

A student with many steps visits states that no forward process makes. Backward simulation lands on them cheaply: of a
rollout over N steps only one is taken as it is; all steps before it are one jump, all after it another.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minianyflow.flow_map import rollout, velocity
from minianyflow.interpolant import broadcast_time, clean_from_velocity, interpolate
from minianyflow.objectives import FlowMapLoss, InnerState
from minianyflow.support.errors import InputError, choose
from minianyflow.times import time_shift

STEPS = (2, 4, 8, 16, 50)  # the rollouts that AnyFlow simulates


def draw_rollouts(count, generator=None, steps=STEPS):
    """For each of `count` samples a rollout length N out of `steps` and a step g in 0..N-1: two (count,) tensors."""
    if min(steps) < 1:
        raise InputError(f"rollouts of {steps} steps; expected at least one step")
    lengths = torch.tensor(steps)[torch.randint(len(steps), (count,), generator=generator)]
    return lengths, (torch.rand(count, generator=generator) * lengths).long()


def draw_on_policy(shape, count, generator=None, steps=STEPS, shift=1.0, fake_time="uniform"):
    """What on-policy training draws for `count` samples of `shape`, on top of the batch of the forward loss.

    Returns a dict: `noise`, `score_eps` (count, *shape), `lengths`, `step`, `score_t` (count,), uniform and shifted.
    With fake_time="logit_normal" also `fake_t` (count,), the times that AnyFlow's fake score learns at, shifted too.
    """
    uniform = choose("fake_time", fake_time, {"uniform": True, "logit_normal": False})
    noise, score_eps = torch.randn(2, count, *shape, generator=generator)
    lengths, step = draw_rollouts(count, generator, steps)
    score_t = time_shift(torch.rand(count, generator=generator), shift)
    drawn = {"noise": noise, "score_eps": score_eps, "lengths": lengths, "step": step, "score_t": score_t}
    normal = torch.randn(count, generator=generator)
    return drawn if uniform else drawn | {"fake_t": time_shift(normal.sigmoid(), shift)}


def backward_simulation_times(lengths, step, shift=1.0):
    """The times 1 -> t_g -> t_{g+1} -> 0 on a grid of N steps, one column a sample: (4, B), float32.

    lengths: N (B,); step: g (B,), 0 <= g < N. The first jump has length zero for g = 0, the last for g = N - 1.
    """
    if not bool(((step >= 0) & (step < lengths)).all()):
        raise InputError("found a step g outside 0..N-1; draw N and g with draw_rollouts")
    inner = torch.stack([(lengths - step) / lengths, (lengths - step - 1) / lengths])
    ends = torch.ones_like(inner[0])
    return time_shift(torch.stack([ends, inner[0], inner[1], 0 * ends]), shift)


def backward_simulation(u, z, lengths, step, shift=1.0, **condition):
    """Three jumps at most for a rollout of any length; returns (4, B, *shape), the last of them at t = 0.

    Gradient flows through all jumps. Zero-length ones are left out row by row: 2.6 evaluations a sample on average
    with the published lengths.
    """
    return rollout(u, z, backward_simulation_times(lengths, step, shift).to(z.device), **condition)


def distribution_matching_loss(x, real_velocity, fake_velocity, t, eps):
    """Per-sample loss (B,) whose gradient moves samples x from the fake score's density to the real one's (DMD2).

    x: clean samples, t = 0, with gradient. They are noised to t (B,); both scores say what was clean; the gradient
    (x_fake - x_real) / mean|x - x_real| reaches x alone.
    """
    with torch.no_grad():
        z = interpolate(x, eps, t)
        x_real = clean_from_velocity(real_velocity(z, t), z, t)
        x_fake = clean_from_velocity(fake_velocity(z, t), z, t)
        size = (x - x_real).abs().flatten(1).mean(1).clamp(min=1e-6)  # (B,)
        target = x - (x_fake - x_real) / broadcast_time(size, x)
    return (x - target).square().flatten(1).mean(1)


@dataclass
class OnPolicyLoss(InnerState):
    """The student's loss: distribution matching on simulated rollouts, plus the forward loss, which keeps many steps.

    real: velocity(z, t) of the teacher. fake: the fake score, a network u(z, t, r). forward: the forward stage's loss.
    simulate: what makes the samples, in the form of `backward_simulation`.
    batch: what `forward` needs, and `noise` (B, *shape), `lengths`, `step`, `score_t` (B,), `score_eps` (B, *shape).
    """

    real: Callable
    fake: Callable
    forward: FlowMapLoss | None
    forward_weight: float = 1.0
    shift: float = 1.0
    simulate: Callable = backward_simulation

    def __call__(self, u, batch):
        """Losses (B,) and the raw errors by name: "distribution matching" and the kinds of `forward`."""
        condition = batch.get("condition", {})
        x = self.simulate(u, batch["noise"], batch["lengths"], batch["step"], self.shift, **condition)[-1]
        loss = distribution_matching_loss(
            x,
            lambda z, t: self.real(z, t, **condition),
            lambda z, t: velocity(self.fake, z, t, **condition),
            batch["score_t"],
            batch["score_eps"],
        )
        raw = {"distribution matching": loss.detach().mean()}
        if self.forward and self.forward_weight:
            forward, kinds = self.forward(u, batch)
            loss, raw = loss + self.forward_weight * forward, raw | kinds
        return loss, raw


@dataclass
class FakeScoreLoss:
    """The fake score's loss: flow matching on what the student makes now, without gradient to it.

    batch: as above; at the times `fake_t` (B,) if it has them, else at `score_t`.
    """

    student: Callable
    shift: float = 1.0
    simulate: Callable = backward_simulation

    def __call__(self, u, batch):
        """Losses (B,) and the raw error, of rows r = t."""
        condition = batch.get("condition", {})
        with torch.no_grad():
            x = self.simulate(self.student, batch["noise"], batch["lengths"], batch["step"], self.shift, **condition)
        t = batch.get("fake_t", batch["score_t"])
        fresh = {"x": x[-1], "eps": batch["score_eps"], "t": t, "r": t, "condition": condition}
        return FlowMapLoss({}, weight=torch.ones_like)(u, fresh)
