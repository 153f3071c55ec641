"""Exercises to notebook 1. Fill the gaps, then run this file: %run exercises/01_diffusion.py"""

import math

import torch

from minianyflow import clean_from_velocity, data_velocity, interpolate, path_error, sample_ode, sobol_noise, time_grid
from minianyflow.course.exercises import check, finish
from toy_data import plane
from toy_data.gaussians import Gaussian

spiral, z = plane.load("spiral"), sobol_noise(256, (2,))
t = torch.linspace(0.1, 1, 256)
z_t = interpolate(spiral.sample_stratified(256, torch.Generator().manual_seed(0)), z, t)  # (256, 2)
line = Gaussian(mean=0.5, sigma=2.0)  # data on the line, its flow a formula


# 1. Warm-up (2 minutes). A pair x = 2, eps = -1, at t = 1/4. Where is it, and how fast does it move?
def one_pair():
    """Return two numbers, [z, data velocity], worked out by hand."""
    # SOLUTION
    return [1.25, -3.0]
    # END


x, eps = torch.tensor([2.0]), torch.tensor([-1.0])
expected = torch.cat([interpolate(x, eps, torch.tensor([0.25])), data_velocity(x, eps)])
check("1", one_pair, expected, "z = (1 - t) x + t eps; its derivative by t has no t in it")


# 2. From a denoiser (10 minutes). An older model predicts clean = E[x | z], and you need the velocity, then the score.
# Use only z, t and clean; t has one time a row, so t[:, None] multiplies a state.
def velocity_from_clean(clean, z, t):
    """Return v(z, t) (B, 2)."""
    # SOLUTION
    return (z - clean) / t[:, None]
    # END


def score_from_clean(clean, z, t):
    """Return grad log p_t(z) (B, 2)."""
    # SOLUTION
    return ((1 - t[:, None]) * clean - z) / t[:, None] ** 2
    # END


v = spiral.velocity(z_t, t)
clean = clean_from_velocity(v, z_t, t)
check("2a", lambda: velocity_from_clean(clean, z_t, t), v, "at z, eps is (z - (1-t) x) / t; take the mean of eps - x")
check(
    "2b",
    lambda: score_from_clean(clean, z_t, t),
    spiral.score(z_t, t),
    "the score is -E[eps | z] / t, and E[eps | z] is (z - (1-t) E[x | z]) / t",
)


# 3. Heun's method (20 minutes). For each step: an Euler step to a trial state, the velocity there, and then the real
# step with the mean of the two velocities. velocity(z, t) wants t as a vector, one time a row: t.expand(len(z)).
def heun(z, velocity, times):
    """Return where z (B, *shape) ends after walking down the falling times (N + 1,)."""
    # SOLUTION
    for t, r in zip(times[:-1], times[1:]):
        here = velocity(z, t.expand(len(z)))
        there = velocity(z - (t - r) * here, r.expand(len(z)))
        z = z - (t - r) * (here + there) / 2
    return z
    # END


expected = sample_ode(spiral.velocity, z, time_grid(8), "heun2")[-1]
check("3a", lambda: heun(z, spiral.velocity, time_grid(8)), expected, "both velocities count one half, t before r")


# Its order: how many times the error halves when the steps double. error_of(solver, steps) measures the error.
def error_of(solver, steps):
    """Path error of `solver(z, velocity, times)` on the line, in float64."""
    start = sobol_noise(64, (1,)).double()
    one = torch.ones(64, dtype=torch.float64)
    end = solver(start, line.velocity, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    return path_error(end, line.flow(start, one, 0 * one))


def order(solver):
    """Return log2 of the error at 64 steps over that at 128."""
    # SOLUTION
    return math.log2(error_of(solver, 64) / error_of(solver, 128))
    # END


def library_heun(z, velocity, times):
    """Heun's method of torchdiffeq."""
    return sample_ode(velocity, z, times, "heun2")[-1]


expected = math.log2(error_of(library_heun, 64) / error_of(library_heun, 128))
check("3b", lambda: order(heun), expected, "second order: twice the steps, a quarter of the error", tolerance=0.01)


# 4. One Gaussian (30 minutes, with paper). Data x ~ N(mean, sigma^2) on the line, eps ~ N(0, 1). Derive v(z, t).
# For Gaussian a and z: E[a | z] = E[a] + cov(a, z) / var(z) * (z - E[z]). Here a = eps - x and z = (1-t) x + t eps.
def gaussian_velocity(z, t, mean, sigma):
    """Return E[eps - x | z_t = z] for numbers or tensors of one shape, without the library."""
    # SOLUTION
    covariance = t - (1 - t) * sigma**2
    variance = (1 - t) ** 2 * sigma**2 + t**2
    return -mean + covariance / variance * (z - (1 - t) * mean)
    # END


on_line, times = sobol_noise(64, (1,)), torch.linspace(0, 1, 64)
check(
    "4",
    lambda: gaussian_velocity(on_line[:, 0], times, line.mean, line.sigma),
    line.velocity(on_line, times)[:, 0],
    "x and eps are independent: cov(eps - x, (1-t) x + t eps) = t var(eps) - (1-t) var(x)",
)

finish()
