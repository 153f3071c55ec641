"""The on-policy stage: Flow Map Backward Simulation and distribution matching (AnyFlow, section 4; DMD2).

A student that takes many steps visits states that noised data never shows. Backward simulation reaches them in three
jumps at most: one step of a rollout over N steps is taken as it is, one jump replaces all steps before it, and one
jump all steps after it. Letters and types: notation.py.
"""

from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from minianyflow.batch import Batch
from minianyflow.flow_map import rollout, velocity
from minianyflow.interpolant import broadcast_time, clean_from_velocity, interpolate
from minianyflow.notation import Condition, Counts, Errors, Loss, Losses, Network, State, Times, Trajectory, Velocity
from minianyflow.objectives import FlowMapLoss, InnerState
from minianyflow.support.errors import InputError, choose
from minianyflow.times import time_shift

STEPS = (2, 4, 8, 16, 50)  # the lengths of the rollouts that AnyFlow simulates


def draw_rollouts(
    count: int, generator: torch.Generator | None = None, steps: Sequence[int] = STEPS, shared: bool = False
) -> tuple[Counts, Counts]:
    """For each of `count` samples a rollout length N out of `steps` and a step g in 0..N-1.

    shared: one pair for all samples, as AnyFlow has it.
    """
    if min(steps) < 1:
        raise InputError(f"rollouts of {steps} steps; expected at least one step")
    lengths = torch.tensor(steps)[torch.randint(len(steps), (count,), generator=generator)]
    step = (torch.rand(count, generator=generator) * lengths).long()
    return (lengths[:1].repeat(count), step[:1].repeat(count)) if shared else (lengths, step)


def draw_on_policy(
    shape: Sequence[int],
    count: int,
    generator: torch.Generator | None = None,
    steps: Sequence[int] = STEPS,
    shift: float = 1.0,
    fake_time: str = "uniform",
    shared: bool = False,
) -> dict[str, Tensor]:
    """The random numbers of on-policy training, for `count` samples of `shape`, besides those of the forward loss.

    Returns a dict: `noise`, `score_eps` (count, *shape), `lengths`, `step`, `score_t` (count,), uniform and shifted.
    With fake_time="logit_normal" also `fake_t` (count,), the shifted times at which AnyFlow's fake score learns.
    shared: see `draw_rollouts`.
    """
    uniform = choose("fake_time", fake_time, {"uniform": True, "logit_normal": False})
    noise, score_eps = torch.randn(2, count, *shape, generator=generator)
    lengths, step = draw_rollouts(count, generator, steps, shared)
    score_t = time_shift(torch.rand(count, generator=generator), shift)
    drawn = {"noise": noise, "score_eps": score_eps, "lengths": lengths, "step": step, "score_t": score_t}
    normal = torch.randn(count, generator=generator)
    return drawn if uniform else drawn | {"fake_t": time_shift(normal.sigmoid(), shift)}


def backward_simulation_times(lengths: Counts, step: Counts, shift: float = 1.0) -> Float[Tensor, "4 batch"]:
    """The times 1 -> t_g -> t_{g+1} -> 0 on a grid of N steps, one column per sample, float32.

    lengths: N; step: g, 0 <= g < N. The first jump has length zero for g = 0, the last for g = N - 1.
    """
    if lengths.shape != step.shape:
        shapes = f"{tuple(lengths.shape)} lengths, {tuple(step.shape)} steps"
        raise InputError(f"{shapes}; expected one of each per sample")
    if not bool(((step >= 0) & (step < lengths)).all()):
        raise InputError("found a step g outside 0..N-1; draw N and g with draw_rollouts")
    before, after = (lengths - step) / lengths, (lengths - step - 1) / lengths
    return time_shift(torch.stack([torch.ones_like(before), before, after, torch.zeros_like(before)]), shift)


def backward_simulation(
    u: Network,
    z: State,
    lengths: Counts,
    step: Counts,
    shift: float = 1.0,
    recomputed: bool = False,
    **condition: Condition,
) -> Trajectory:
    """Three jumps at most for a rollout of any length; returns (4, B, *shape), the last state at t = 0.

    Gradients flow through all jumps. Jumps of length zero are not evaluated: 2.6 evaluations per sample on average,
    with the published lengths. recomputed: as in `rollout`.
    """
    return rollout(u, z, backward_simulation_times(lengths, step, shift).to(z.device), recomputed, **condition)


def distribution_matching_loss(x: State, real: Velocity, fake: Velocity, t: Times, eps: State) -> Losses:
    """A loss per sample whose gradient moves samples x from the fake score's density to the real one's (DMD2).

    x: clean samples, t = 0, with gradient. They are noised to t; both scores predict the clean sample. The gradient,
    2 / D (x_fake - x_real) / mean|x - x_real| for D numbers per sample, reaches x alone.
    """
    with torch.no_grad():
        z = interpolate(x, eps, t)
        x_real = clean_from_velocity(real(z, t), z, t)
        x_fake = clean_from_velocity(fake(z, t), z, t)
        size = (x - x_real).abs().flatten(1).mean(1).clamp(min=1e-6)  # (B,)
        target = x - (x_fake - x_real) / broadcast_time(size, x)
    return (x - target).square().flatten(1).mean(1)


def rollout_condition(batch: Batch) -> dict[str, Condition]:
    """The condition of the rollouts and scores of a batch."""
    return batch.get("rollout_condition", batch.get("condition", {}))


@dataclass
class OnPolicyLoss(InnerState):
    """The student's loss: distribution matching on its rollouts, plus the forward loss, which keeps many steps good.

    real: the teacher's velocity. fake: the fake score, a network u(z, t, r). forward: the forward stage's loss.
    simulate: makes the samples, with the signature of `backward_simulation`.
    The batch has the tensors of `forward` and those of `draw_on_policy`. The rollouts and scores have its
    `rollout_condition`, if there is one, in place of `condition`: AnyFlow drops prompts for the forward loss alone.
    """

    real: Velocity
    fake: Network
    forward: Loss | None
    forward_weight: float = 1.0
    shift: float = 1.0
    simulate: Callable[..., Trajectory] = backward_simulation

    @property
    def terms(self) -> tuple[Loss, ...]:
        """The losses that add up to this one: `accumulate_gradient` takes the backward of one before the next."""
        return (self.matching, self.weighted_forward)[: 1 + bool(self.forward and self.forward_weight)]

    def __call__(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """Losses (B,), and the errors without weights by name: "distribution matching" and the kinds of `forward`."""
        losses, errors = zip(*(term(u, batch) for term in self.terms), strict=True)
        return sum(losses), dict(ChainMap(*errors))

    def matching(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """Distribution matching on the student's rollouts."""
        condition = rollout_condition(batch)
        x = self.simulate(u, batch["noise"], batch["lengths"], batch["step"], self.shift, **condition)[-1]
        real, fake = partial(self.real, **condition), partial(velocity, self.fake, **condition)
        loss = distribution_matching_loss(x, real, fake, batch["score_t"], batch["score_eps"])
        return loss, {"distribution matching": loss.detach().mean()}

    def weighted_forward(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """The forward loss by its weight, and its errors."""
        losses, errors = self.forward(u, batch)
        return self.forward_weight * losses, errors


@dataclass
class FakeScoreLoss:
    """The fake score's loss: flow matching on the student's present samples, without gradient to the student.

    The batch is that of `OnPolicyLoss`. The times are `fake_t` if the batch has them, else `score_t`.
    """

    student: Network
    shift: float = 1.0
    simulate: Callable[..., Trajectory] = backward_simulation

    def __call__(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """Losses (B,), and their mean, by the name "tangent": all rows have r = t."""
        condition = rollout_condition(batch)
        with torch.no_grad():
            x = self.simulate(self.student, batch["noise"], batch["lengths"], batch["step"], self.shift, **condition)
        t = batch.get("fake_t", batch["score_t"])
        fresh = {"x": x[-1], "eps": batch["score_eps"], "t": t, "r": t, "condition": condition}
        return FlowMapLoss({}, weight=torch.ones_like)(u, fresh)
