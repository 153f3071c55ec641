"""The baseline: its boundary, its fixed point, and that exact truth bears out what is said of it."""

import pytest
import torch

from minianyflow.consistency import ConsistencyLoss, consistency_target
from minianyflow.interpolant import interpolate
from minianyflow.networks.mlp import MLP
from toy_data.gaussians import Gaussian

GAUSSIAN = Gaussian(0.6, 0.5)
Z, T = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None], torch.linspace(0.05, 1, 60, dtype=torch.float64)


def double_batch(count=40):
    x, eps = torch.randn(2, count, 1, dtype=torch.float64)
    return {"x": x, "eps": eps, "t": torch.rand(count, dtype=torch.float64)}


def test_the_exact_map_is_its_own_target():
    exact = GAUSSIAN.average_velocity(Z, T, 0 * T)
    gaps = []
    for solver, step in (("euler", 1 / 64), ("euler", 1 / 128), ("heun", 1 / 64), ("heun", 1 / 128)):
        s = (T - step).clamp(min=0)
        target = consistency_target(GAUSSIAN.average_velocity, Z, T, s, GAUSSIAN.velocity, solver)
        gaps.append(float(((target - exact) * T[:, None]).abs().max()))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.2)  # one Euler step errs by its square
    assert gaps[2] / gaps[3] == pytest.approx(8, rel=0.4)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_the_discrete_loss_is_what_it_says(solver):
    """Every option by hand: the grid, the averaged student, the teacher's step, the weight, the adaptive weight."""
    student, average = MLP(shape=(1,)).double(), MLP(shape=(1,), seeds=(1,)).double()
    batch = double_batch()
    batch["t"][0] = 0  # belongs to the first step of the grid
    loss = ConsistencyLoss(GAUSSIAN.velocity, average, grid=8, solver=solver, weight=torch.sqrt, adaptive=0.5)
    losses, raw = loss(student, batch)
    upper = torch.ceil(8 * batch["t"].clamp(min=0.01)) / 8
    lower = upper - 1 / 8
    z = interpolate(batch["x"], batch["eps"], upper)
    v = GAUSSIAN.velocity(z, upper)
    if solver == "heun":
        v = (v + GAUSSIAN.velocity(z - v / 8, lower)) / 2
    elif solver == "midpoint":
        v = GAUSSIAN.velocity(z - v / 16, lower + 1 / 16)
    there = z - v / 8
    end = there - lower[:, None] * average(there, lower, 0 * lower)
    error = (student(z, upper, 0 * upper) - (z - end) / upper[:, None]).square().mean(1)
    assert torch.allclose(losses, upper.sqrt() * error / (error + 5e-3).sqrt(), atol=1e-9)
    assert float(raw["consistency"]) == pytest.approx(float(error.detach().mean()), abs=1e-6)


@pytest.mark.parametrize("form", ["discrete", "step"])
def test_gradient_reaches_the_student_alone(form):
    student, average = MLP(shape=(1,)).double(), MLP(shape=(1,), seeds=(1,)).double()
    losses, raw = ConsistencyLoss(lambda z, t: z, average, form)(student, double_batch(16))
    losses.mean().backward()
    assert losses.shape == (16,)
    assert raw["consistency"] > 0
    assert all(weight.grad.abs().sum() > 0 for weight in student.parameters())
    assert all(weight.grad is None for weight in average.parameters())
