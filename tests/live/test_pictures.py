"""The still picture of a scene: everything stands where its numbers say."""

import io

import numpy as np
import pytest
from PIL import Image

from minianyflow.live import pictures
from minianyflow.live.player import Pack, time_axis
from minianyflow.support.figures import small_png

BLUE, WHITE, BLACK = (0, 114, 178), (255, 255, 255), (0, 0, 0)
CHART = {"kind": "chart", "xlabel": "t", "times": [1, 0.5, 0], "ticks": [0, 1], "limits": [0, 1]}


def drawn(panel, pack=None, note=""):
    """`at(x, y)`: the colour of a scene of one panel at a place of its data; and the figure."""
    pack, panel = pack or Pack(), {"title": "", "colour": "#0072b2", "times": [1.0, 0.0]} | panel
    figure = pictures.picture(pack.scene("", [panel], time_axis([1, 0]), note=note), pack.payload)
    pixels = np.asarray(Image.open(io.BytesIO(small_png(figure, 100))).convert("RGB"))

    def at(x, y):
        across, up = figure.axes[0].transData.transform((x, y))
        return tuple(int(part) for part in pixels[len(pixels) - 1 - int(up), int(across)])

    return at, figure


def near(colour, other):
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) < 40


def test_particles_trails_and_the_exact_flow_stand_where_they_are():
    pack = Pack()
    path = np.stack([np.zeros((3, 2)), [[1.0, -1.0], [-1.0, 1.0], [0.0, 1.5]]])
    exact = np.stack([np.full((3, 2), -1.5), np.full((3, 2), -0.5)])
    panel = pack.plane("", "#0072b2", path, [1, 0], exact, [[1.5, 1.5]], limit=2.0, followed=[0], trails=2)
    at, figure = drawn(panel, pack)
    assert len(figure.axes[0].lines) == 1 + 2 + 1  # the exact flow, two trails, one bold path
    for x, y, colour in (
        (1, -1, BLACK),  # the one that is followed
        (-1, 1, BLUE),
        (0, 1.5, BLUE),
        (1.5, 1.5, (200, 200, 200)),
        (0.5, -0.5, BLUE),  # half way along a bold path
        (-1, -1, (165, 165, 165)),  # along the exact one
        (0, 0.8, WHITE),
    ):
        assert near(at(x, y), colour), (x, y)


def test_jumps_stand_at_their_times():
    at, _ = drawn({"kind": "triangle", "chain": [1.0, 0.5, 0.0], "dots": [[0.75, 0.25]]})
    for t, r in ((1.0, 0.5), (0.5, 0.0), (1.0, 0.75), (0.75, 0.5)):  # two dots, and two places on the way between
        assert near(at(t, r), BLUE), (t, r)
    assert near(at(0.75, 0.25), (153, 153, 153))
    assert near(at(0.25, 0.1), WHITE)


def test_bars_and_lines_have_their_heights():
    pack = Pack()
    bars = [{"from": 1.0, "to": 0.0, "height": 0.3, "colour": "#444444"}]
    bars += [{"from": 1.0, "to": 0.5, "height": 0.6, "colour": "#0072b255"}]
    line = {"times": [1, 0], "colour": "#0072b2", "label": "level", "points": pack.add_points([0.8, 0.8])}
    at, figure = drawn(CHART | {"bars": bars, "lines": [line | {"dash": []}]}, pack)
    assert near(at(0.7, 0.5), [round(2 / 3 * 255 + part / 3) for part in BLUE])
    assert near(at(0.7, 0.15), [round(0x44 * 2 / 3 + part / 3) for part in BLUE])  # those behind are seen
    assert near(at(0.2, 0.15), (0x44, 0x44, 0x44))
    assert near(at(0.2, 0.5), WHITE)
    assert near(at(0.3, 0.8), BLUE)
    assert figure.axes[0].get_xlim() == (1, 0)  # time falls to the right
    covered = []
    for dash in ([], [7, 5], [2, 10]):
        at, _ = drawn(CHART | {"lines": [line | {"dash": dash}]}, pack)
        covered.append(sum(near(at(x, 0.8), BLUE) for x in np.linspace(0.01, 0.99, 400)) / 400)
    assert covered == pytest.approx([1, 7 / 12, 2 / 12], abs=0.12)


def test_measures_and_note_are_below_and_stay_inside():
    panel = {"kind": "triangle", "chain": [1, 0], "measures": {"path error": "0.1"}}
    none, four = (drawn(panel, note="every word of a note is there " * times)[1] for times in (0, 4))
    assert four.axes[0].get_xlabel() == "from t (1 is noise)\npath error: 0.1"
    assert four.get_figheight() > none.get_figheight()
    words = [text for text in four.texts if "every" in text.get_text()]
    assert [text.get_window_extent().x1 < four.bbox.x1 for text in words] == [True]


def test_later_frames_of_a_video_are_brighter():
    clips, pack = np.zeros((2, 3, 4, 4)), Pack()
    clips[0, 0, 0, 0] = clips[0, 2, 3, 3] = clips[1, 1, 0, 3] = 1.0
    at, figure = drawn({"kind": "video", "clips": pack.add_video(clips)}, pack)
    first, second, third = (at(*place)[0] for place in ((0, 0), (8, 0), (3, 3)))
    assert first < second < third
    assert third > 250
    assert near(at(4, 1), WHITE)  # the column between the clips
    assert pictures.EXPOSURE.split()[-1] in figure.texts[-1].get_text()
