"""Measures of long clips on the circle: exact clips read the floor, and what collapses or forgets is caught."""

import pytest
import torch

from minianyflow.plane import exposure
from minianyflow.plane.circle_measures import exact_clips, fit_speed, measure_clips
from minianyflow.plane.circle_student import WINDOW, CausalMLP
from minianyflow.times import generator
from toy_data.circle import SPEEDS, CircleProcess

PROCESS, FRAMES = CircleProcess(), (16, 64)


def long_clips(speeds, frames=64):
    """Lawful clips of these speeds (C,): uniform motion and the process's blur."""
    angle = torch.rand(len(speeds), 1, generator=generator(0)) * 6.283 + speeds[:, None] * torch.arange(frames)
    clips = torch.stack([angle.cos(), angle.sin()], -1)
    return clips + PROCESS.clips.sigma * torch.randn(clips.shape, generator=generator(1))


def test_the_fit_is_the_nearest_uniform_motion():
    clips = PROCESS.clips.sample(8, generator(2))
    phases = torch.arange(4096) * (2 * torch.pi / 4096)
    angle = phases[:, None, None] + torch.tensor(SPEEDS)[:, None] * torch.arange(16)  # (phases, speeds, frames)
    motions = torch.stack([angle.cos(), angle.sin()], -1)
    distance = (clips[:, None, None] - motions).square().sum((-1, -2)).amin(1)  # (clips, speeds)
    speed, left = fit_speed(clips)
    assert torch.equal(speed, distance.argmin(1))
    assert torch.allclose(left.float(), distance.amin(1), atol=1e-4)


def test_exact_clips_read_the_floor():
    """Each frame from its exact law, given the four before it: four frames of past lose nothing."""
    floor = measure_clips(exact_clips(CircleProcess(phases=128), 512, 64, WINDOW), PROCESS, FRAMES)
    assert max(floor["sliced_w2"]) < 0.12  # .05
    assert max(floor["tv"]) < 0.15  # .04 of 512 draws of six speeds
    assert min(floor["kept"]) > 0.97
    assert min(floor["whole"]) > 0.8
    assert max(floor["lost"]) == 0


@pytest.mark.parametrize(
    ("clips", "caught"),
    [
        (long_clips(torch.full((512,), 0.4)), {"tv": (0.83, 0.84), "kept": (1, 1), "whole": (0.95, 1)}),
        (long_clips(torch.tensor(SPEEDS).repeat(86))[:, torch.randperm(64, generator=generator(3))], {"whole": (0, 0)}),
        (2 * long_clips(torch.tensor(SPEEDS).repeat(86)), {"lost": (1, 1), "whole": (0, 0), "tv": (0, 0.02)}),
    ],
    ids=["one speed", "shuffled frames", "off the circle"],
)
def test_collapsed_shuffled_and_lost_clips_are_caught(clips, caught):
    figures = measure_clips(clips, PROCESS, FRAMES)
    for name, (low, high) in caught.items():
        assert all(low - 1e-4 <= value <= high + 1e-4 for value in figures[name]), (name, figures[name])


def test_a_clip_that_forgets_its_speed_is_caught():
    one, other = (long_clips(torch.tensor(SPEEDS).repeat(86)[order]) for order in torch.arange(516).repeat(2, 1))
    clips = torch.cat([one[:, :32], other.roll(1, 0)[:, 32:]], 1)  # at another of the six from frame 32 on
    figures = measure_clips(clips, PROCESS, FRAMES)
    assert figures["kept"] == [1, 0]
    assert figures["sliced_w2"][1] < 0.12  # the law of windows is data's: sliced W2 does not see it
    assert min(figures["whole"]) > 0.95


def test_a_turned_student_turns_with_its_past():
    u, clips = CausalMLP(width=8, turned=True), PROCESS.clips.sample(6, generator(4))
    z, t, frame = torch.randn(6, 2), torch.full((6,), 0.7), torch.tensor([1, 2, 4, 8, 12, 15])
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert torch.allclose(u(z @ turn, t, 0 * t, clips @ turn, frame), u(z, t, 0 * t, clips, frame) @ turn, atol=1e-5)
    plain = CausalMLP(width=8)
    moved = plain(z @ turn, t, 0 * t, clips @ turn, frame) - plain(z, t, 0 * t, clips, frame) @ turn
    assert float(moved.abs().max()) > 1e-3


def test_a_student_is_measured_by_seed_and_the_committed_ones_read_what_the_report_says(monkeypatch):
    monkeypatch.setattr(exposure, "LONG_CLIPS", 256)
    long = exposure.measure_long(exposure.STUDENTS, ("on-policy",), 2, (16, 64), (1,))
    by_seed = long["arms"]["on-policy"]["1"]
    assert len(by_seed) == 2
    assert all(min(figures["tv"]) > 0.7 for figures in by_seed)  # one speed of six is left
