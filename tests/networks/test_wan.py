"""Wan transformers as u(Z, t, r, prompt): Wan itself on the diagonal, and off it only what training puts there."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from minianyflow.flow_map import velocity
from minianyflow.networks import wan
from minianyflow.networks.wan import PROMPT_LENGTH, TINY, TextEncoder, WanNetwork, tiny_transformer
from tests.networks.inputs import R, T, clip
from tests.refused import refused

PROMPTS = ["one ball", "two balls"]


@pytest.fixture(scope="module")
def text():
    return TextEncoder()


@pytest.fixture(scope="module")
def prompt(text):
    return text(PROMPTS)


@pytest.fixture(scope="module")
def network():
    return WanNetwork(tiny_transformer()).eval().requires_grad_(False)


Z = clip(5)


def test_on_the_diagonal_it_is_stock_wan(network, prompt):
    """Embedder copied, r = t: diffusers' WanTransformer3DModel with the same weights, which has no target time."""
    stock = WanTransformer3DModel(**TINY).eval()
    shared = {name: value for name, value in network.transformer.state_dict().items() if "delta_embedder" not in name}
    stock.load_state_dict(shared)  # strict: nothing else differs
    with torch.no_grad():
        expected = stock(Z.transpose(1, 2), 1000 * T, prompt, return_dict=False)[0].transpose(1, 2)
    out = velocity(network, Z, T, prompt=prompt)
    assert out.shape == Z.shape
    assert float((out - expected).abs().max()) < 1e-5
    assert float(out.abs().max()) > 0.1


def test_the_target_time_matters_through_its_embedder_alone(network, prompt):
    assert float((network(Z, T, R, prompt) - network(Z, T, T, prompt)).abs().max()) > 1e-3
    deaf = WanNetwork(tiny_transformer()).requires_grad_(False)
    deaf.transformer.condition_embedder.delta_embedder.linear_1.weight.zero_()
    assert torch.equal(deaf(Z, T, R, prompt), deaf(Z, T, T, prompt))


def test_a_time_for_a_sample_is_that_time_for_each_of_its_frames(network, prompt):
    frames = (T[:, None].expand(2, 5), R[:, None].expand(2, 5))
    one = network(Z, T, R, prompt)
    assert torch.allclose(one, network(Z, *frames, prompt), atol=1e-6)
    assert torch.allclose(one, network(Z, T, frames[1], prompt), atol=1e-6)
    later = frames[0].clone()
    later[:, 2] = 0.1
    assert not torch.allclose(one, network(Z, later, frames[1], prompt), atol=1e-3)  # and frames may differ


def test_rows_do_not_see_each_other_and_prompts_matter(network, text):
    one, two = network(Z, T, R, text(PROMPTS)), network(Z, T, R, text(PROMPTS[::-1]))
    assert torch.allclose(network(Z[1:], T[1:], R[1:], text(PROMPTS[1:])), one[1:], atol=1e-5)
    assert not torch.allclose(one, two, atol=1e-4)


def test_text_is_padded_with_zeros_and_always_the_same(text):
    prompts = [*PROMPTS, "", "three moving left"]
    embeddings = text(prompts)
    assert embeddings.shape == (4, PROMPT_LENGTH, TINY["text_dim"])
    for prompt, rows in zip(prompts, embeddings, strict=True):
        length = len(prompt.split()) + 1  # the end token
        assert bool((rows[:length].norm(dim=1) > 0.1).all())
        assert not bool(rows[length:].any())
    assert torch.equal(TextEncoder()(prompts), embeddings)
    assert torch.allclose(text(prompts[1:2]), embeddings[1:2], atol=1e-6)
    words = text(wan.WORDS).flatten(1)
    assert float((torch.cdist(words, words) + 10 * torch.eye(len(words))).min()) > 0.1  # all of them differ


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 5, 4, 4), r"latents \(2, 4, 5, 4, 4\); expected \(B, F, 4, H, W\)"),  # frames and channels exchanged
        ((2, 4, 4, 4), r"expected \(B, F, 4, H, W\)"),
        ((2, 5, 4, 5, 4), "latents of 5 x 4; expected a size that patches 2 x 2 divide"),
        ((2, 5, 4, 4, 7), "latents of 4 x 7; expected a size that patches 2 x 2 divide"),
    ],
)
def test_latents_that_do_not_fit_are_one_line(network, prompt, shape, message):
    with refused(message):
        network(torch.zeros(shape), T, R, prompt)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 4), (2, 5, 1)])
def test_times_that_do_not_fit_are_one_line(network, prompt, shape):
    for times in ((torch.zeros(shape), R), (T, torch.zeros(shape))):
        with refused(r"for latents \(2, 5, 4, 4, 4\); expected \(B,\) or \(B, F\)"):
            network(Z, *times, prompt)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["one dog"], "prompt 'one dog': the word 'dog' is not known; expected at most 3 of the words one, two"),
        (["one ball", "One ball"], "the word 'One' is not known"),
        (["one ball one ball"], "4 words; expected at most 3"),
        ("one ball", r"^prompts .*; expected a list of texts, such as \['one ball'\]$"),
        ([None], "expected a list of texts"),
        (["one ball", 2], "expected a list of texts"),
    ],
)
def test_prompts_it_does_not_know_are_one_line(text, prompts, message):
    with refused(message):
        text(prompts)
