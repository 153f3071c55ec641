"""Contact sheets, players and curves show what they are given, and stay small."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from minianyflow.support.errors import InputError
from minianyflow.support.figures import contact_sheet, save_figure
from minianyflow.times import generator
from minianyflow.video.figures import animated_png, any_step_curves, player
from toy_data import blobs

REPORT = {
    "methods": {
        "teacher": {"nfe": [1, 4, 16], "sliced_w2": [[1.0, 0.4, 0.1]], "light": [[0.9, 1.0, 1.0]]},
        "mixed": {"nfe": [1, 4, 16], "sliced_w2": [[0.2, 0.1, 0.1], [0.4, 0.3, 0.1]], "seconds": 7.0},
        "on_policy": {"nfe": [1, 4], "sliced_w2": [[0.1, None]]},
    },
    "floors": {"codec_against_data": {"sliced_w2": 0.05}, "data_against_data": {"light": 1.0}},
}


@pytest.fixture(scope="module")
def video():
    return blobs.sample(8, generator(0)).video


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_contact_sheet_has_a_block_per_title_and_in_it_a_row_per_label(video, tmp_path):
    rows, titles = {"data": video, "dimmed": 0.7 * video}, ("one", "two", "$ " * 200)
    figure = contact_sheet(rows, titles, stills=3)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 6
    assert np.allclose(shown[1][:, 17:33], video[1, 8])  # row 0, clip 1, second still
    assert np.allclose(shown[3][:, 34:], 0.7 * video[0, 16])
    assert (shown[0][:, 16] == 1).all()  # the gap
    assert save_figure(figure, tmp_path / "sheet.png").stat().st_size < 80_000
    figure = contact_sheet({"colour": np.ones((3, 1, 4, 8, 3))}, titles, columns=2)
    assert [axes.get_title().count("\n") > 1 for axes in figure.axes] == [False, False, True, False]
    assert [axes.get_ylabel() for axes in figure.axes] == ["colour", "", "colour", ""]
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]  # no fourth block
    assert figure.axes[2].images[0].get_array().shape == (4, 8, 3)  # of one frame one still
    assert [tick.get_text() for tick in figure.axes[2].get_xticklabels()] == ["0"]


def test_a_player_plays_every_frame_of_every_clip(video):
    data = animated_png(video, scale=6, fps=8)
    assert len(data) < 150_000
    film = Image.open(io.BytesIO(data))
    assert (film.n_frames, film.info["loop"]) == (17, 0)
    durations = []
    for k in range(17):
        film.seek(k)
        durations.append(film.info["duration"])
        pixels = np.asarray(film.convert("L"), dtype=float) / 255
        tile = pixels[3:96:6, 3 * 102 + 3 : 3 * 102 + 96 : 6]  # the middles of the pixels of clip 3
        assert np.abs(tile - video[3, k].numpy()).max() < 0.01
    assert durations == [125.0] * 16 + [625.0]


def test_a_player_has_rows_with_labels_and_is_embedded_in_a_notebook(video):
    alone = Image.open(io.BytesIO(animated_png(video, columns=2)))
    both = Image.open(io.BytesIO(animated_png({"data": video, "codec": video}, ["one", "two"], columns=2)))
    assert both.width > alone.width
    assert both.height > 2 * (alone.height - 10)
    image = player(video)
    assert (image.format, image.embed) == ("png", True)  # nbconvert and GitHub show PNG, and leave a GIF out


def test_curves_show_the_mean_the_range_and_the_floors():
    axes = any_step_curves(REPORT, "sliced_w2").axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert np.allclose(lines["flow map, mixed"], [0.3, 0.2, 0.1])
    assert lines["codec against data"][0] == 0.05
    assert "data against data" not in lines
    bars = axes.collections[1].get_segments()
    assert np.allclose(bars[1][:, 1], [0.1, 0.3])
    assert axes.get_yscale() == "log"
    colours = [line.get_color() for line in axes.lines[:3]]
    assert len(set(colours)) == 3
    assert any_step_curves(REPORT, "light").axes[0].get_yscale() == "linear"
    methods = {"mixed": {"nfe": [1, 2], "from_ideal": [[0.8, 0.07]]}}
    floors = {"data": {"from_ideal": 0.0}, "codec": {"from_ideal": 0.05}}
    axes = any_step_curves({"methods": methods, "floors": floors}, "from_ideal").axes[0]
    assert axes.get_yscale() == "log"  # in spite of a floor of 0, which is named
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert (lines["codec"][0], len(lines["data: 0"])) == (0.05, 0)


@pytest.mark.parametrize(
    ("name", "evaluations", "label"),
    [
        ("mixed", None, "steps (network evaluations)"),
        ("mixed", [[1.0, 4.0, 16.0]], "steps (network evaluations)"),
        ("guided", [[2.0, 8.0, 32.0]], "steps"),
        ("causal", None, "steps"),
    ],
)
def test_the_axis_says_evaluations_only_where_steps_are_that(name, evaluations, label):
    method = REPORT["methods"]["mixed"] | ({"evaluations": evaluations} if evaluations else {})
    report = REPORT | {"methods": {"teacher": REPORT["methods"]["teacher"], name: method}}
    assert any_step_curves(report, "sliced_w2").axes[0].get_xlabel() == label


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda v: contact_sheet({"data": v[:1]}, ("one", "two")), "'data' of shape .* n at least 2"),
        (lambda v: animated_png(v[0]), "expected"),
        (lambda v: animated_png({"a": v, "b": v[:, :5]}), "one shape"),
        (lambda v: animated_png(torch.zeros(0, 5, 16, 16)), "n at least 1"),
        (lambda v: any_step_curves(REPORT, "slice_w2"), "did you mean 'sliced_w2'"),
    ],
)
def test_bad_input_is_one_clear_line(video, call, match):
    with pytest.raises(InputError, match=match):
        call(video)
