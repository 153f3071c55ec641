"""What goes to the browser: every number survives, scene and bytes go together, bad input is one line."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from minianyflow.live.player import FARTHEST, KINDS, STATIC, Pack, Player, time_axis, unpacked
from minianyflow.support.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (STATIC / "player.js").read_text()


def scene_of(pack, **arrays):
    return pack.scene("test", [{"kind": "plane", "title": "", **arrays}], time_axis([1, 0]))


def test_points_come_back_to_within_half_a_step():
    values = np.random.default_rng(0).normal(size=(5, 7, 2))
    pack = Pack()
    name = pack.add_points(values)
    back = unpacked(scene_of(pack, points=name), pack.payload, name)
    assert back.shape == values.shape
    assert np.abs(back - values).max() <= 0.51 * FARTHEST / 32767
    assert np.abs(unpacked(scene_of(pack, points=name), pack.payload, name) - values[::-1]).max() > 1


def test_what_is_too_far_out_stays_at_the_edge_and_what_is_no_number_is_refused():
    pack = Pack()
    name = pack.add_points([[1e9, -1e9]])
    assert unpacked(scene_of(pack, points=name), pack.payload, name).tolist() == [pytest.approx([FARTHEST, -FARTHEST])]
    with pytest.raises(InputError, match="NaN or infinity"):
        pack.add_points([[np.nan, 0]])


def test_an_array_is_sent_once_and_a_scene_names_only_its_own():
    pack, clips = Pack(), np.random.default_rng(0).random((1, 3, 5, 5))
    video, first = pack.add_video(clips), pack.add_points(np.ones((3, 2)))
    assert pack.add_points(np.ones((3, 2))) == first
    assert pack.add_points(2 * np.ones((3, 2))) != first
    assert pack.add_points(np.ones((2, 3))) != first  # the same bytes in another shape
    told = scene_of(pack, clips=video, points=first)["arrays"]
    assert set(told) == {video, first}
    assert all(each["offset"] % 2 == 0 for each in pack.arrays.values())  # or the browser cannot read 16-bit numbers
    assert len(pack.payload) == 76 + 3 * 12
    back = unpacked({"arrays": told}, pack.payload, video)
    assert np.abs(back - clips).max() < 0.04
    assert unpacked({"arrays": told}, pack.payload, first).tolist() == pytest.approx(np.ones((3, 2)), abs=1e-3)


def test_scene_and_bytes_travel_in_one_message(monkeypatch):
    player, sent = Player(), []
    monkeypatch.setattr(Player, "send_state", lambda self, key=None: sent.append(set(key)))
    pack = Pack()
    told = scene_of(pack, points=pack.add_points(np.ones((2, 3, 2))))
    player.show(told, pack.payload)
    assert sent == [{"scene", "payload"}]
    player.show(told, pack.payload)
    assert player.scene["serial"] == 2  # the browser draws again, though nothing else changed


def test_a_panel_that_nobody_can_draw_is_refused_and_both_sides_know_the_same():
    with pytest.raises(InputError, match=r"unknown kind of panel 'plan'.*'plane'"):
        Pack().scene("test", [{"kind": "plan"}], time_axis([1, 0]))
    known = re.search(r"const KINDS = \{ (.*?) \}", SCRIPT)[1]
    assert {each.split(":")[0] for each in known.split(", ")} == set(KINDS)
    with pytest.raises(InputError, match="unknown array"):
        unpacked({"arrays": {"a0": {}}}, b"", "b0")


def test_the_browser_needs_nothing_but_these_files():
    assert not re.search(r"https?:|\bimport\b|fetch\(|<script", SCRIPT)
    assert not re.search(r"url\(|@import", (STATIC / "player.css").read_text())
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for glob in data["minianyflow"] for path in (ROOT / "minianyflow").glob(glob)}
    assert {path for path in STATIC.rglob("*") if path.is_file()} <= packed
    assert {STATIC / "player.js", STATIC / "player.css"} <= packed


def test_no_words_are_small():
    """Those of the app and of the pages grow with the window besides: test_browser.py measures them."""
    sizes = re.findall(r"(\d+)px[^;]*system-ui", SCRIPT + (STATIC / "player.css").read_text())
    assert len(sizes) >= 4
    assert min(map(int, sizes)) >= 16
