"""Exercises to notebook 4. Fill the gaps, then run this file: %run exercises/04_objectives.py"""

import torch

from minianyflow import (
    FLOW_MAPS,
    MLP,
    EvaluationCounter,
    FlowMapLoss,
    broadcast_time,
    draw_pairs,
    eulerian_target,
    generator,
    interpolate,
    semigroup_target,
)
from minianyflow.course.exercises import check, finish
from toy_data import plane

spiral, network = plane.load("spiral"), MLP().requires_grad_(False)
batch = draw_pairs(64, generator(0)) | {"x": spiral.sample(64, generator(1))}
batch["eps"] = torch.randn(64, 2, generator=generator(2))
mixture = FlowMapLoss(FLOW_MAPS["mixed"], velocity=spiral.velocity)


# 1. Warm-up (2 minutes). A batch of 64 rows, half on the diagonal; the others are divided among Eulerian and semigroup,
# half each. How many rows learn each target?
def rows_of_each_kind():
    """Return three whole numbers: tangent, Eulerian, semigroup."""
    # SOLUTION
    return [32, 16, 16]
    # END


expected = [len(rows) for rows in mixture.kinds(batch).values()]
check("1", rows_of_each_kind, expected, "a half of 64 has r = t; halve what is left")


# 2. Cost (5 minutes). How many evaluations of the network does one batch take, if a share `diagonal` of its `rows` rows
# has r = t, for the prediction and the targets together?
def evaluations(rows, diagonal):
    """Return the count, from two tensors (n,): it asks for several batches at once."""
    # SOLUTION
    return rows + 2 * rows * (1 - diagonal)
    # END


def counted(rows, diagonal):
    counter, x = EvaluationCounter(network), spiral.sample(rows, generator(3))
    mixture(counter, draw_pairs(rows, generator(4), diagonal, end=0.0) | {"x": x, "eps": torch.randn(x.shape)})
    return counter.rows


rows, diagonal = torch.tensor([128, 128, 64, 64]), torch.tensor([0.5, 0.25, 1.0, 0.0])
check(
    "2",
    lambda: evaluations(rows, diagonal),
    [counted(*case) for case in zip(rows.tolist(), diagonal.tolist())],
    "every row is predicted once; every row with r < t needs two evaluations more",
)

pairs = draw_pairs(64, generator(5), diagonal=0.0)
t, r = pairs["t"], pairs["r"]
s, z = r + pairs["split"] * (t - r), interpolate(batch["x"], batch["eps"], t)
v = spiral.velocity(z, t)


# 3. The semigroup target (15 minutes). Jump from t to s, from there to r: which average velocity makes the same journey
# in one jump? A time is (B,), a state (B, 2): `broadcast_time(t, z)` has the shape that multiplies z.
def two_jumps(u, z, t, r, s):
    """Return the target (B, 2) for u(z, t, r), with r <= s <= t."""
    # SOLUTION
    middle = z - broadcast_time(t - s, z) * u(z, t, s)
    end = middle - broadcast_time(s - r, z) * u(middle, s, r)
    return (z - end) / broadcast_time(t - r, z)
    # END


check(
    "3",
    lambda: two_jumps(network, z, t, r, s),
    semigroup_target(network, z, t, r, s),
    "z_r = z - (t - r) u, solved for u; the second jump starts where the first one lands",
    tolerance=1e-3,
)


# 4. The Eulerian target (30 minutes). On paper: along the ODE dz/dt = v the end Phi = z - (t - r) u(z, t, r) does not
# move, d/dt Phi = 0. Take the derivative (z moves, t moves, r does not) and solve for the u that stands alone. Then
# code it: torch.func.jvp(function, inputs, directions) returns the value and its derivative along the directions.
def eulerian(u, z, t, r, v):
    """Return the target (B, 2) for u(z, t, r), without gradient."""
    # SOLUTION
    # 0 = dz/dt - d(t - r)/dt u - (t - r) du/dt = v - u - (t - r) du/dt, so u = v - (t - r) du/dt
    du = torch.func.jvp(lambda z, t: u(z, t, r), (z, t), (v, torch.ones_like(t)))[1]
    return (v - broadcast_time(t - r, z) * du).detach()
    # END


check(
    "4",
    lambda: eulerian(network, z, t, r, v),
    eulerian_target(network, z, t, r, v, delta=0),
    "0 = v - u - (t - r) du/dt; the directions are v for z and 1 for t, and r stays as it is",
)

finish()
