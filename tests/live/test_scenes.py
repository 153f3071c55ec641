"""Every scene without a browser: it shows what the library's samplers make, its controls matter, its errors surface."""

import base64
import io
import json
import re

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from minianyflow import (
    backward_simulation,
    backward_simulation_times,
    distribution_matching_loss,
    generator,
    path_error,
    rollout,
    sliced_w2,
    sobol_noise,
    time_grid,
)
from minianyflow.course import notebooks as course
from minianyflow.live import exposure_scene, plane_scenes, scenes
from minianyflow.live.app import write_notebook
from minianyflow.live.player import LARGEST, unpack
from minianyflow.plane import exposure
from minianyflow.plane.students import STUDENTS, load_student, sample
from minianyflow.support.errors import InputError
from minianyflow.support.figures import COLOURS
from toy_data import plane
from toy_data.circle import CircleProcess

NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "video" else ()) for name in scenes.SCENES]
NEAR = LARGEST / 32767
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def opened():
    """Every scene is opened once; a test that moves its controls puts them back."""
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, scenes.open_scene(name))


def shown(scene):
    """All that the player was given, but for the number of the message."""
    return {name: value for name, value in scene.player.scene.items() if name != "serial"}, scene.player.payload


def panel_of(scene, panel):
    return scene.player.scene["panels"][panel]


def array(scene, panel, key="points"):
    return torch.tensor(unpack(scene.player.scene, scene.player.payload, panel_of(scene, panel)[key]))


def measures(scene, panel):
    return panel_of(scene, panel)["measures"]


def another(control):
    """A value that the control does not have now."""
    options = getattr(control, "options", None)
    values = [value for _, value in options] if options else range(control.min, control.max + 1)
    return next(value for value in list(values)[::-1] if value != control.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_control_changes_the_picture(name, opened):
    scene = opened(name)
    for name, control in scene.controls.items():
        before, value = shown(scene), control.value
        scene.set(name, another(control))
        assert shown(scene) != before, name
        scene.set(name, value)
        assert shown(scene) == before, name
    assert not scene.errors


@pytest.mark.parametrize("name", NAMES)
def test_a_scene_leaves_a_small_picture_in_the_colours_of_the_course(name, opened):
    data, _ = opened(name)._repr_mimebundle_()
    assert {WIDGET, "image/png", "text/plain"} <= set(data)
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert len(data["image/png"]) < 133_000
    assert len(picture.getcolors()) <= 64
    assert picture.width > 600
    assert np.asarray(picture.convert("L")).std() > 10  # not blank
    colours = set(re.findall(r'"colour": "(#\w{6})', json.dumps(opened(name).player.scene)))
    assert colours or name == "video"
    assert colours <= {*COLOURS.values(), "#444444", "#777777"}


@pytest.mark.parametrize("name", NAMES)
def test_an_offline_page_holds_every_choice_and_stays_small(name, opened):
    page, payload = opened(name).offline_page()
    count = 1
    for control in page["controls"]:
        assert control["value"] in control["values"]
        assert len(control["labels"]) == len(control["values"])
        count *= len(control["values"])
    assert len(page["scenes"]) == count - (name == "backward_simulation")  # a rollout of 4 steps has no step 7
    assert len(json.dumps(page)) + 4 / 3 * len(payload) < 2.9e6  # before it is compressed
    assert len({json.dumps(scene) for scene in page["scenes"].values()}) > count / 2  # choices matter
    for scene in page["scenes"].values():
        for array_name in scene["arrays"]:
            unpack(scene, payload, array_name)  # inside the payload


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_a_callback_is_shown_appended_and_raised(name, opened, monkeypatch):
    scene = opened(name)
    control, before = next(iter(scene.controls.values())), scene.player.scene
    value = control.value

    def broken(*args, **kwargs):
        raise ZeroDivisionError("by <nothing>")

    with monkeypatch.context() as patched:
        patched.setattr(type(scene), "draw", broken)
        with pytest.raises(ZeroDivisionError):
            control.value = another(control)
        assert [type(error) for error in scene.errors] == [ZeroDivisionError]
        assert "ZeroDivisionError: by &lt;nothing&gt;" in scene.message.value
        with pytest.raises(ZeroDivisionError):  # one that is broken from the start does not open
            scenes.open_scene(name)
    assert scene.player.scene is before
    control.value = value
    assert scene.message.value == ""
    scene.errors.clear()


def test_bad_names_and_values_are_one_clear_line():
    with pytest.raises(InputError, match=r"unknown scene 'races'.*'race'"):
        scenes.open_scene("races")
    with pytest.raises(InputError, match=r"unknown control 'step'.*'steps'"):
        scenes.race(step=4)
    with pytest.raises(InputError, match="steps 5; expected one of 1, 2, 4"):
        scenes.race(steps=5)


# What is drawn is what the library makes


@pytest.mark.parametrize(("dataset", "steps"), [("spiral", 4), ("ring8", 16)])
def test_the_race_shows_the_samplers_of_the_demo(dataset, steps):
    scene, z = scenes.race(dataset=dataset, steps=steps, seed=2), sobol_noise(1000, (2,), 2)
    mixture, data = plane.load(dataset), plane.load(dataset).sample_stratified(1000, generator(0))
    exact = mixture.flow(z, torch.ones(1000), torch.zeros(1000))
    away = (array(scene, 0)[-1] - exact).norm(dim=1)  # a noise between two places is the hardest for a solver
    assert away.mean() < 3e-4
    assert away.max() < 2e-2
    folder = STUDENTS if dataset == "spiral" else STUDENTS / dataset
    for panel, method in enumerate(("euler", "teacher_step", "consistency"), 1):
        network = None if method == "euler" else load_student(method, folder=folder)
        path = sample(method, network, dataset, z, steps, 2)
        assert (array(scene, panel) - path).abs().max() < NEAR
        assert panel_of(scene, panel)["times"] == time_grid(steps).tolist()
        text = measures(scene, panel)
        assert float(text["path error"]) == pytest.approx(path_error(path[-1], exact), abs=2e-3)
        assert float(text["sliced W2 to data"]) == pytest.approx(sliced_w2(path[-1], data), abs=6e-4)
        assert text["evaluations"] == str(steps)


def test_the_triangle_jumps_from_exact_states_and_follows_the_hand():
    scene, z = scenes.triangle(jumps=2, start=0.75, target=0.25), sobol_noise(1000, (2,), 0)
    spiral, at = plane.load("spiral"), torch.full((1000,), 0.75)
    state = spiral.flow(z, torch.ones(1000), at)

    def chain():
        return panel_of(scene, 0)["chain"]

    def learned(state, times):
        with torch.no_grad():
            return rollout(load_student("teacher_step"), state, torch.tensor(times))

    assert chain() == [0.75, 0.5, 0.25]
    assert (array(scene, 1) - learned(state, chain())).abs().max() < 5e-3
    assert (array(scene, 2)[-1] - spiral.flow(state, at, at - 0.5)).abs().max() < 5e-3
    assert measures(scene, 1)["evaluations"] == "2"
    scene.player.picked = [1.0, 0.125, 0.0]  # as the browser sends it
    assert (scene.state()["start"], scene.state()["target"]) == (1.0, 0.0)
    assert chain() == [1.0, 0.125, 0.0]
    assert (array(scene, 1) - learned(z, chain())).abs().max() < NEAR
    scene.set("method", "semigroup")
    assert chain() == [1.0, 0.125, 0.0]  # what the hand placed stays
    scene.set("jumps", 4)
    assert chain() == [1.0, 0.75, 0.5, 0.25, 0.0]
    scene.player.picked = [1.0, 0.125, 0.0]  # of two jumps, from before the slider was moved
    assert chain() == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(InputError, match="expected falling ones"):
        scene.player.picked = [0.25, 0.5, 0.2, 0.1, 0.0]
    scene = scenes.triangle()
    for _ in range(2):  # to the same place again
        scene.player.picked = [1.0, 0.5]
        assert chain() == [1.0, 0.5]
        scene.set("target", 0.0)
        assert chain() == [1.0, 0.0]


def test_backward_simulation_stands_for_the_rollout_it_names():
    scene, z, student = (
        scenes.backward_simulation(steps=8, g=3),
        sobol_noise(1000, (2,), 0),
        load_student("teacher_step"),
    )
    number, step = torch.full((1000,), 8), torch.full((1000,), 3)
    with torch.no_grad():
        assert (array(scene, 1) - rollout(student, z, time_grid(8))).abs().max() < NEAR
        assert (array(scene, 2) - backward_simulation(student, z, number, step)).abs().max() < NEAR
    assert [measures(scene, panel)["evaluations"] for panel in (1, 2)] == ["8", "3"]
    times = backward_simulation_times(number[:1], step[:1])[:, 0].tolist()
    assert panel_of(scene, 0)["chain"] == pytest.approx(times)
    bars = panel_of(scene, 3)["bars"]
    assert [len(bar["colour"]) for bar in bars] == [7] * 8 + [9] * 3  # the jumps' on top, half-transparent
    heights = [bar["height"] for bar in bars[8:]]
    assert measures(scene, 3)["largest jump's share"] == f"{max(heights) / sum(heights):.0%}"
    scene.set("g", 0)  # the first jump has no length then
    assert measures(scene, 2)["evaluations"] == "2"
    assert array(scene, 2).shape[0] == 3
    scene.set("steps", 2)
    assert scene.controls["g"].max == 1


def test_the_gradient_through_one_jump_is_the_whole_gradient():
    network, spiral = load_student("teacher_step").requires_grad_(True), plane.load("spiral")
    z, source = sobol_noise(64, (2,)), generator(0, 1)
    t, eps = torch.rand(64, generator=source), torch.randn(64, 2, generator=source)

    def whole(times):
        x, fake = rollout(network, z, times)[-1], load_student("teacher_step")
        loss = distribution_matching_loss(x, spiral.velocity, lambda z, t: fake(z, t, t), t, eps).mean()
        grads = torch.autograd.grad(loss, list(network.parameters()))
        return float(sum(grad.square().sum() for grad in grads).sqrt())

    one, three = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5, 0.25, 0.0])
    assert plane_scenes.gradients(network, spiral, z, one) == [pytest.approx(whole(one), rel=1e-4)]
    parts = plane_scenes.gradients(network, spiral, z, three)
    assert len(parts) == 3
    assert max(parts) - sum(sorted(parts)[:-1]) <= whole(three) <= sum(parts)


def test_exposure_shows_clips_after_their_own_frames_or_true_ones():
    process, z = CircleProcess(), sobol_noise(256, (16, 2), 0)
    scene, truth = scenes.exposure(steps=2), process.clips.sample(256, generator(0, 1))
    for context, given, copy in ((exposure_scene.OWN, None, 1), (exposure_scene.TRUE, truth, 2)):
        scene.set("context", context)
        scene.set("copy", copy)
        for panel, arm in enumerate(("teacher forcing", "on-policy")):
            clips = exposure.sample_clips(exposure.load_student(arm, copy), z, 2, given)
            assert (array(scene, panel).transpose(0, 1) - clips).abs().max() < NEAR
            last = float(exposure.radius_error(clips)[:, -1].mean())
            assert float(measures(scene, panel)["radius error, last frame"]) == pytest.approx(last, abs=6e-4)
            assert measures(scene, panel)["evaluations a clip"] == "32"
    assert len(panel_of(scene, 2)["lines"]) == 5


@pytest.mark.slow
def test_video_shows_what_the_report_samples(opened):
    from minianyflow.live.video_scene import load
    from minianyflow.networks.wan import TextEncoder
    from minianyflow.video.measures import FOUND, find_balls
    from minianyflow.video.motion import flights
    from minianyflow.video.report import how_sampled
    from minianyflow.video.report import sample as sample_video
    from toy_data import blobs

    scene, z, prompt = opened("video"), torch.randn(2, 5, 4, 4, 4, generator=generator(0)), TextEncoder()(blobs.PROMPTS)
    for place, name in ((0, "on_policy"), (5, "causal_on_policy")):
        for panel, steps in ((place, 1), (place + 2, 4)):
            video = load("codec").decode(sample_video(how_sampled(name), load(name), z, prompt, steps))
            assert (array(scene, panel, "clips") - video).abs().max() < 0.04  # 16 shades
    counted = [int(measures(scene, panel)["evaluations"]) for panel in range(10)]
    assert counted == [1, 2, 4, 8, 16, 5, 8, 14, 26, 50]  # chunk by chunk: three chunks, and two are remembered
    _, amplitudes, _ = find_balls(video)  # four steps a chunk
    right = (amplitudes > FOUND).sum(2) == torch.tensor([[1], [2]])
    assert measures(scene, 7)["balls as asked"] == f"{float(right.float().mean()):.0%}"
    off = [float(flights(video[ball - 1 : ball], ball).residual) for ball in (1, 2)]
    assert measures(scene, 7)["off straight flight"] == f"{sum(off) / 2:.2f} px"


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
