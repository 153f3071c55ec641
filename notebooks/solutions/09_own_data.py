"""Exercises to notebook 9. Fill the gaps, then run this file: %run exercises/09_own_data.py"""

import math

import torch

from minianyflow import generator
from minianyflow.course.exercises import check, finish, sealed
from toy_data.own import left_out_likelihood

points = torch.randn(60, 2, generator=generator(0), dtype=torch.float64) * torch.tensor([3.0, 700.0]) + 5


# 1. Warm-up (2 minutes). You bring a function that samples, and no formula. Is its truth "exact", "fitted" or "learnt"?
def truth_of_a_function():
    """Return one of the three words."""
    # SOLUTION
    return "learnt"
    # END


check(
    "1",
    truth_of_a_function,
    sealed("ImxlYXJudCI="),
    "without a formula, and without kernels around points, what gives a velocity?",
)


# 2. Units (5 minutes). The network expects numbers near 1. Undo that for samples: from standardised units to the file's.
def back_to_units(samples, mean, scale):
    """Return samples (n, D) in the units of the file; mean and scale (D,) are those of its columns."""
    # SOLUTION
    return samples * scale + mean
    # END


mean, scale = points.mean(0), points.std(0)
standardised = (points - mean) / scale
check("2", lambda: back_to_units(standardised, mean, scale), points, "standardised = (x - mean) / scale: solve for x")


# 3. How wide? (20 minutes) The mean log density of each point under Gaussians of this width around all the others.
def left_out(points, width):
    """Return the mean over points (n, D) of log 1/(n-1) sum_j N(x_i; x_j, width^2 I), j not i: a number."""
    # SOLUTION
    count, numbers = points.shape
    distance = torch.cdist(points, points).square()
    log_density = -0.5 * distance / width**2 - 0.5 * numbers * math.log(2 * math.pi * width**2)
    log_density.fill_diagonal_(-math.inf)
    return float(torch.logsumexp(log_density, 1).mean()) - math.log(count - 1)
    # END


expected = left_out_likelihood(standardised, 0.3)
check(
    "3",
    lambda: left_out(standardised, 0.3),
    expected,
    "torch.cdist gives all distances; fill_diagonal_ leaves j = i out",
)

finish()
