"""A drawn target is learnt in the page as torch learns it: gradients, a whole run, and what a hand may do wrong."""

import pytest
import torch
from playwright.sync_api import sync_playwright

from benchmarks.browser import watched
from minianyflow import FlowMapLoss, Role, generator
from minianyflow.batch import batches
from minianyflow.consistency import ConsistencyLoss
from minianyflow.live.pages import DONE, chromium, write_pages
from minianyflow.live.plane_scenes import LEARNERS, flat_weights
from minianyflow.mixtures import GaussianMixture
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FLOW_MAPS
from minianyflow.plane.race import SETTINGS
from minianyflow.training import accumulate_gradient

pytestmark = pytest.mark.slow

STEPS = 4000  # of a run in the page: its cosine
MADE = """([method, means, seed, start]) => {
  const mixture = { means: Float64Array.from(means), sigma: 0.06 };
  const learner = (globalThis.learner = player.world.learner({ mixture, method, seed })), own = [...learner.weights];
  for (const weights of start ? [learner.weights, learner.average] : []) weights.set(start);
  for (const network of [learner.network, learner.averaged]) player.world.math.setWeights(network, learner.weights);
  return own;
}"""
RUN = """(batches) => {
  for (const batch of batches) {
    for (const name in batch) batch[name] = Float64Array.from(batch[name]);
    learner.step(batch);
  }
  const { weights, average, grads, loss } = learner;
  return { weights: [...weights], average: [...average], grads: [...grads], loss };
}"""
# The gradient of sum(out * c) by `backward`, and by central differences: of every 97th weight, and of z.
DIFFERENCES = """([n, h]) => {
  const { network } = learner, { math } = player.world, flat = network.flat.slice(), kept = [], pairs = [];
  const [c, z, free] = [5, 6, 7].map((seed) => new math.Generator(seed).randn(2 * n));
  const grads = new Float64Array(flat.length);
  const t = free.slice(0, n).map((x) => 1 / (1 + x * x)), r = t.map((x) => x / 3);
  const u = (kept) => math.evaluate(network, z, n, t, r, new Float64Array(2 * n), 2, kept);
  const value = () => u(null).reduce((sum, number, i) => sum + number * c[i], 0);
  u(kept);
  const dz = math.backward(network, kept, n, c, grads);
  const compare = (slope, move) => pairs.push([slope, (move(h) - move(-h)) / (2 * h)]);
  for (let i = 0; i < flat.length; i += 97)
    compare(grads[i], (by) => (math.setWeights(network, flat.map((w, k) => (k === i ? w + by : w))), value()));
  math.setWeights(network, flat);
  z.slice().forEach((at, i) => (compare(dz[i], (by) => ((z[i] = at + by), value())), (z[i] = at)));
  return pairs;
}"""


@pytest.fixture(scope="module")
def tabs(tmp_path_factory):
    """The page, and `slow`: without WebAssembly and without workers."""
    (path,) = write_pages(tmp_path_factory.mktemp("pages"), ["draw"], True)
    with (
        sync_playwright() as playwright,
        chromium(playwright) as browser,
        watched(browser, offline=True) as fast,
        watched(browser, offline=True) as slow,
    ):
        slow.add_init_script("delete globalThis.WebAssembly; delete globalThis.Worker")
        for tab in (fast, slow):
            tab.goto(path.as_uri())
            tab.wait_for_selector(DONE)
        yield {"fast": fast, "slow": slow}
        assert not fast.complaints + slow.complaints + fast.blocked


def test_the_gradient_is_that_of_finite_differences(tabs):
    tabs["slow"].evaluate(MADE, ["mixed", [0, 1, 1, 0, 1, 1], 0, None])  # float64
    pairs = torch.tensor(tabs["slow"].evaluate(DIFFERENCES, [8, 1e-5]), dtype=torch.float64)
    assert pairs[:, 0].abs().mean() > 0.1
    assert (pairs[:, 0] - pairs[:, 1]).abs().max() < 1e-7


RUNS = [("slow", method, 100) for method in LEARNERS] + [("fast", "semigroup", 100)]
RUNS += [("fast", method, 1) for method in LEARNERS if method != "semigroup"]


@pytest.mark.parametrize(("tab", "method", "steps"), RUNS)
def test_a_run_is_torchs(tabs, tab, method, steps):
    """In float64 (slow) and in float32, where differences and divisions by small times part two runs of the others."""
    exactly, page = tab == "slow", tabs[tab]
    angle = torch.arange(40) * (2 * torch.pi / 40)
    mixture = GaussianMixture(
        torch.stack([angle.sin(), (2 * angle).sin()], 1).to(torch.float64 if exactly else torch.float32), 0.06
    )
    consistency, network = method == "consistency", MLP((2,)).to(mixture.means.dtype)
    role = Role(network, lr=1e-2, warmup=50, ema=0.5 if consistency else 0.97)
    form = {name: SETTINGS[method][name] for name in ("form", "grid", "solver", "weight")} if consistency else {}
    kind = ConsistencyLoss if consistency else FlowMapLoss
    options = form | {"average": role.average.module} if consistency else {"shares": FLOW_MAPS[method]}
    role.loss = kind(velocity=mixture.velocity, adaptive=0.5, **options)
    shares = {"diagonal": 1.0, "end": 0.0} if consistency else {}
    draw = batches(mixture.sample, 32, **shares)
    given = [{key: value.to(mixture.means.dtype) for key, value in draw(step).items()} for step in range(steps)]
    start, means = flat_weights(network).detach().clone(), mixture.means.flatten().tolist()
    own = torch.tensor(page.evaluate(MADE, [method, means, generator(0).initial_seed(), start.tolist()]))
    assert (own - start).abs().max() < 1e-6  # the page starts where the library does
    keys = ("x", "eps", "t", "r", "split", "objective_draw")
    sent = [{key: batch[key].flatten().tolist() for key in keys} for batch in given]
    first = page.evaluate(RUN, sent[:1])
    for step, batch in enumerate(given):
        _, errors = accumulate_gradient(role, batch)
        if step == 0:
            grads = torch.cat([weight.grad.flatten() for weight in network.parameters()])
            assert (torch.tensor(first["grads"]) - grads).abs().max() < (1e-6 if exactly else 1e-4) * grads.abs().max()
            assert first["loss"] == pytest.approx(float(errors["loss"]), rel=1e-6 if exactly else 1e-5)
        role.update(step, STEPS)
    if steps == 1:
        return
    there = page.evaluate(RUN, sent[1:])
    for name, torchs in (("weights", network), ("average", role.average.module)):
        apart = (torch.tensor(there[name]) - flat_weights(torchs)).abs()
        assert apart.max() < 1e-4
    assert (flat_weights(network) - start).abs().max() > 0.05  # it moved


@pytest.mark.parametrize("tab", ["fast", "slow"])
def test_a_drawn_line_is_learnt_and_a_point_is_refused(tabs, tab):
    page = tabs[tab]
    page.evaluate("player.set({ learners: 'mixed', target: 'your own', strokes: [], learning: null })")
    assert "Nothing is drawn yet" in page.inner_text(".lm-note")
    box = page.locator("canvas").first.bounding_box()

    def at(x, y):
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    page.mouse.move(*at(0.2, 0.3))
    page.mouse.down()
    page.mouse.up()
    assert "a point or a short line" in page.inner_text(".lm-note")
    page.get_by_role("button", name="Clear").click()
    page.mouse.move(*at(0.2, 0.3))
    page.mouse.down()
    page.mouse.move(*at(0.8, 0.6), steps=8)
    page.mouse.up()
    page.get_by_role("button", name="Learn").click()
    steps = 800 if tab == "fast" else 40
    page.wait_for_function(f"player.world.school.pupils[0].steps >= {steps}")
    history = page.evaluate("player.world.school.pupils[0].history")
    assert (page.evaluate("player.world.school.pupils[0].worker !== undefined")) == (tab == "fast")
    if tab == "fast":
        assert history[-1][1] < 0.1 < history[0][1]  # recognisable
        page.evaluate("player.set({ steps: 4 })")  # the networks stay
        assert page.evaluate("player.world.school.pupils[0].steps") >= steps
    else:
        assert "WebAssembly is switched off" in page.inner_text(".lm-note")
    page.get_by_role("button", name="Stop").click()
    assert page.get_by_role("button", name="Learn").count() == 1


HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_page_in_the_background_rests_and_says_so(tabs):
    page, pupil = tabs["fast"], "player.world.school.pupils[0]"
    page.evaluate("player.set({ learners: 'mixed', target: 'heart', learning: null })")
    page.get_by_role("button", name="Learn").click()
    page.wait_for_function(f"{pupil}.steps > 0")
    page.evaluate(HIDE, True)
    page.wait_for_function(f"{pupil}.waits")
    steps = page.evaluate(f"{pupil}.steps")
    page.wait_for_timeout(500)
    assert page.evaluate(f"{pupil}.steps") == steps
    page.evaluate(HIDE, False)
    page.wait_for_function(f"(steps) => {pupil}.steps > steps", arg=steps)
    page.get_by_text("was in the background").wait_for()
    page.get_by_role("button", name="Stop").click()
