import torch

from minianyflow.guidance import guided
from minianyflow.networks.mlp import EvaluationCounter


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
    assert torch.allclose(v, without + 2.5 * (with_text - without), atol=1e-6)
    assert not torch.allclose(v, with_text)
    assert rows == 12


def test_rows_that_have_the_null_prompt_already_are_asked_once():
    v, with_text, without, rows = guided_network(2.5, dropped=(0, 3))
    assert torch.allclose(v, without + 2.5 * (with_text - without), atol=1e-6)
    assert rows == 6 + 4


def test_scale_one_asks_once():
    v, with_text, _, rows = guided_network(1)
    assert torch.equal(v, with_text)
    assert rows == 6
