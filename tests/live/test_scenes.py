"""Scenes without a browser: their controls, their picture, and what a kernel still draws (the stream)."""

import base64
import io
import json

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from benchmarks.browser import write_notebook
from docs import course
from minianyflow import generator
from minianyflow.live import scenes
from minianyflow.support.errors import InputError
from tests.live.unpack import unpack

NAMES = [pytest.param(name, marks=pytest.mark.slow if name in ("video", "stream") else ()) for name in scenes.SCENES]
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def opened():
    """Every scene is opened once; a test that moves its controls puts them back."""
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, scenes.open_scene(name))


def array(scene, panel, key="points"):
    return torch.tensor(unpack(scene.shown, scene.picture, scene.shown["panels"][panel][key]))


@pytest.mark.parametrize("name", NAMES)
def test_a_scene_leaves_a_small_picture_and_hands_its_page_whole_arrays(name, opened):
    data, _ = opened(name)._repr_mimebundle_()
    assert {WIDGET, "image/png", "text/plain"} <= set(data)
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert len(data["image/png"]) < 200_000
    assert picture.width > 600
    assert np.asarray(picture.convert("L")).std() > 10  # not blank
    scene = opened(name)
    page, payload = scene.page, scene.payload if scene.kind else scene.picture
    for control in page["controls"]:
        assert page["state"][control["name"]] in control["values"]
        assert len(control["labels"]) == len(control["values"])
    for part in [page if scene.kind else scene.shown]:
        for array_name in part["arrays"]:
            unpack(part, payload, array_name)  # inside the payload
    assert json.dumps(page)


def test_ipywidgets_7_leaves_the_picture_too(opened, monkeypatch):
    monkeypatch.setattr(ipywidgets.Widget, "_ipython_display_", lambda widget: None, raising=False)  # as 7 has it
    data, _ = InteractiveShell.instance().display_formatter.format(opened("race"))
    assert {WIDGET, "image/png"} <= set(data)


@pytest.mark.slow
def test_an_error_of_a_kernels_scene_is_shown_appended_and_raised(monkeypatch):
    scene = scenes.stream()
    with monkeypatch.context() as patched:
        patched.setattr(type(scene), "draw", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scene.state = scene.state | {"chunk": 1}
    assert [type(error) for error in scene.errors] == [ZeroDivisionError]
    assert "ZeroDivisionError" in scene.shown["error"]
    scene.state = scene.state | {"chunk": 2}
    assert "panels" in scene.shown


def test_bad_names_and_values_are_one_clear_line():
    with pytest.raises(InputError, match=r"unknown scene 'races'.*'race'"):
        scenes.open_scene("races")
    with pytest.raises(InputError, match=r"unknown control 'step'.*'steps'"):
        scenes.race(step=4)
    with pytest.raises(InputError, match="steps 5; expected one of 1, 2, 4"):
        scenes.race(steps=5)


@pytest.mark.slow
def test_a_stream_is_that_of_the_network_and_its_controls_count_from_the_next_chunk(opened):
    from minianyflow.live.video_scene import load
    from minianyflow.networks.causal import causal_stream
    from minianyflow.networks.wan import TextEncoder
    from minianyflow.times import time_grid

    scene, source, prompts = opened("stream"), generator(0), TextEncoder()(["one ball", "two balls"])
    jobs = ((time_grid(steps), prompts[ball : ball + 1]) for steps, ball in ((4, 0), (4, 0), (1, 0), (1, 1)))
    draw = lambda frames: torch.randn(1, frames, 4, 4, 4, generator=source)  # noqa: E731
    latents = torch.cat([*causal_stream(load("causal_on_policy"), draw, jobs, 5)], 1)
    made = [array(scene, 0, "clips")[0]]
    for changes in ({"steps": 1}, {"prompt": "two balls"}):
        before = scene.shown
        scene.state = scene.state | changes
        assert scene.shown is before  # until the page asks
        scene.state = scene.state | {"chunk": scene.state.get("chunk", 0) + 1}
        made.append(array(scene, 0, "clips")[0])
    assert [scene.shown["axis"][end] for end in ("from", "to")] == [17, 25]
    assert (torch.cat(made) - load("codec").decode(latents)[0]).abs().max() < 0.04  # 16 shades


@pytest.mark.slow
def test_one_line_in_a_notebook_is_enough_and_the_saved_one_keeps_the_picture_alone(tmp_path):
    alone = nbformat.v4.new_code_cell("slider", outputs=[nbformat.v4.new_output("display_data", data={WIDGET: {}})])
    course.tidy(alone)
    assert WIDGET in alone.outputs[0].data  # no picture, so the widget stays
    light = "import sys\nassert not {'diffusers', 'transformers'} & set(sys.modules)"
    write_notebook(tmp_path / "one.ipynb", "from minianyflow.live import scenes\nscenes.race()", light)
    saved = course.execute(tmp_path / "one.ipynb")
    (output,) = saved.cells[0].outputs
    assert set(output.data) == {"image/png", "text/plain"}
    assert len(json.dumps(saved)) < 150_000
