"""Backward simulation and distribution matching: what is scored is clean, costs three evaluations, and descends."""

import pytest
import torch

from minianyflow.flow_map import rollout
from minianyflow.interpolant import interpolate
from minianyflow.measures import sliced_w2
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.objectives import FlowMapLoss
from minianyflow.on_policy import (
    STEPS,
    FakeScoreLoss,
    OnPolicyLoss,
    backward_simulation,
    backward_simulation_times,
    distribution_matching_loss,
    draw_on_policy,
    draw_rollouts,
)
from minianyflow.times import draw_pairs, generator, time_grid
from toy_data.gaussians import Gaussian

EVERY = [(steps, step) for steps in STEPS for step in range(steps)]
LENGTHS, STEP = torch.tensor(EVERY).T


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_every_rollout_runs_from_noise_to_data_over_one_step_of_its_grid(shift):
    times = backward_simulation_times(LENGTHS, STEP, shift)
    assert bool((times[0] == 1).all())
    assert bool((times[3] == 0).all())  # what is scored is at t = 0
    for (steps, step), column in zip(EVERY, times.T, strict=True):
        assert torch.allclose(column[1:3], time_grid(steps, shift)[step : step + 2], atol=1e-6)


def test_three_evaluations_at_most_whatever_the_length():
    def evaluations(lengths, step):  # jumps of length zero cost nothing
        return 1 + (step > 0).long() + (step < lengths - 1).long()

    network = EvaluationCounter(MLP())
    backward_simulation(network, torch.randn(len(EVERY), 2), LENGTHS, STEP)
    assert network.rows == int(evaluations(LENGTHS, STEP).sum())
    assert float(evaluations(*draw_rollouts(20_000)).float().mean()) == pytest.approx(2.6, abs=0.05)


def test_it_equals_the_plain_rollout_when_the_map_is_exact():
    gaussian = Gaussian(0.6, 0.5)
    z = torch.linspace(-2, 2, len(EVERY), dtype=torch.float64)[:, None]
    short = backward_simulation(gaussian.average_velocity, z, LENGTHS, STEP)
    for steps in STEPS:
        rows = steps == LENGTHS
        full, place = rollout(gaussian.average_velocity, z[rows], time_grid(steps).double()), torch.arange(steps)
        assert torch.allclose(short[-1, rows], full[-1], atol=1e-5)
        assert torch.allclose(short[1, rows], full[STEP[rows], place], atol=1e-5)
        assert torch.allclose(short[2, rows], full[STEP[rows] + 1, place], atol=1e-5)


def test_gradient_flows_through_all_three_jumps():
    u, z = MLP().double(), torch.randn(4, 2, dtype=torch.float64)
    lengths, step = torch.full((4,), 8), torch.full((4,), 3)
    times = backward_simulation_times(lengths, step)
    frozen = {name: weight.detach() for name, weight in u.named_parameters()}

    def gradient(jumps):
        """The gradient through the weights of these jumps alone."""

        def only(z, t, r):
            live = any(torch.equal(t, times[jump]) for jump in jumps)
            return u(z, t, r) if live else torch.func.functional_call(u, frozen, (z, t, r))

        end = backward_simulation(only, z, lengths, step)[-1]
        return torch.cat([part.flatten() for part in torch.autograd.grad(end.square().sum(), list(u.parameters()))])

    parts = [gradient([jump]) for jump in range(3)]
    assert all(bool(part.any()) for part in parts)
    assert torch.allclose(gradient([0, 1, 2]), sum(parts), rtol=1e-5, atol=1e-8)


def test_distribution_matching_gradient_is_the_published_one():
    x, t, eps = torch.randn(5, 3, 2, requires_grad=True), torch.rand(5), torch.randn(5, 3, 2)
    real, fake = Gaussian(1.0, 0.5), Gaussian(0.0, 0.7)
    losses = distribution_matching_loss(x, real.velocity, fake.velocity, t, eps)
    assert losses.shape == (5,)
    gradient = torch.autograd.grad(losses.sum(), x)[0]
    z = interpolate(x, eps, t)
    x_real, x_fake = (z - t[:, None, None] * side.velocity(z, t) for side in (real, fake))
    size = (x - x_real).abs().mean((1, 2), keepdim=True)
    assert torch.allclose(gradient, 2 / 6 * (x_fake - x_real) / size, atol=1e-5)
    same = torch.autograd.grad(distribution_matching_loss(x, real.velocity, real.velocity, t, eps).sum(), x)[0]
    assert float(same.abs().max()) < 1e-5  # scores agree: nothing moves


def test_descent_moves_samples_to_the_real_law():
    """Free particles with the exact fake score of their own Gaussian: they end at the real mean and spread."""
    x = (-0.5 + 1.2 * torch.randn(64, 32, generator=generator(0))).requires_grad_()
    target = 1.0 + 0.5 * torch.randn(64 * 32, 1, generator=generator(1))
    before, source = sliced_w2(x.detach().reshape(-1, 1), target), generator(2)
    for _ in range(150):
        fake = Gaussian(float(x.mean()), float(x.std()))
        t, eps = torch.rand(64, generator=source), torch.randn(64, 32, generator=source)
        loss = distribution_matching_loss(x, Gaussian(1.0, 0.5).velocity, fake.velocity, t, eps)
        x = (x - 0.5 * torch.autograd.grad(loss.sum(), x)[0]).detach().requires_grad_()
    assert sliced_w2(x.detach().reshape(-1, 1), target) < 0.15 * before


def policy_batch(count=32):
    x, eps = torch.randn(2, count, 2)
    return {"x": x, "eps": eps, **draw_pairs(count), **draw_on_policy((2,), count)}


def recorder(velocity):
    """The velocity, as a function that records its states and times in `inputs`."""

    def u(z, t, r=None):
        u.inputs.append((z.detach(), t))
        return velocity(z, t)

    u.inputs = []
    return u


def same(inputs, z, t):
    """Whether a recorder was evaluated once, at z and t."""
    ((state, time),) = inputs
    return torch.allclose(state, z, atol=1e-6) and torch.equal(time, t)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_what_is_scored_is_the_clean_end_of_the_rollout(shift):
    """Both score the rollout's end, noised to score_t, each in its own role; the forward loss is added."""
    real, fake = recorder(Gaussian(1.0, 0.5).velocity), recorder(Gaussian(0.0, 0.7).velocity)
    student, forward, batch = MLP(), FlowMapLoss({"eulerian": 1.0}), policy_batch()
    losses, _ = OnPolicyLoss(real, fake, forward, forward_weight=0.3, shift=shift)(student, batch)
    end = backward_simulation(student, batch["noise"], batch["lengths"], batch["step"], shift)[-1]
    z = interpolate(end, batch["score_eps"], batch["score_t"])
    assert same(real.inputs, z, batch["score_t"])
    assert same(fake.inputs, z, batch["score_t"])
    matching = distribution_matching_loss(end, real, fake, batch["score_t"], batch["score_eps"])
    assert torch.allclose(losses, matching + 0.3 * forward(student, batch)[0], atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("times", [{}, {"fake_t": torch.full((32,), 0.25)}])
def test_the_fake_score_learns_the_students_ends(shift, times):
    """At the times of the scores, or at times of its own."""
    student, batch, fake = MLP(), policy_batch() | times, recorder(lambda z, t: 0 * z)
    end = backward_simulation(student, batch["noise"], batch["lengths"], batch["step"], shift)[-1].detach()
    losses, _ = FakeScoreLoss(student, shift)(fake, batch)
    t = times.get("fake_t", batch["score_t"])
    assert same(fake.inputs, interpolate(end, batch["score_eps"], t), t)
    assert torch.allclose(losses, (batch["score_eps"] - end).square().mean(1), atol=1e-6)


def test_on_policy_draws_have_their_shapes_and_their_shift():
    drawn = draw_on_policy((3, 4), 4000, shift=5.0, fake_time="logit_normal")
    assert drawn["noise"].shape == drawn["score_eps"].shape == (4000, 3, 4)
    assert set(drawn["lengths"].tolist()) == set(STEPS)
    assert float(drawn["score_t"].median()) == pytest.approx(5 / 6, abs=0.03)
    assert not torch.equal(drawn["noise"], drawn["score_eps"])
    plain = (drawn["fake_t"] / (5 - 4 * drawn["fake_t"])).logit()  # the shift undone
    assert (float(plain.mean()), float(plain.std())) == pytest.approx((0, 1), abs=0.1)


def test_both_roles_learn_and_neither_trains_the_other():
    student, fake = MLP(), MLP(seeds=(1,))
    batch = policy_batch()
    loss = OnPolicyLoss(lambda z, t: z, fake, FlowMapLoss({"eulerian": 1.0}))
    losses, raw = loss(student, batch)
    losses.mean().backward()
    assert losses.shape == (32,)
    assert set(raw) == {"distribution matching", "tangent", "eulerian"}
    assert all(weight.grad.abs().sum() > 0 for weight in student.parameters())
    assert all(weight.grad is None for weight in fake.parameters())
    student.zero_grad(set_to_none=True)
    FakeScoreLoss(student)(fake, batch)[0].mean().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in fake.parameters())
    assert all(weight.grad is None for weight in student.parameters())
