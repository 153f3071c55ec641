"""Weights that rest in CPU memory: which copies are on their way while which block computes."""

import pytest
import torch

from minianyflow.networks.blocks import checkpoint_blocks
from minianyflow.networks.patches import use_per_frame_modulation
from minianyflow.networks.resting import RestingBlocks
from minianyflow.networks.wan import WanNetwork, tiny_transformer
from minianyflow.support import host


@pytest.fixture
def events(monkeypatch):
    """What happens, in order: ("send", bytes) where a copy begins, ("there", bytes) where it is waited for."""
    seen, send = [], host.send

    def watched(stored, device):
        receive, number = send(stored, device), stored.data_ptr()
        seen.append(("send", number))
        return lambda: (seen.append(("there", number)), receive())[1]

    monkeypatch.setattr(host, "send", watched)
    return seen


def inputs(transformer):
    torch.manual_seed(0)
    z, t, r, prompt = torch.randn(1, 3, 4, 8, 8), torch.ones(1), torch.zeros(1), torch.randn(1, 4, 16)
    return z.requires_grad_(), t, r, prompt.requires_grad_()


def test_the_next_block_is_on_its_way_while_one_computes(events):
    """The embedder is block 0, recomputed last and only if it learns: it is never sent ahead in the backward."""
    transformer = use_per_frame_modulation(tiny_transformer().requires_grad_(False))
    z, *rest, prompt = inputs(transformer)
    WanNetwork(transformer)(z, *rest, prompt).square().sum().backward()
    expected = z.grad, prompt.grad
    z.grad = prompt.grad = None
    parts = [part.data_ptr() for part, _ in RestingBlocks(transformer, "cpu").blocks]
    checkpoint_blocks(transformer, embedder=True)
    out = WanNetwork(transformer)(z, *rest, prompt)
    there = [(what, parts.index(number)) for what, number in events]
    assert there == [("send", 0), *(pair for n in range(4) for pair in (("there", n), ("send", n + 1))), ("there", 4)]
    events.clear()
    out.square().sum().backward()
    there = [(what, parts.index(number)) for what, number in events]
    back = [("send", 4), *(pair for n in (4, 3, 2) for pair in (("there", n), ("send", n - 1))), ("there", 1)]
    assert there == [*back, ("send", 0), ("there", 0)]
    assert torch.equal(z.grad, expected[0])
    assert torch.equal(prompt.grad, expected[1])
    weights = (*transformer.blocks.parameters(), *transformer.condition_embedder.parameters())
    assert max(weight.untyped_storage().nbytes() for weight in weights) <= 4  # placeholders


def test_kept_inputs_come_back_one_ahead(events):
    """Of three, the third was dropped; the second is sent when it is needed, and the first while it is used."""
    stack, tensors = host.Stack(), torch.randn(3, 5)
    first, second, third = map(stack.store, tensors)
    places = [kept.stored.data_ptr() for kept in (first, second)]
    del third
    assert torch.equal(second.fetch(), tensors[1])
    assert [(what, places.index(number)) for what, number in events] == [("send", 1), ("there", 1), ("send", 0)]
    assert torch.equal(first.fetch(), tensors[0])
    assert [what for what, _ in events] == ["send", "there", "send", "there"]
    assert torch.equal(second.fetch(), tensors[1])  # again; the first has been there
    assert len(events) == 6
