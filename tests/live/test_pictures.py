"""The still picture of a scene: everything stands where its numbers say."""

import numpy as np
import pytest

from minianyflow.live import pictures
from minianyflow.live.player import Pack, time_axis

BLUE, WHITE = (0, 114, 178), (255, 255, 255)
CHART = {"kind": "chart", "xlabel": "t", "times": [1, 0.5, 0], "ticks": [0, 1], "limits": [0, 1]}


def drawn(panel, pack=None, note=""):
    """The pixels of a scene of one panel."""
    pack, panel = pack or Pack(), {"title": "", "colour": "#0072b2", "times": [1.0, 0.0]} | panel
    scene = pack.scene("", [panel], time_axis([1, 0]), note=note)
    return np.asarray(pictures.picture(scene, pack.payload))


def panel_of(image):
    """The pixels of its panel, (PANEL, PANEL, 3)."""
    top = 3 * pictures.LINE
    return image[top : top + pictures.PANEL, pictures.GAP : pictures.GAP + pictures.PANEL]


def at(pixels, x, y):
    """A pixel; x to the right and y up, in 0 to 1."""
    return tuple(int(part) for part in pixels[round((1 - y) * pictures.PANEL), round(x * pictures.PANEL)])


def near(colour, other):
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) < 40


def blue_in(pixels):
    """Where it is blue: (top, left), (bottom, right)."""
    places = np.argwhere(np.abs(pixels.astype(int) - BLUE).max(-1) < 30)
    return places.min(0), places.max(0)


def test_particles_trails_and_the_exact_flow_stand_where_they_are():
    pack = Pack()
    path = np.stack([np.zeros((3, 2)), [[1.0, -1.0], [-1.0, 1.0], [0.0, 1.5]]])
    exact = np.stack([np.full((3, 2), -1.5), np.full((3, 2), -0.5)])
    panel = pack.plane("", "#0072b2", path, [1, 0], exact, [[1.5, 1.5]], limit=2.0, followed=[0], trails=2)
    pixels = panel_of(drawn(panel, pack))
    for x, y, colour in (
        (0.75, 0.25, (0, 0, 0)),  # the one that is followed
        (0.25, 0.75, BLUE),
        (0.5, 0.875, BLUE),
        (0.875, 0.875, (200, 200, 200)),
        (0.625, 0.375, BLUE),  # half way along a bold path
        (0.25, 0.25, (165, 165, 165)),  # along the exact one
        (0.5, 0.7, WHITE),  # the third particle leaves no trail
    ):
        assert near(at(pixels, x, y), colour), (x, y)


def test_jumps_stand_at_their_times():
    pixels = panel_of(drawn({"kind": "triangle", "chain": [1.0, 0.5, 0.0]}))
    (top, left), (bottom, right) = blue_in(pixels)
    side = right - 7 - left  # a dot on the right reaches 7 pixels beyond t = 1, one at the bottom beyond r = 0
    assert bottom - 7 - top == pytest.approx(side, abs=2)
    for t, r in ((1.0, 0.5), (0.5, 0.0)):
        assert near(pixels[round(bottom - 7 - r * side), round(left + t * side)], BLUE), (t, r)


def test_bars_and_lines_have_their_heights():
    bar = {"from": 1.0, "to": 0.5, "height": 0.5, "colour": "#0072b2"}
    (top, left), (bottom, right) = blue_in(panel_of(drawn(CHART | {"bars": [bar]})))
    assert bottom - top == pytest.approx((pictures.PANEL - 58) / 2, abs=3)
    assert right - left == pytest.approx((pictures.PANEL - 66) / 2, abs=4)
    assert right < pictures.PANEL * 0.6  # time falls to the right
    covered = []
    for dash in ([], [7, 5], [2, 10]):
        pack = Pack()
        line = {"points": pack.add_points([0.5, 0.5]), "times": [1, 0], "colour": "#0072b2", "dash": dash, "label": ""}
        pixels = drawn(CHART | {"lines": [line]}, pack).astype(int)
        covered.append((np.abs(pixels - BLUE).max(-1) < 60).sum())
    assert covered[1] == pytest.approx(covered[0] * 7 / 12, rel=0.15)
    assert covered[2] == pytest.approx(covered[0] * 2 / 12, rel=0.4)


def test_bars_on_top_of_others_let_them_be_seen():
    both = ((0.5, "#444444"), (1, "#0072b255"))
    bars = [{"from": 1.0, "to": 0.0, "height": height, "colour": colour} for height, colour in both]
    pixels = panel_of(drawn(CHART | {"bars": bars}))
    blended = [round(0x44 * 2 / 3 + part / 3) for part in BLUE]
    assert near(at(pixels, 0.6, 0.8), pictures._pale("#0072b2", 1 / 3))
    assert near(at(pixels, 0.6, 0.3), blended)
    assert not near(blended, pictures._pale("#0072b2", 1 / 3))


def test_the_note_is_below_and_stays_inside():
    panel = {"kind": "triangle", "chain": [1, 0]}
    none, one, four = (drawn(panel, note="every word of a note is there " * times) for times in (0, 1, 4))
    assert len(none) < len(one) < len(four)
    assert (none == one[: len(none)]).all()
    assert (four[len(none) :] < 128).sum() > 2.5 * (one[len(none) :] < 128).sum() > 0
    assert (four[len(none) :, -pictures.GAP // 2 :] == 255).all()  # no line reaches the edge


def test_later_frames_of_a_video_are_brighter():
    clips, pack = np.zeros((2, 3, 4, 4)), Pack()
    clips[0, 0, 0, 0] = clips[0, 2, 3, 3] = clips[1, 1, 0, 3] = 1.0
    tile = drawn({"kind": "video", "clips": pack.add_video(clips)}, pack)[3 * pictures.LINE :, pictures.GAP :, 0]
    pixel = pictures.CLIPS / 9  # two clips and a column between them

    def seen(row, column):
        return int(tile[int((row + 0.5) * pixel), int((column + 0.5) * pixel)])

    assert seen(0, 0) < seen(0, 8) < seen(3, 3)
    assert seen(3, 3) > 250
    assert seen(1, 4) == 255  # the column
