"""Exercises to notebook 3. Fill the gaps, then run this file: %run exercises/03_flow_map.py"""

import torch

from minianyflow import eulerian_target, semigroup_target, time_grid
from minianyflow.course.exercises import check, finish
from toy_data import plane
from toy_data.gaussians import Gaussian

spiral = plane.load("spiral").to(torch.float64)
source = torch.Generator().manual_seed(0)
r, s, t = torch.rand(3, 64, generator=source).double().mul(0.9).add(0.05).sort(0).values  # r < s < t, (64,)
z = torch.randn(64, 2, generator=source).double()  # (64, 2)


# 1. Warm-up (2 minutes). At which points (t, r) of the triangle does a rollout of three equal steps evaluate u?
def points_of_a_rollout():
    """Return a list of three pairs [t, r], in the order in which they are asked for."""
    # SOLUTION
    return [[1, 2 / 3], [2 / 3, 1 / 3], [1 / 3, 0]]
    # END


grid = time_grid(3)
expected = torch.stack([grid[:-1], grid[1:]], 1)
check("1", points_of_a_rollout, expected, "every jump starts where the last one ended, at r <= t")


# 2. Self-consistent and wrong (10 minutes). Write a u(z, t, r) that satisfies the semigroup identity for all states and
# times, moves the states, and is not the spiral's: one line is enough. Which ODEs can you solve in your head?
def wrong(z, t, r):
    """Return an average velocity (B, 2) for z (B, 2), t and r (B,)."""
    # SOLUTION
    return torch.ones_like(z)  # dz/dt = 1: every state drifts, its average velocity is its velocity
    # END


def judge():
    """Does it satisfy the semigroup identity; does it move; does the tangent identity notice? 1 is yes."""
    if wrong(z, t, r) is None:
        return None
    residual = (semigroup_target(wrong, z, t, r, s) - wrong(z, t, r)).abs().max()
    tangent = (wrong(z, t, t) - spiral.velocity(z, t)).abs().mean()
    return [float(residual < 1e-6), float(wrong(z, t, r).abs().max() > 1e-3), float(tangent > 1e-2)]


check("2", judge, [1.0, 1.0, 1.0], "take the exact flow of any other velocity, such as one that is the same everywhere")


# 3. The Eulerian residual (15 minutes): v - (t - r) du/dt - u, with du/dt by a central difference of half width delta,
# along the path: while t grows by delta, z grows by delta v. It is zero for the exact map; here u is another one.
def eulerian_residual(u, z, t, r, v, delta):
    """Return the residual (B, 2), for z and v (B, 2), t and r (B,)."""
    # SOLUTION
    later, earlier = u(z + delta * v, t + delta, r), u(z - delta * v, t - delta, r)
    du = (later - earlier) / (2 * delta)
    return v - (t - r)[:, None] * du - u(z, t, r)
    # END


def only_the_velocity(z, t, r):
    """The map that answers v for every r: (B, 2)."""
    return spiral.velocity(z, t)


v = spiral.velocity(z, t)
expected = eulerian_target(only_the_velocity, z, t, r, v, delta=0) - v
check(
    "3",
    lambda: eulerian_residual(only_the_velocity, z, t, r, v, 1e-5),
    expected,
    "du/dt is total: move z by delta v as you move t by delta, leave r where it is, divide by 2 delta",
)


# 4. The average velocity of a Gaussian (30 minutes). Data N(mean, sigma^2) on the line. Derive u on paper:
#    (a) z_t is Gaussian. What are its mean and its variance?
#    (b) The ODE keeps (z_t - its mean) / (its standard deviation). What is Phi(z; t -> r)?
#    (c) u is displacement over time. It divides by t - r: what is its limit at r = t? Make your code right there, too.
def average_velocity(z, t, r, mean, sigma):
    """Return u (B, 1) for z (B, 1), t and r (B,), r <= t; some rows have r = t."""
    # SOLUTION
    # The difference of the spreads is that of their squares over their sum, and the squares are polynomials in time:
    # spread(t)^2 - spread(r)^2 = (t - r) ((1 + sigma^2) (t + r) - 2 sigma^2). So t - r cancels, and r = t is harmless.
    t, r = t[:, None], r[:, None]
    late, early = (((1 - time) ** 2 * sigma**2 + time**2).sqrt() for time in (t, r))
    change = ((1 + sigma**2) * (t + r) - 2 * sigma**2) / (late + early)  # (spread(t) - spread(r)) / (t - r)
    return change / late * (z - (1 - t) * mean) - mean
    # END


ends = torch.where(torch.arange(64) % 4 == 0, t, r)  # every fourth row on the diagonal
check(
    "4",
    lambda: average_velocity(z[:, :1], t, ends, 1.0, 0.75),
    Gaussian(1.0, 0.75).average_velocity(z[:, :1], t, ends),
    "a^2 - b^2 = (a - b)(a + b) for the two standard deviations; t - r cancels, and r = t needs no case of its own",
)

finish()
