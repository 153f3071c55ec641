import math

import pytest
import torch

from benchmarks.ablation import CHANGES, histogram_kl
from minianyflow.plane.race import Budget, train_method


@pytest.mark.parametrize("method", CHANGES)
def test_every_change_trains(method):
    for _, options in CHANGES[method].values():
        _, history, cost = train_method(method, "ring8", (0,), Budget(evaluations=2000, rows=16), False, **options)
        assert cost["steps"] > 10
        assert history[-1]["student/loss"] > 0


def test_histogram_kl_is_that_of_its_shares():
    """Two bins, shares 1/2 and 1/2 against 1/4 and 3/4; zero of samples from themselves."""
    left, right = torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    truth, samples = torch.cat([left, right]), torch.cat([left, right, right, right])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert histogram_kl(truth, samples, bins=2) == pytest.approx(expected, abs=1e-8)
    assert histogram_kl(truth, truth) == 0
