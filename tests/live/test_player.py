"""What goes to the browser: every number survives, scene and bytes go together, bad input is one line."""

import re
import tomllib

import numpy as np
import pytest

from minianyflow.live.player import KINDS, LARGEST, STATIC, Pack, script, time_axis, unpack
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT

SCRIPT = script()


def scene_of(pack, **arrays):
    return pack.scene("test", [{"kind": "plane", "title": "", **arrays}], time_axis([1, 0]))


def test_points_come_back_to_within_half_a_step_and_far_ones_at_the_edge():
    values = np.random.default_rng(0).normal(size=(5, 7, 2))
    values[0, 0] = 1e9, -1e9
    pack = Pack()
    name = pack.add_points(values)
    back = unpack(scene_of(pack, points=name), pack.payload, name)
    assert back.shape == values.shape
    assert np.abs(back - values.clip(-LARGEST, LARGEST)).max() <= 0.51 * LARGEST / 32767
    assert np.abs(back - values[::-1]).max() > 1
    with pytest.raises(InputError, match="NaN or infinity"):
        pack.add_points([[np.nan, 0]])
    with pytest.raises(InputError, match=r"expected \(n, T, H, W\)"):
        pack.add_video(np.zeros((3, 4, 4)))


def test_an_array_is_sent_once_and_a_scene_names_only_its_own():
    pack, clips = Pack(), np.random.default_rng(0).random((1, 3, 5, 5))
    video, first = pack.add_video(clips), pack.add_points(np.ones((3, 2)))
    assert pack.add_points(np.ones((3, 2))) == first
    assert pack.add_points(2 * np.ones((3, 2))) != first
    assert pack.add_points(np.ones((2, 3))) != first  # the same bytes in another shape
    arrays = scene_of(pack, clips=video, lines=[{"points": first}])["arrays"]
    assert set(arrays) == {video, first}
    assert all(array["offset"] % 4 == 0 for array in pack.arrays.values())  # or the browser cannot read numbers there
    assert len(pack.payload) == 76 + 3 * 12
    assert np.abs(unpack({"arrays": arrays}, pack.payload, video) - clips).max() < 0.04
    assert unpack({"arrays": arrays}, pack.payload, first).tolist() == pytest.approx(np.ones((3, 2)), abs=1e-3)


def test_a_panel_that_nobody_can_draw_is_refused_and_both_sides_know_the_same():
    with pytest.raises(InputError, match=r"unknown kind of panel 'plan'.*'plane'"):
        Pack().scene("test", [{"kind": "plan"}], time_axis([1, 0]))
    known = re.search(r"const KINDS = \{ (.*?) \}", SCRIPT)[1]
    assert {kind.split(":")[0] for kind in known.split(", ")} == set(KINDS)
    with pytest.raises(InputError, match="unknown array"):
        unpack({"arrays": {"a0": {}}}, b"", "b0")


def test_the_browser_needs_nothing_but_these_files():
    style = (STATIC / "player.css").read_text()
    assert not re.search(r"https?:|\bimport\b|fetch\(|<script", SCRIPT)
    assert not re.search(r"url\(|@import", style)
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["minianyflow"]
    files = {path for pattern in packed for path in (ROOT / "minianyflow").glob(pattern)}
    assert {path for path in STATIC.rglob("*") if path.is_file()} <= files
