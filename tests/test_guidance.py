"""Guidance is that of two passes; each pass is evaluated for the rows that need it; the published loss by hand."""

import torch

from minianyflow.guidance import Guidance, guided
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.objectives import FlowMapLoss, eulerian_target


def network(z, t, r, *, prompt, other):
    return z * prompt.sum((1, 2))[:, None] + t[:, None] + other[:, None]


def guided_network(scale, dropped=()):
    counter, null = EvaluationCounter(network), torch.full((1, 2, 3), 0.1)
    source = torch.Generator().manual_seed(0)
    prompt = torch.rand(6, 2, 3, generator=source)
    prompt[list(dropped)] = null
    condition = {"prompt": prompt, "other": torch.rand(6, generator=source)}
    z, t = torch.randn(6, 4, generator=source), torch.rand(6, generator=source)
    velocity = guided(lambda z, t, **c: counter(z, t, t, **c), {"prompt": null}, scale)
    with_text = network(z, t, t, **condition)
    without = network(z, t, t, **condition | {"prompt": null.expand(6, 2, 3)})
    return velocity(z, t, **condition), with_text, without, counter.rows


def test_a_guided_velocity_is_that_of_two_passes():
    v, with_text, without, rows = guided_network(2.5)
    assert torch.allclose(v, without + 2.5 * (with_text - without), atol=1e-5)
    assert not torch.allclose(v, with_text)
    assert rows == 12
    v, with_text, without, rows = guided_network(2.5, dropped=(0, 3))  # these are evaluated once
    assert torch.allclose(v, without + 2.5 * (with_text - without), atol=1e-5)
    assert rows == 6 + 4
    v, with_text, _, rows = guided_network(1)
    assert torch.equal(v, with_text)
    assert rows == 6


def test_the_published_loss_is_that_of_the_paper():
    """(u - (1 - g) u_null) / g on v - (t - r) / g du/dt; rows that dropped their condition learn u on their own."""

    def u(z, t, r, label):
        return torch.sin(z * (1 + label[:, None]) + t[:, None] * r[:, None])

    def null(z, t, r):
        return u(z, t, r, torch.zeros(20))

    x, eps = torch.randn(2, 20, 2, dtype=torch.float64)
    t, r = torch.rand(2, 20, dtype=torch.float64).sort(0, descending=True).values
    label, dropped = torch.ones(20), torch.arange(20) % 4 == 0
    label[dropped] = 0
    batch = {"x": x, "eps": eps, "t": t, "r": r, "objective_draw": 0 * t, "dropped": dropped}
    guidance = Guidance(3.0, {"label": torch.zeros(1)}, published=True)
    loss = FlowMapLoss({"eulerian": 1.0}, guidance=guidance, weight=torch.ones_like, derivative="jvp")
    losses, _ = loss(u, batch | {"condition": {"label": label}})
    z, v = (1 - t)[:, None] * x + t[:, None] * eps, eps - x
    out = u(z, t, r, label)
    shift = v - eulerian_target(lambda *now: u(*now, label), z, t, r, v, derivative="jvp")  # (t - r) du/dt
    g = torch.where(dropped, 1.0, 3.0)[:, None]
    expected = ((out - (1 - g) * null(z, t, r)) / g - (v - shift / g)).square().mean(1)
    assert torch.allclose(losses, expected)
