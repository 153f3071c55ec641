"""What the page computes is what the library computes: the same weights, the same noises, in a headless browser."""

from functools import partial

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright
from torch.func import functional_call

from benchmarks.browser import watched
from minianyflow import (
    backward_simulation,
    distribution_matching_loss,
    generator,
    path_error,
    rollout,
    sliced_w2,
    sobol_noise,
    time_grid,
    velocity,
)
from minianyflow.live.pages import DONE, chromium, write_pages
from minianyflow.live.plane_scenes import DATASETS
from minianyflow.plane import exposure
from minianyflow.plane.circle_measures import measure_clips
from minianyflow.plane.students import METHODS, STUDENTS, load_student, sample
from toy_data import plane
from toy_data.circle import CircleProcess

pytestmark = pytest.mark.slow

# A panel's points (T, n, 2) and measures, once all of them are there; the curve beside them may still be on its way.
PANELS = """async (state) => {
  const before = player.shown(), all = ({ count, measures }) => (
    [undefined, player.world.particles].includes(count) && !JSON.stringify(measures ?? "").includes("…"));
  player.set(state);
  const there = () =>
    player.root.dataset.done === "1" || (player.shown() !== before && player.shown().panels.every(all));
  while (!there()) await new Promise((done) => setTimeout(done, 20));
  const plain = ({ points, chain, measures, bars }) => (
    { chain, measures, bars, shape: points?.shape, points: points && [...points.values] });
  return player.shown().panels.map(plain);
}"""
U = """([method, dataset, z, t, r]) => {
  const u = player.world.map(method, dataset), out = new Float64Array(z.length);
  return [...u(Float64Array.from(z), z.length / 2, t, r, out)];
}"""


@pytest.fixture(scope="module")
def tabs(tmp_path_factory):
    """{scene: its page, open and complete}; `slow` is the race with WebAssembly switched off."""
    pages = write_pages(tmp_path_factory.mktemp("pages"), ["race", "triangle", "backward_simulation", "exposure"], True)
    with sync_playwright() as playwright, chromium(playwright) as browser:
        stack, tabs = [], {}
        for name, page in [(page.stem, page) for page in pages] + [("slow", pages[0])]:
            stack.append(watched(browser, offline=True))
            tab = tabs[name] = stack[-1].__enter__()
            if name == "slow":
                tab.add_init_script("delete globalThis.WebAssembly")
            tab.goto(page.as_uri())
            tab.wait_for_selector(DONE)
        yield tabs
        assert not [complaint for tab in tabs.values() for complaint in tab.complaints + tab.blocked]
        for context in stack:
            context.__exit__(None, None, None)


def panels(tab, **state):
    """[(points (T, n, 2), the panel)]."""
    shown = tab.evaluate(PANELS, state)
    return [
        (torch.tensor(panel["points"]).reshape(panel["shape"]) if panel.get("points") else None, panel)
        for panel in shown
    ]


def student(method, dataset):
    return load_student(method, folder=STUDENTS if dataset == "spiral" else STUDENTS / dataset)


@pytest.mark.parametrize("tab", ["race", "slow"])
def test_u_is_the_networks_at_any_state_and_times(tabs, tab):
    z, source = sobol_noise(200, (2,), 5), generator(0)
    for dataset in DATASETS:
        for method in METHODS[1:]:
            t, r = torch.rand(2, 200, generator=source).sort(0, descending=True).values
            network = student(method, dataset)
            for t_, r_ in ((t, r), (t, t), (torch.full_like(t, 0.7), torch.zeros_like(t))):
                u = network(z, t_, r_)
                same = [t_[0].item(), r_[0].item()] if t_.std() == 0 else [t_.tolist(), r_.tolist()]
                there = tabs[tab].evaluate(U, [method, dataset, z.flatten().tolist(), *same])
                assert (torch.tensor(there).reshape(-1, 2) - u).abs().max() < 1e-5 * u.abs().max().clamp(min=1)


@pytest.mark.parametrize(("dataset", "steps", "seed"), [("spiral", 4, 2), ("ring8", 16, 9)])
def test_the_race_shows_the_samplers_of_the_demo(tabs, dataset, steps, seed):
    z, data = sobol_noise(1000, (2,), seed), plane.load(dataset).sample_stratified(1000, generator(0))
    exact = plane.load(dataset).flow(z, torch.ones(1000), torch.zeros(1000))
    shown = panels(tabs["race"], dataset=dataset, steps=steps, seed=seed)
    away = (shown[0][0][-1] - exact).norm(dim=1)  # a noise between two places is the hardest for a solver
    assert away.median() < 1e-5
    assert away.mean() < 3e-4
    assert (shown[0][0][0] - z).abs().max() < 1e-6
    for (path, panel), method in zip(shown[1:4], ("euler", "teacher_step", "consistency"), strict=True):
        mine = sample(method, None if method == "euler" else student(method, dataset), dataset, z, steps, seed)
        apart = (path - mine).abs()  # re-noised: torch's own noise, drawn in the page
        assert apart.quantile(0.99) < 1e-5  # between two places, torch's float32 velocity is off by more
        assert float(panel["measures"]["path error"]) == pytest.approx(path_error(mine[-1], exact), abs=2e-3)
        assert float(panel["measures"]["sliced W2"]) == pytest.approx(sliced_w2(mine[-1], data), abs=6e-4)
    assert shown[1][1]["measures"]["its floor"] == shown[0][1]["measures"]["sliced W2"]  # even noises
    assert "±" in shown[3][1]["measures"]["its floor"]  # fresh ones


def test_a_dragged_noise_takes_its_jumps_and_its_exact_path_along(tabs):
    tab = tabs["race"]
    panels(tab, dataset="spiral", steps=4, seed=0, flow_map="mixed")
    tab.evaluate("player.seek(0)")
    canvas = tab.locator(".lm-panels canvas").nth(2)
    box, (x, y) = canvas.bounding_box(), sobol_noise(1000, (2,))[0].tolist()

    def there(x, y):
        return box["x"] + box["width"] * (0.5 + x / 4.8), box["y"] + box["height"] * (0.5 - y / 4.8)

    tab.mouse.move(*there(x, y))
    tab.mouse.down()
    tab.mouse.move(*there(1.2, -0.6), steps=4)
    tab.mouse.up()
    shown = panels(tab)
    moved = shown[2][0][0, 0]
    assert (moved - torch.tensor([1.2, -0.6])).abs().max() < 0.02
    one = torch.ones(1)
    exact = plane.load("spiral").flow(moved[None], one, 0 * one)[0]
    assert (shown[0][0][-1, 0] - exact).abs().max() < 1e-4
    path = sample("mixed", student("mixed", "spiral"), "spiral", moved[None], 4)
    assert (shown[2][0][:, 0] - path[:, 0]).abs().max() < 1e-5
    canvas.focus()
    tab.keyboard.press("2")
    tab.keyboard.press("ArrowRight")
    assert panels(tab)[0][0][0, 1, 0] == pytest.approx(sobol_noise(1000, (2,))[1, 0].item() + 0.05, abs=1e-5)
    assert (panels(tab, seed=1)[0][0][0] - sobol_noise(1000, (2,), 1)).abs().max() < 1e-6  # another seed is whole


def test_the_triangle_jumps_from_exact_states(tabs):
    shown = panels(tabs["triangle"], jumps=2, start=0.75, target=0.25, chain=None)
    z, spiral, at = sobol_noise(1000, (2,), 0), plane.load("spiral"), torch.full((1000,), 0.75)
    state = spiral.flow(z, torch.ones(1000), at)
    assert shown[0][1]["chain"] == [0.75, 0.5, 0.25]
    assert (
        shown[1][0] - rollout(load_student("teacher_step"), state, torch.tensor([0.75, 0.5, 0.25]))
    ).abs().max() < 1e-4
    assert (shown[2][0][-1] - spiral.flow(state, at, at - 0.5)).abs().quantile(0.99) < 1e-4


def test_backward_simulation_stands_for_the_rollout_it_names(tabs):
    z, network = sobol_noise(1000, (2,), 0), load_student("teacher_step")
    shown, number, step = (
        panels(tabs["backward_simulation"], steps=8, g=3),
        torch.full((1000,), 8),
        torch.full((1000,), 3),
    )
    with torch.no_grad():
        assert (shown[1][0] - rollout(network, z, time_grid(8))).abs().quantile(0.999) < 1e-5
        assert (shown[2][0] - backward_simulation(network, z, number, step)).abs().max() < 1e-4
    heights = [bar["height"] for bar in shown[3][1]["bars"]]
    assert heights == pytest.approx(
        [*gradients(z[:128], time_grid(8)), *gradients(z[:128], torch.tensor(shown[0][1]["chain"]))], rel=1e-3
    )
    assert len(panels(tabs["backward_simulation"], steps=8, g=0)[0][1]["chain"]) == 3  # the first jump has no length
    assert panels(tabs["backward_simulation"], steps=2, g=7)[0][1]["chain"] == [1, 0.5, 0]  # N = 2 has no step 7


def gradients(z, times):
    """The norm of the on-policy gradient through each jump: a rollout whose every jump has weights of its own."""
    network, source = load_student("teacher_step"), generator(0, 1)
    weights = dict(network.named_parameters())
    copies = [{name: w.detach().clone().requires_grad_(True) for name, w in weights.items()} for _ in times[1:]]
    of_jump = iter(copies)
    x = rollout(lambda z, t, r: functional_call(network, next(of_jump), (z, t, r)), z, times)[-1]
    t, eps = torch.rand(len(z), generator=source), torch.randn(z.shape, generator=source)
    real = plane.load("spiral").velocity
    distribution_matching_loss(x, real, partial(velocity, network), t, eps).mean().backward()
    return [float(sum(w.grad.square().sum() for w in copy.values()).sqrt()) for copy in copies]


@pytest.mark.parametrize(("context", "copy"), [("own", 1), ("true", 2)])
def test_exposure_shows_clips_after_their_own_frames_or_true_ones(tabs, context, copy):
    process, z = CircleProcess(), sobol_noise(256, (16, 2), 0)
    truth = process.clips.sample(256, generator(0, 1))
    shown = panels(tabs["exposure"], context=context, copy=copy, steps=2)
    for (path, panel), arm in zip(shown[:2], ("teacher forcing", "on-policy"), strict=True):
        clips = exposure.sample_clips(exposure.load_student(arm, copy), z, 2, truth if context == "true" else None)
        assert (path.transpose(0, 1) - clips).abs().quantile(0.999) < 1e-4  # sixteen frames, each from those before
        last = float(exposure.radius_error(clips)[:, -1].mean())
        assert float(panel["measures"]["radius error, last frame"]) == pytest.approx(last, abs=6e-4)
        assert np.isfinite(float(panel["measures"]["over that after true frames"]))


def test_exposure_runs_on_for_160_frames_and_says_what_is_kept(tabs):
    """Chaos separates single clips; their figures, a law of 256, agree. The turned student's clips stay as they are."""
    process, z = CircleProcess(), torch.randn(256, 160, 2, generator=generator(0, 2))
    shown = panels(tabs["exposure"], context="long", copy=1, steps=2, left=exposure.TURNED, seed=0)
    for (path, _), (_, bars), arm in zip(shown[::2], shown[1::2], (exposure.TURNED, "on-policy"), strict=True):
        clips = exposure.sample_clips(exposure.load_student(arm, 1), z, 2)
        assert (path.transpose(0, 1) - clips)[:, :16].abs().quantile(0.99) < 1e-3
        expected = measure_clips(clips, process, (160,))
        for name, value in zip(("tv", "kept", "whole"), bars["measures"].values(), strict=True):
            assert float(value) == pytest.approx(expected[name][0], abs=0.08)
