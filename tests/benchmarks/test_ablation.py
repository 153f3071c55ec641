"""The ablation: every change trains, and what it adds to the library is right."""

import math

import pytest
import torch

from benchmarks.ablation import CHANGES, ContinuousLoss, continuous_target, histogram_kl
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import eulerian_target
from minianyflow.plane.race import Budget, train_method
from toy_data.gaussians import Gaussian


@pytest.mark.parametrize("method", CHANGES)
def test_every_change_trains(method):
    for _, options in CHANGES[method].values():
        _, history, cost = train_method(method, "ring8", (0,), Budget(evaluations=400, rows=16), False, **options)
        assert cost["steps"] > 1
        assert history[-1]["student/loss"] > 0


def test_a_continuous_target_is_the_exact_map_normalised_and_warmed_up():
    gaussian, u = Gaussian(0.6, 0.5), MLP(shape=(1,)).double()
    z, t = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None], torch.linspace(0.05, 1, 60, dtype=torch.float64)
    v, exact = gaussian.velocity(z, t), gaussian.average_velocity(z, t, 0 * t)
    target = continuous_target(gaussian.average_velocity, z, t, v, exact, delta=0)
    assert float((target - exact).abs().max()) < 1e-9
    with torch.no_grad():
        here = u(z, t, 0 * t)
    for warm, tangent in ((0.0, v - here), (1.0, eulerian_target(u, z, t, 0 * t, v) - here)):
        moved = continuous_target(u, z, t, v, here, warm) - here
        assert torch.allclose(moved, tangent / (tangent.abs() + 0.1))
    loss, batch = ContinuousLoss(gaussian.velocity, u, "step", weight=torch.ones_like), {"t": t, "x": z, "eps": 0 * z}
    loss.warmup, z = 2, (1 - t)[:, None] * z
    with torch.no_grad():
        here, v = u(z, t, 0 * t), gaussian.velocity(z, t)
    for warm in (0.5, 1.0, 1.0):
        expected = (here - continuous_target(u, z, t, v, here, warm)).square().mean(1)
        assert torch.allclose(loss(u, batch)[0], expected, atol=1e-9)


def test_histogram_kl_is_that_of_its_shares():
    """Two bins, shares 1/2 and 1/2 against 1/4 and 3/4; zero of samples from themselves."""
    left, right = torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    truth, samples = torch.cat([left, right]), torch.cat([left, right, right, right])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert histogram_kl(truth, samples, bins=2) == pytest.approx(expected, abs=1e-8)
    assert histogram_kl(truth, truth) == 0
