"""What goes to the browser: every number survives, scene and bytes go together, bad input is one line."""

import re
import tomllib

import numpy as np
import pytest

from minianyflow.live.player import KINDS, STATIC, Pack, script, time_axis
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from tests.live.unpack import unpack

SCRIPT = script()


def scene_of(pack, **arrays):
    return pack.scene("test", [{"kind": "plane", "title": "", **arrays}], time_axis([1, 0]))


def test_numbers_come_back_as_they_are():
    pack, values = Pack(), np.random.default_rng(0).normal(size=(5, 7, 2)).astype(np.float32)
    for given in (values, np.arange(-3, 3).reshape(2, 3)):
        name = pack.add_exact(given)
        back = unpack(scene_of(pack, points=name), pack.payload, name)
        assert back.tolist() == given.tolist()
    with pytest.raises(InputError, match=r"expected \(n, T, H, W\)"):
        pack.add_video(np.zeros((3, 4, 4)))


def test_an_array_is_sent_once_and_a_scene_names_only_its_own():
    pack, clips = Pack(), np.random.default_rng(0).random((1, 3, 5, 5))
    video, first = pack.add_video(clips), pack.add_exact(np.ones((3, 2)))
    assert pack.add_exact(np.ones((3, 2))) == first
    assert pack.add_exact(2 * np.ones((3, 2))) != first
    assert pack.add_exact(np.ones((2, 3))) != first  # the same bytes in another shape
    arrays = scene_of(pack, clips=video, lines=[{"points": first}])["arrays"]
    assert set(arrays) == {video, first}
    assert all(array["offset"] % 4 == 0 for array in pack.arrays.values())  # or the browser cannot read numbers there
    assert len(pack.payload) == 76 + 3 * 24
    assert np.abs(unpack({"arrays": arrays}, pack.payload, video) - clips).max() < 0.04
    assert unpack({"arrays": arrays}, pack.payload, first).tolist() == np.ones((3, 2)).tolist()


def test_a_panel_that_nobody_can_draw_is_refused_and_both_sides_know_the_same():
    with pytest.raises(InputError, match=r"unknown kind of panel 'plan'.*'plane'"):
        Pack().scene("test", [{"kind": "plan"}], time_axis([1, 0]))
    known = re.search(r"const KINDS = \{ (.*?) \}", SCRIPT)[1]
    assert {kind.split(":")[0] for kind in known.split(", ")} == set(KINDS)


def test_the_browser_needs_nothing_but_these_files():
    style = (STATIC / "player.css").read_text()
    assert not re.search(r"https?:|\bimport\b|fetch\(|<script", SCRIPT)
    assert not re.search(r"url\(|@import", style)
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["minianyflow"]
    files = {path for pattern in packed for path in (ROOT / "minianyflow").glob(pattern)}
    assert {path for path in STATIC.rglob("*") if path.is_file()} <= files
