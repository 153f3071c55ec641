"""Exercises to notebook 5. Fill the gaps, then run this file: %run exercises/05_on_policy.py"""

import torch

from minianyflow import MLP, EvaluationCounter, backward_simulation, backward_simulation_times, clean_from_velocity
from minianyflow.course.exercises import check, finish
from toy_data.gaussians import Gaussian

ROLLOUTS = [(16, 5), (16, 0), (16, 15), (2, 1), (1, 0)]  # (N, g)


# 1. Warm-up (2 minutes). How many evaluations does a backward simulation of step g of an N-step rollout take?
def evaluations(N, g):
    """Return a whole number."""
    # SOLUTION
    return 1 + (g > 0) + (g < N - 1)
    # END


def counted(N, g):
    network = EvaluationCounter(MLP(width=4, depth=1))
    backward_simulation(network, torch.zeros(1, 2), torch.tensor([N]), torch.tensor([g]))
    return network.rows


def all_of(count):
    answers = [count(N, g) for N, g in ROLLOUTS]
    return None if any(answer is None or answer is ... for answer in answers) else answers


expected = [counted(N, g) for N, g in ROLLOUTS]
check("1", lambda: all_of(evaluations), expected, "three, less one for every jump that has length zero")


# 2. The times (10 minutes). AnyFlow shifts its times by s -> 5 s / (1 + 4 s). Write the four times of a simulation.
def times(N, g, shift):
    """Return the four falling times [1, t_g, t_{g+1}, 0] on the shifted grid."""
    # SOLUTION
    plain = [1, (N - g) / N, (N - g - 1) / N, 0]
    return [shift * s / (1 + (shift - 1) * s) for s in plain]
    # END


expected = backward_simulation_times(torch.tensor([8]), torch.tensor([3]), shift=5.0)[:, 0]
check("2", lambda: times(8, 3, 5.0), expected, "t_g = (N - g) / N, then the shift, for each of the four; 0 and 1 stay")


# 3. A wrong state to score (20 minutes). The data is N(1, 1/4), the student's map is exact, so nothing should be pushed.
# But someone scores the rollout's state z_r at r = 1/4 as if it were clean. That state is Gaussian: its mean is
# (1 - r) 1, its standard deviation real.spread(r); the fake score, trained on these states, knows exactly this law.
# Noise such a state once more to time t. What is the push x_real - x_fake, on average over all states and noises?
real, r = Gaussian(1.0, 0.5), 0.25


def average_push(t):
    """Return the mean of x_real - x_fake over the wrongly scored states, a number."""
    # SOLUTION
    mean_fake = (1 - r) * 1.0  # on average x_fake is the mean of its own law
    mean_z = (1 - t) * mean_fake
    gain = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
    return 1 + gain * (mean_z - (1 - t) * 1.0) - mean_fake
    # END


def clean(law, z, t):
    return clean_from_velocity(law.velocity(z, t), z, t)


def all_times(push):
    answers = [push(t) for t in (0.2, 0.5, 0.8)]
    return None if any(answer is None or answer is ... for answer in answers) else answers


wrong = Gaussian(0.75, float(real.spread(torch.tensor(r))))
middle = torch.tensor([[0.8 * 0.75], [0.5 * 0.75], [0.2 * 0.75]])  # both are affine in z, so its mean is enough
t = torch.tensor([0.2, 0.5, 0.8])
expected = (clean(real, middle, t) - clean(wrong, middle, t))[:, 0]
hint = "x_real is affine in z, so put the mean of z into it; on average x_fake is the mean of the fake law"
check("3", lambda: all_times(average_push), expected, hint)


# 4. The push between two Gaussians (half an hour, on paper first). Real data N(m, s^2), the student's N(n, q^2), a state z at
# time t. Derive x_fake - x_real. Start from E[x | z] for jointly Gaussian x and z = (1 - t) x + t eps, which is
# m + cov(x, z) / var(z) (z - E z). Then look at s = q: on what does the push depend, and where does it vanish in t?
def gap(z, t, m, s, n, q):
    """Return x_fake - x_real, before it is divided by its scale; all arguments are numbers."""

    # SOLUTION
    def clean_part(mean, sigma):
        keep = 1 - t
        return mean + keep * sigma**2 / (keep**2 * sigma**2 + t**2) * (z - keep * mean)

    return clean_part(n, q) - clean_part(m, s)
    # END


# ... and for s = q, as short as it gets: one factor of (n - m), without z
def gap_equal_spread(t, m, n, s):
    """Return x_fake - x_real for two Gaussians of the same spread s."""
    # SOLUTION
    return (n - m) * t**2 / ((1 - t) ** 2 * s**2 + t**2)
    # END


def from_library(z, t, m, s, n, q):
    z, t = torch.tensor([[z]]), torch.tensor([t])
    return float(clean(Gaussian(n, q), z, t) - clean(Gaussian(m, s), z, t))


numbers = (0.35, 0.5, 1.0, 0.5, 0.0, 1.0)  # those of the notebook
hint = "cov(x, z) = (1 - t) sigma^2 and var(z) = (1 - t)^2 sigma^2 + t^2; the notebook's numbers give 0.35 - 0.94"
check("4", lambda: gap(*numbers), from_library(*numbers), hint)
hint = "z drops out; the factor is 1 - (1 - t) cov / var: no push at t = 0, the whole gap at t = 1"
check(
    "4, equal spread", lambda: gap_equal_spread(0.3, 1.0, -0.4, 0.6), from_library(0.2, 0.3, 1.0, 0.6, -0.4, 0.6), hint
)

finish()
