"""The mathematics, on the exact map of the spiral: identities, rollouts, samplers, and diffusers' scheduler."""

from functools import partial

import numpy as np
import pytest
import torch

from minianyflow.flow_map import end_point, jump, rollout, tangent, velocity
from minianyflow.interpolant import clean_from_velocity, data_velocity, interpolate, score_from_velocity
from minianyflow.measures import path_error, sobol_noise
from minianyflow.objectives import eulerian_target, lagrangian_target, semigroup_target
from minianyflow.samplers import sample_consistency, sample_euler, sample_flow_map, sample_ode
from minianyflow.samplers import sample_consistency_deterministic as sample_deterministic
from minianyflow.times import generator, time_grid
from toy_data.gaussians import Gaussian


def largest(a, b):
    return float((a - b).abs().max())


def states(mixture, count=64):
    """z_t with times t > s > r, all float64, times apart by .02 or more."""
    t, s, r = (torch.rand(3, count, dtype=torch.float64) * 0.9).sort(0, descending=True).values
    t, r = t + 0.08, (r - 0.02).clamp(min=0)
    x = mixture.sample(count)
    return interpolate(x, torch.randn_like(x), t), t, s + 0.02, r


def noise_and_end(mixture, count):
    z = sobol_noise(count, (2,)).double()
    return z, mixture.flow(z, torch.ones(count), torch.zeros(count))


def test_each_target_of_the_exact_map_is_the_exact_map(spiral):
    """Smaller deltas magnify the solver's error, larger ones truncate: 1e-4 reads 3e-7 at most, and 1.6e-6."""
    z, t, s, r = states(spiral, 16)
    u, v = partial(spiral.average_velocity, tolerance=1e-13), spiral.velocity(z, t)
    exact = u(z, t, r)  # 1.1 at most
    assert largest(eulerian_target(u, z, t, r, v, delta=1e-4), exact) < 1e-5
    assert largest(lagrangian_target(u, z, t, r, spiral.velocity, delta=1e-4), exact) < 1e-5
    assert largest(semigroup_target(u, z, t, r, s), exact) < 1e-7


def test_tangent_and_score(spiral):
    z, t, _, r = states(spiral)
    assert torch.equal(tangent(spiral.average_velocity)(z, t, r), spiral.velocity(z, t))
    assert torch.allclose(score_from_velocity(spiral.velocity(z, t), z, t), spiral.score(z, t), rtol=1e-6)
    assert torch.equal(velocity(spiral.average_velocity, z, t), spiral.velocity(z, t))
    assert largest(spiral.average_velocity(z, t, t - 1e-6), spiral.velocity(z, t)) < 1e-5  # continuous at the diagonal


def test_interpolant_and_its_velocity():
    (x, eps), t = torch.randn(2, 5, 3, 2), torch.rand(5)
    z = interpolate(x, eps, t)
    assert torch.allclose(clean_from_velocity(data_velocity(x, eps), z, t), x, atol=1e-6)
    assert torch.equal(interpolate(x, eps, torch.zeros(5)), x)
    assert torch.equal(interpolate(x, eps, torch.ones(5)), eps)
    frames = torch.rand(5, 3)  # a time for every frame
    assert torch.equal(interpolate(x, eps, frames)[2, 1], interpolate(x[2, 1:2], eps[2, 1:2], frames[2, 1:2])[0])


def test_euler_converges_with_order_one(spiral):
    z, exact = noise_and_end(spiral, 128)
    steps = np.array([64, 128, 256])
    errors = [path_error(sample_euler(spiral.velocity, z, time_grid(int(n)).double())[-1], exact) for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)


def test_any_solver_of_torchdiffeq(spiral):
    z, exact = noise_and_end(spiral, 64)
    assert path_error(sample_ode(spiral.velocity, z, time_grid(2))[-1], exact) < 1e-3
    euler = sample_ode(spiral.velocity, z, time_grid(8), method="euler")
    assert torch.allclose(euler, sample_euler(spiral.velocity, z, time_grid(8)), atol=1e-6)


def test_the_exact_map_is_any_step(spiral):
    z, exact = noise_and_end(spiral, 32)
    ones = torch.ones(32).double()
    assert largest(jump(spiral.average_velocity, z, ones, 0 * ones), exact) < 1e-5
    assert largest(end_point(spiral.average_velocity, z, ones), exact) < 1e-5
    for steps in (1, 4):
        trajectory = sample_flow_map(spiral.average_velocity, z, time_grid(steps).double())
        assert trajectory.shape == (steps + 1, 32, 2)
        assert largest(trajectory[-1], exact) < 1e-5


def test_exact_consistency_sampling_loses_the_path_and_the_deterministic_one_the_law(spiral):
    """One step of either is the flow; with more, re-noising makes another, equally good, sample."""
    z, exact = noise_and_end(spiral, 64)
    u = partial(spiral.average_velocity, tolerance=1e-5)
    renoised = [path_error(sample_consistency(u, z, time_grid(n).double(), generator(n))[-1], exact) for n in (1, 2, 4)]
    assert renoised[0] < 1e-3 < 0.25 < min(renoised[1:])
    off = [path_error(sample_deterministic(u, z, time_grid(n).double())[-1], exact) for n in (1, 2, 4)]
    assert off[0] < 1e-3 < 0.03 < min(off[1:])


@pytest.mark.parametrize("steps", [1, 2, 8, 32])
def test_exact_consistency_sampling_keeps_the_law_and_the_deterministic_one_does_not(steps):
    """On a Gaussian, whose maps are affine, the law is a mean and a spread: .6 and .5 whatever the steps, or not."""
    gaussian, z = Gaussian(0.6, 0.5), sobol_noise(8192, (1,)).double()
    u, times = gaussian.average_velocity, time_grid(steps).double()
    end = sample_consistency(u, z, times, generator(steps))[-1]
    assert (float(end.mean()), float(end.std())) == pytest.approx((0.6, 0.5), abs=0.03)
    off = sample_deterministic(u, z, times)[-1]
    assert abs(float(off.std()) - 0.5) > 0.03 or steps == 1


def test_rollout_takes_a_grid_a_sample_and_leaves_out_rests():
    rows = []

    def u(z, t, r):
        rows.append(len(z))
        return z * (t + r)[:, None]

    z = torch.randn(3, 2)
    times = torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [0.0, 0.2, 1.0]])
    trajectory = rollout(u, z, times)
    assert rows == [1, 2]  # a jump of length zero costs nothing
    assert torch.equal(trajectory[-1][2], z[2])
    assert torch.equal(trajectory[-1][0], rollout(u, z[:1], times[:, 0])[-1][0])


@pytest.mark.slow  # imports diffusers
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (8, 5.0)])
def test_diffusers_scheduler_takes_the_same_steps(spiral, steps, shift):
    from diffusers import FlowMapEulerDiscreteScheduler

    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    times = time_grid(steps, shift)
    assert torch.allclose(scheduler.sigmas.float(), times, atol=1e-6)
    z = here = sobol_noise(16, (2,)).double()
    trajectory = sample_flow_map(spiral.average_velocity, z, scheduler.sigmas)
    for now, t, r in zip(scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        u = spiral.average_velocity(here, t.expand(16), r.expand(16))
        here = scheduler.step(u, now, here).prev_sample
    assert largest(here, trajectory[-1]) < 1e-9
