"""Frames per second that a stream could reach: by hand, and as published."""

import json

import pytest

from minianyflow.planner.stream import chunk_flop, rate
from minianyflow.support.install import ROOT
from minianyflow.wan.shapes import SHAPES

PUBLISHED = json.loads((ROOT / "docs/plan/stream.json").read_text())


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_step_is_what_its_layers_say(size):
    """Products of matrices counted by hand: three frames of 30 x 52 patches see sixteen, all but two chunks coarse."""
    shape, new, text = SHAPES[size], 3 * 30 * 52, 512
    wide = shape["num_attention_heads"] * shape["attention_head_dim"]
    keys = new + 2 * new + 10 * 15 * 26  # its own chunk, two in full, ten coarse frames
    layers = 2 * new * (6 * wide**2 + 2 * wide * shape["ffn_dim"]) + 2 * text * 2 * wide**2
    attention = 4 * new * (keys + text) * wide
    assert PUBLISHED[size]["step"] == pytest.approx(shape["num_layers"] * (layers + attention), rel=0.02)
    numbers = 2 * shape["num_layers"] * (keys - new) * wide  # keys and values, two bytes each
    assert PUBLISHED[size]["bytes"]["cache"] == pytest.approx(2 * numbers, rel=0.01)


def test_steps_cost_what_they_add():
    chunk = {"cache": 6.0, "step": 2.0, "frames": 12}
    assert rate(chunk, 1, 16.0) == pytest.approx(12)
    assert rate(chunk, 4, 14.0, share=1.0) == pytest.approx(12)


@pytest.mark.long
def test_what_is_published_is_what_is_counted():
    assert chunk_flop("1.3b") == PUBLISHED["1.3b"]
