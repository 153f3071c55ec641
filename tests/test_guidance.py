"""Guidance is that of two passes; each pass is evaluated for the rows that need it; the published loss by hand."""

import pytest
import torch

from minianyflow.guidance import Guidance, guided
from minianyflow.interpolant import interpolate
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.objectives import FlowMapLoss, eulerian_target


def network(z, t, r, *, prompt, other):
    return z * prompt.sum((1, 2))[:, None] + t[:, None] + other[:, None]


@pytest.mark.parametrize(("scale", "dropped", "rows"), [(2.5, [], 6 + 6), (2.5, [0, 3], 6 + 4), (1.0, [], 6)])
def test_a_guided_velocity_is_that_of_two_passes(scale, dropped, rows):
    """Rows that dropped their condition are evaluated once, and so are all rows without guidance."""
    counter, null = EvaluationCounter(network), torch.full((1, 2, 3), 0.1)
    prompt, other = torch.rand(6, 2, 3), torch.rand(6)
    prompt[dropped] = null
    z, t = torch.randn(6, 4), torch.rand(6)
    velocity = guided(lambda z, t, **c: counter(z, t, t, **c), {"prompt": null}, scale)
    v, with_text = velocity(z, t, prompt=prompt, other=other), network(z, t, t, prompt=prompt, other=other)
    without = network(z, t, t, prompt=null.expand(6, 2, 3), other=other)
    assert torch.allclose(v, without + scale * (with_text - without), atol=1e-5)
    assert torch.allclose(v, with_text) == (scale == 1)
    assert counter.rows == rows


def test_the_published_loss_is_that_of_the_paper():
    """(u - (1 - g) u_null) / g on v - (t - r) / g du/dt, in rows that dropped their condition, too."""

    def u(z, t, r, label):
        return torch.sin(z * (1 + label[:, None]) + t[:, None] * r[:, None])

    x, eps = torch.randn(2, 20, 2, dtype=torch.float64)
    t, r = torch.rand(2, 20, dtype=torch.float64).sort(0, descending=True).values
    label, dropped = torch.ones(20), torch.arange(20) % 4 == 0
    label[dropped] = 0
    batch = {"x": x, "eps": eps, "t": t, "r": r, "objective_draw": 0 * t, "dropped": dropped}
    guidance = Guidance(3.0, {"label": torch.zeros(1)}, published=True)
    loss = FlowMapLoss({"eulerian": 1.0}, guidance=guidance, weight=torch.ones_like, delta=0)
    losses, _ = loss(u, batch | {"condition": {"label": label}})
    z, v = interpolate(x, eps, t), eps - x
    out = u(z, t, r, label)
    shift = v - eulerian_target(lambda *now: u(*now, label), z, t, r, v, delta=0)  # (t - r) du/dt
    g = 3.0
    expected = ((out - (1 - g) * u(z, t, r, 0 * label)) / g - (v - shift / g)).square().mean(1)
    assert torch.allclose(losses, expected)
