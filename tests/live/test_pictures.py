"""The still picture of a scene: everything stands where its numbers say."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minianyflow.live import stills
from minianyflow.live.player import Pack, time_axis

BLUE = (0, 114, 178)


def drawn(panel, **arrays):
    """The pixels of one panel, (PANEL, PANEL, 3), x to the right and y up, each in 0 to 1 by `at`."""
    pack = Pack()
    named = {name: getattr(pack, add)(values) for name, (add, values) in arrays.items()}
    panel = {"title": "", "colour": "#0072b2", "times": [1.0, 0.0], **panel, **named}
    scene = pack.scene("", [panel], time_axis([1, 0]))
    image = np.asarray(stills.still(scene, pack.payload))
    wide = image.shape[1] - 2 * stills.GAP
    return image[3 * stills.LINE :, stills.GAP : stills.GAP + wide]


def at(pixels, x, y, size=stills.PANEL):
    return tuple(int(each) for each in pixels[round((1 - y) * size), round(x * size)])


def near(colour, other):
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) < 40


def test_particles_trails_and_the_exact_flow_stand_where_they_are():
    ends = [[1.0, -1.0], [-1.0, 1.0], [0.0, 1.5]]
    paths = np.stack([np.zeros((3, 2)), ends])
    panel = {"kind": "plane", "limit": 2.0, "followed": [0], "trails": 2}
    exact = np.stack([np.full((3, 2), -1.5), np.full((3, 2), -0.5)])
    pixels = drawn(
        panel, points=("add_points", paths), ghosts=("add_points", [[1.5, 1.5]]), exact=("add_points", exact)
    )
    assert near(at(pixels, 0.75, 0.25), (0, 0, 0))  # the one that is followed
    assert near(at(pixels, 0.25, 0.75), BLUE)
    assert near(at(pixels, 0.5, 0.875), BLUE)
    assert near(at(pixels, 0.875, 0.875), (200, 200, 200))
    assert near(at(pixels, 0.625, 0.375), BLUE)  # half way along a bold path
    assert near(at(pixels, 0.25, 0.25), (165, 165, 165))  # along the exact one
    assert near(at(pixels, 0.5, 0.7), (255, 255, 255))  # the third particle leaves no trail


def test_jumps_stand_at_their_times():
    pixels = drawn({"kind": "triangle", "chain": [1.0, 0.5, 0.0]})
    blue = np.argwhere(np.abs(pixels[: stills.PANEL].astype(int) - BLUE).max(-1) < 30)
    (top, left), (bottom, right) = blue.min(0), blue.max(0)
    side = right - 7 - left  # a dot on the right reaches 7 pixels beyond t = 1, one at the bottom beyond r = 0
    assert bottom - 7 - top == pytest.approx(side, abs=2)
    for t, r in ((1.0, 0.5), (0.5, 0.0)):
        spot = pixels[round(bottom - 7 - r * side), round(left + t * side)]
        assert near(spot, BLUE), (t, r)


def test_bars_and_lines_have_their_heights():
    bars = [{"from": 1.0, "to": 0.5, "height": 0.5, "colour": "#0072b2"}]
    panel = {"kind": "chart", "xlabel": "t", "times": [1, 0.5, 0], "ticks": [0, 1], "limits": [0, 1], "bars": bars}
    pixels = drawn(panel)[: stills.PANEL]
    blue = np.argwhere(np.abs(pixels.astype(int) - BLUE).max(-1) < 30)
    height, width = np.ptp(blue, axis=0)
    assert height == pytest.approx((stills.PANEL - 58) / 2, abs=3)
    assert width == pytest.approx((stills.PANEL - 66) / 2, abs=4)
    assert blue[:, 1].max() < stills.PANEL * 0.6  # time falls to the right
    pack = Pack()
    covered = []
    for dash in ([], [7, 5], [2, 10]):
        line = {"points": pack.add_points([0.5, 0.5]), "times": [1, 0], "colour": "#0072b2", "dash": dash, "label": ""}
        scene = pack.scene("", [panel | {"bars": [], "lines": [line]} | {"title": ""}], time_axis([1, 0]))
        pixels = np.asarray(stills.still(scene, pack.payload)).astype(int)
        covered.append((np.abs(pixels - BLUE).max(-1) < 60).sum())
    assert covered[1] == pytest.approx(covered[0] * 7 / 12, rel=0.15)
    assert covered[2] == pytest.approx(covered[0] * 2 / 12, rel=0.4)


def test_bars_above_others_let_them_be_seen():
    bars = [
        {"from": 1.0, "to": 0.0, "height": height, "colour": colour}
        for height, colour in ((0.5, "#444444"), (1, "#0072b255"))
    ]
    panel = {"kind": "chart", "xlabel": "t", "times": [1, 0.5, 0], "ticks": [0, 1], "limits": [0, 1], "bars": bars}
    pixels = drawn(panel)[: stills.PANEL]
    assert near(at(pixels, 0.6, 0.8), stills._pale("#0072b2", 1 / 3))
    blended = [round(0x44 * 2 / 3 + part / 3) for part in BLUE]
    assert near(at(pixels, 0.6, 0.3), blended)
    assert not near(blended, stills._pale("#0072b2", 1 / 3))


def test_the_note_is_below_and_stays_inside():
    words = "every word of a note is there "
    pack = Pack()
    panel = {"kind": "triangle", "title": "", "colour": "#0072b2", "chain": [1, 0]}
    scenes = [pack.scene("", [panel], time_axis([1, 0]), note=words * times) for times in (0, 1, 4)]
    none, one, four = (np.asarray(stills.still(scene, b"")) for scene in scenes)
    assert len(none) < len(one) < len(four)
    assert (none == one[: len(none)]).all()
    assert (four[len(none) :] < 128).sum() > 2.5 * (one[len(none) :] < 128).sum() > 0
    assert (four[len(none) :, -stills.GAP // 2 :] == 255).all()  # no line reaches the edge


def test_later_frames_of_a_video_are_brighter():
    clips = np.zeros((2, 3, 4, 4))
    clips[0, 0, 0, 0] = clips[0, 2, 3, 3] = clips[1, 1, 0, 3] = 1.0
    pack = Pack()
    panel = {"kind": "video", "title": "", "clips": pack.add_video(clips)}
    image = np.asarray(stills.still(pack.scene("", [panel], time_axis([0, 2])), pack.payload))
    tile = image[3 * stills.LINE :, stills.GAP :, 0]
    pixel = stills.CLIPS / 9  # two clips and a column between them

    def seen(row, column):
        return int(tile[int((row + 0.5) * pixel), int((column + 0.5) * pixel)])

    assert seen(0, 0) < seen(0, 8) < seen(3, 3)
    assert seen(3, 3) > 250
    assert seen(1, 4) == 255  # the column


def test_a_png_has_few_colours_and_the_first_picture_needs_no_matplotlib():
    code = (
        "import sys; from minianyflow.live import scenes; scene = scenes.race(); "
        "sys.stdout.buffer.write(scene.png()); "
        "assert not {'matplotlib', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    picture = Image.open(io.BytesIO(done.stdout))
    assert picture.width > 1000
    assert len(picture.getcolors()) <= 64
