"""The transformer to read is diffusers': the same weights give the same output, and each part is that part."""

import pytest
import torch

from minianyflow.networks.video import VideoTransformer
from minianyflow.networks.wan import TINY, TextEncoder
from minianyflow.networks.weights import load_network
from minianyflow.times import generator
from minianyflow.video.stages import WEIGHTS, path_of
from tests.networks.inputs import R, T, clip

SIZES = {name: value for name, value in TINY.items() if name != "rope_max_seq_len"}  # no table: angles as needed


def both(name):
    """Trained weights in diffusers' class and in ours."""
    network = load_network(path_of(WEIGHTS, name))
    ours = VideoTransformer(**SIZES, timesteps=network.timesteps).eval().requires_grad_(False)
    ours.load_state_dict(network.transformer.state_dict())  # strict: no key more, none less
    return network, ours


@pytest.mark.parametrize("name", ["teacher", "eulerian"])
@pytest.mark.parametrize("size", [(5, 4, 4), (3, 6, 8)])
def test_trained_weights_give_the_output_of_diffusers(name, size):
    network, ours = both(name)
    z, prompt = torch.randn(2, size[0], 4, *size[1:], generator=generator(1)), TextEncoder()(["one ball", "two balls"])
    for t, r in ((T, R), (torch.rand(2, size[0], generator=generator(2)), torch.zeros(2, size[0]))):
        expected = network(z, t, r, prompt)
        largest = float(expected.abs().max())
        assert float((ours(z, t, r, prompt) - expected).abs().max()) < 6e-6 * largest  # reads 1.7e-6 at most
        assert largest > 0.1


def test_gradients_are_those_of_diffusers():
    network, ours = both("eulerian")
    gradients, z = [], clip(5)
    for u in (network, ours):
        u.requires_grad_(True)(z, T, R, TextEncoder()(["one ball", "two balls"])).square().mean().backward()
        gradients.append({name.removeprefix("transformer."): weight.grad for name, weight in u.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        atol = 1e-5 + 1e-4 * float(expected.abs().max())
        assert torch.allclose(gradients[1][name], expected, rtol=0, atol=atol), name
