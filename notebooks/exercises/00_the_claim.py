"""Exercises to notebook 0. Fill the gaps, then run this file: %run exercises/00_the_claim.py"""

import torch

from minianyflow import sample_euler, sobol_noise, time_grid
from minianyflow.course.exercises import check, finish, sealed
from toy_data import plane

spiral, z = plane.load("spiral"), sobol_noise(64, (2,))


# 1. Warm-up (2 minutes). Whose path error gets worse with more steps: that of "euler", "flow map" or "consistency"?
def gets_worse():
    """Return one of the three names."""
    ...  # your lines here


check("1", gets_worse, sealed("ImNvbnNpc3RlbmN5Ig=="), "look at the curves: which line ends higher than it began?")


# 2. Euler by hand (10 minutes). Two steps, 1 -> 1/2 -> 0. velocity(z, t) wants t as a vector, one time a row.
def two_euler_steps(z, velocity):
    """Return where two equal Euler steps take z (B, 2): (B, 2)."""
    ...  # your lines here


expected = sample_euler(spiral.velocity, z, time_grid(2))[-1]
check(
    "2", lambda: two_euler_steps(z, spiral.velocity), expected, "z_r = z - (t - r) v(z, t), twice, from where you are"
)


# 3. A sampler of your own (20 minutes). `u(z, t, r)` is the average velocity from t down to r, so a jump is exact if u
# is. Walk down any falling list of times, and return every state you pass, the noise too.
def walk(u, z, times):
    """Return the trajectory (len(times), B, 2) of one jump after another."""
    ...  # your lines here


times = torch.tensor([1.0, 0.7, 0.2, 0.0])
expected = torch.stack([spiral.flow(z, torch.ones(64), torch.full((64,), float(t))) for t in times])
check(
    "3",
    lambda: walk(spiral.average_velocity, z, times),
    expected,
    "with the exact u, every state of your walk lies on the exact flow from the noise, whatever the times",
    rows=("time", "noise"),
)

finish()
