"""Exercises to notebook 2. Fill the gaps, then run this file: %run exercises/02_consistency.py"""

import torch

from minianyflow import end_point, sample_consistency, sobol_noise, time_grid
from minianyflow.course.exercises import check, finish, sealed
from toy_data.gaussians import Gaussian

line, noise = Gaussian(mean=1.0, sigma=0.75), sobol_noise(256, (1,))


# 1. Warm-up (2 minutes). A re-noised sampler with an exact map takes 8 steps. What is lost: "samples" (they no longer
# look like data) or "path" (they no longer end where the flow carries their noise)?
def is_lost():
    """Return one of the two words."""
    # SOLUTION
    return "path"
    # END


check(
    "1",
    is_lost,
    sealed("InBhdGgi"),
    "fresh noise moves a state to another path; an exact map takes any state of z_t to data",
)


# 2. f by hand (10 minutes). Data N(mean, sigma^2) on the line; the flow keeps a point at the same number of spreads
# from the centre. z_t has centre (1 - t) mean and spread s(t) = sqrt((1 - t)^2 sigma^2 + t^2).
def consistency_map(z, t, mean, sigma):
    """Return where the path through z (B,) at times t (B,) ends: (B,)."""
    # SOLUTION
    spread = ((1 - t) ** 2 * sigma**2 + t**2).sqrt()
    return mean + sigma * (z - (1 - t) * mean) / spread
    # END


z, t = torch.tensor([1.125, -1.0, 0.3]), torch.tensor([0.5, 1.0, 0.1])
check(
    "2",
    lambda: consistency_map(z, t, line.mean, line.sigma),
    end_point(line.average_velocity, z[:, None], t)[:, 0],
    "at t = 0 the centre is mean and the spread is sigma; the first one is the number by hand of the notebook",
)


# 3. The re-noised sampler (20 minutes). `f(z, t)` wants t as a vector, one time a row. Draw the noise of a step with
# torch.randn(z.shape, generator=generator), once for every time but the first and the last.
def renoised(f, z, times, generator):
    """Return the samples (B, 1) after jumping from every time but the last, with fresh noise in between."""
    # SOLUTION
    x = f(z, times[0].expand(len(z)))
    for t in times[1:-1]:
        z = (1 - t) * x + t * torch.randn(z.shape, generator=generator)
        x = f(z, t.expand(len(z)))
    return x
    # END


def exact_map(z, t):
    """The exact f of the line."""
    return end_point(line.average_velocity, z, t)


expected = sample_consistency(line.average_velocity, noise, time_grid(5), torch.Generator().manual_seed(0))[-1]
check(
    "3",
    lambda: renoised(exact_map, noise, time_grid(5), torch.Generator().manual_seed(0)),
    expected,
    "x = f(z, t_i), then z = (1 - t_{i+1}) x + t_{i+1} eps'; five jumps draw noise four times, and end with a jump",
)


# 4. What re-noising keeps, and what it loses (30 minutes). So far x has mean m, spread s, and correlation c with the
# first noise. Re-noise it at t (fresh noise, independent of all before), then jump with the exact f of exercise 2.
# Derive the three numbers of the new x. All is Gaussian, so: mean and variance of z first; then f, which is affine.
def after_a_step(m, s, c, t, mean, sigma):
    """Return [mean, spread, correlation with the first noise] of the new x; plain numbers."""
    # SOLUTION
    of_z = ((1 - t) ** 2 * s**2 + t**2) ** 0.5  # spread of z = (1 - t) x + t eps'
    stretch = sigma / ((1 - t) ** 2 * sigma**2 + t**2) ** 0.5  # slope of f
    return [
        mean + stretch * (1 - t) * (m - mean),  # f takes the centre (1 - t) mean to mean
        stretch * of_z,
        c * (1 - t) * s / of_z,  # cov(x, first) (1 - t) over the spread of z; an affine map leaves a correlation alone
    ]
    # END


def by_the_library(m, s, c, t):
    """The same from the library's flow: it is affine, so four points give its coefficients on the three noises."""
    first, rest, fresh = torch.eye(3)[:, :, None]  # coefficients on three independent normals
    x = s * (c * first + (1 - c**2) ** 0.5 * rest)  # (3, 1): what each noise adds to x, without its mean
    z = (1 - t) * torch.cat([m + 0 * x[:1], m + x]) + t * torch.cat([0 * x[:1], fresh])
    end = exact_map(z, torch.full((4,), t))[:, 0]
    adds = end[1:] - end[0]
    return torch.stack([end[0], adds.norm(), adds[0] / adds.norm()])


check(
    "4a, a right law",
    lambda: after_a_step(1.0, 0.75, 1.0, 0.5, line.mean, line.sigma),
    by_the_library(1.0, 0.75, 1.0, 0.5),
    "put m = mean and s = sigma into your formula: mean and spread must come out unchanged, the correlation as 0.6",
)
check(
    "4b, a wrong law",
    lambda: after_a_step(1.3, 0.5, 0.8, 0.25, line.mean, line.sigma),
    by_the_library(1.3, 0.5, 0.8, 0.25),
    "z has mean (1-t) m and variance (1-t)^2 s^2 + t^2; f(z) = mean + sigma / s(t) (z - (1-t) mean)",
)

finish()
