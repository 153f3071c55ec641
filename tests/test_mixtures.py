"""Exact truth is exact: against automatic differentiation, Monte Carlo and a finer ODE solve."""

import math

import pytest
import torch

from minianyflow.interpolant import clean_from_velocity, interpolate
from minianyflow.mixtures import GaussianMixture
from minianyflow.times import generator
from toy_data import plane
from toy_data.circle import CircleProcess
from toy_data.gaussians import Gaussian, GuidedGaussian


@pytest.fixture
def mixture():
    """Unequal weights and widths, samples of shape (3, 2): nothing is special about the plane."""
    means = torch.randn(5, 3, 2, generator=generator(1), dtype=torch.float64)
    return GaussianMixture(means, torch.linspace(0.2, 0.6, 5), torch.arange(1.0, 6))


def test_score_and_velocity_follow_from_the_log_density(mixture):
    """v = -(z + t score) / (1 - t), since z = (1-t) E[x] + t E[eps] and score = -E[eps] / t."""
    z = torch.randn(20, 3, 2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 20, dtype=torch.float64)
    score = torch.autograd.grad(mixture.log_density(z, t).sum(), z)[0]
    assert torch.allclose(mixture.score(z, t), score, atol=1e-9)
    expected = -(z + t[:, None, None] * score)
    assert torch.allclose((1 - t)[:, None, None] * mixture.velocity(z, t), expected, atol=1e-8)


def test_density_integrates_to_one():
    means = torch.tensor([[-1.0], [0.5]], dtype=torch.float64)
    mixture = GaussianMixture(means, torch.tensor([0.3, 0.6]), torch.tensor([1.0, 3.0]))
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    for t in (0.0, 0.4, 1.0):
        density = mixture.log_density(z, torch.full((4001,), t).double()).exp()
        assert float(torch.trapezoid(density, z[:, 0])) == pytest.approx(1, abs=1e-9)


def test_velocity_is_the_mean_of_eps_minus_x(mixture):
    """E[(eps - x) phi(z_t)] = E[v(z_t) phi(z_t)] for test functions phi, by Monte Carlo, at 8 standard errors."""
    count, source = 100_000, generator(2)
    x = mixture.sample(count, source)
    eps = torch.randn(x.shape, generator=source, dtype=x.dtype)
    for time in (0.2, 0.7):
        t = torch.full((count,), time, dtype=torch.float64)
        z = interpolate(x, eps, t)
        residual = (eps - x - mixture.velocity(z, t)).flatten(1)
        for phi in (torch.ones_like(z[:, 0, 0]), z[:, 0, 0], torch.sin(3 * z[:, 1, 0])):
            product = residual * phi[:, None]
            assert bool((product.mean(0).abs() < 8 * product.std(0) / math.sqrt(count)).all())


def test_clean_estimate_is_the_posterior_mean(mixture):
    z, t = torch.randn(9, 3, 2, dtype=torch.float64), torch.full((9,), 1e-9, dtype=torch.float64)
    assert torch.allclose(clean_from_velocity(mixture.velocity(z, t), z, t), z, atol=1e-6)
    noise_only = clean_from_velocity(mixture.velocity(z, torch.ones(9)), z, torch.ones(9))
    mean = (mixture.weights[:, None] * mixture.means).sum(0).reshape(3, 2)
    assert torch.allclose(noise_only, mean.expand(9, 3, 2))


def test_flow_is_good_to_seven_digits(spiral):
    z = torch.randn(64, 2, generator=generator(3), dtype=torch.float64)
    ends = torch.ones(64), torch.zeros(64)
    assert float((spiral.flow(z, *ends) - spiral.flow(z, *ends, tolerance=1e-12)).abs().max()) < 1e-7


def test_flow_of_one_gaussian_is_the_formula():
    gaussian, mixture = Gaussian(0.7, 0.4), GaussianMixture(torch.tensor([[0.7]], dtype=torch.float64), 0.4)
    z, t = torch.randn(50, 1, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    r = t * torch.rand(50, dtype=torch.float64)
    assert torch.allclose(mixture.velocity(z, t), gaussian.velocity(z, t), atol=1e-7)
    assert torch.allclose(mixture.flow(z, t, r), gaussian.flow(z, t, r), atol=1e-7)
    assert torch.allclose(mixture.average_velocity(z, t, r), gaussian.average_velocity(z, t, r), atol=1e-6)


def test_guided_gaussian_solves_its_ode():
    guided = GuidedGaussian(Gaussian(1.0, 0.5), Gaussian(-0.3, 1.2), 3.0)
    z, steps = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 2000
    state = z
    for step in range(steps):  # midpoint rule from 1 to 0.1
        t = torch.full((9,), 1 - 0.9 * step / steps, dtype=torch.float64)
        half = state - 0.45 / steps * guided.velocity(state, t)
        state = state - 0.9 / steps * guided.velocity(half, t - 0.45 / steps)
    assert torch.allclose(guided.flow(z, torch.ones(9), torch.full((9,), 0.1)), state, atol=1e-6)
    alone, ends = Gaussian(1.0, 0.5), (torch.ones(9), torch.zeros(9))
    assert torch.allclose(GuidedGaussian(alone, Gaussian(-0.3, 1.2), 1.0).flow(z, *ends), alone.flow(z, *ends))


@pytest.mark.parametrize(
    ("name", "components", "spread"), [("spiral", 100, 1.07), ("ring8", 8, 1.06), ("checkerboard", 200, 1.15)]
)
def test_targets_are_what_their_docstrings_say(name, components, spread):
    mixture = plane.load(name)
    samples = mixture.sample_stratified(8192, generator(0))
    assert mixture.means.shape == (components, 2)
    assert float(samples.square().mean().sqrt()) == pytest.approx(spread, abs=0.02)
    assert samples.mean(0).abs().max() < 0.01
    assert mixture.means.abs().max() <= 2


def test_stratified_samples_give_each_component_its_share(mixture):
    samples = mixture.sample_stratified(1500, generator(0))
    nearest = mixture.posterior(samples, torch.zeros(1500, dtype=torch.float64)).mean(0)
    assert torch.allclose(nearest, mixture.weights, atol=0.02)


def test_circle_conditionals_are_those_of_the_joint():
    """log p(frame 2 | frames 0, 1) = log p(frames 0..2) - log p(frames 0, 1), from two joint mixtures."""
    process = CircleProcess(frames=3)
    clips = process.clips.sample(40, generator(0))
    now = torch.zeros(40)
    conditional = process.frame(2).log_density(clips[:, 2], now, process.log_weights(clips[:, :2]))
    shorter = CircleProcess(frames=2).clips.log_density(clips[:, :2], now)
    assert torch.allclose(conditional, process.clips.log_density(clips, now) - shorter, atol=1e-3)
    assert torch.allclose(process.log_weights(clips[:, :0]).exp(), process.clips.weights.expand(40, -1), atol=1e-7)


def test_circle_frames_flow_to_the_frame_that_must_follow():
    process = CircleProcess(frames=4)
    clips = process.clips.sample(64, generator(1))
    weights, frame = process.log_weights(clips[:, :3]), process.frame(3)
    end = frame.flow(torch.randn(64, 2, generator=generator(2)), torch.ones(64), torch.zeros(64), log_weights=weights)
    assert float((end - clips[:, 3]).norm(dim=1).median()) < 0.3  # two independent blurs of .05, a known place
    assert float((end.norm(dim=1) - 1).abs().mean()) < 0.15
