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
MADE = """([method, means, seed]) => {
  const mixture = { means: Float64Array.from(means), sigma: 0.06 }, learner = player.world.learner({ mixture, method, seed });
  globalThis.learner = learner;
  return [...learner.weights];
}"""
RUN = """(batches) => {
  for (const batch of batches) {
    for (const name in batch) batch[name] = Float64Array.from(batch[name]);
    learner.step(batch);
  }
  return { weights: [...learner.weights], average: [...learner.average], grads: [...learner.grads], loss: learner.loss };
}"""
# The gradient of sum(out * c) by `backward`, and by central differences of every 97th weight.
DIFFERENCES = """([n, h]) => {
  const { network } = learner, { math } = player.world, flat = network.flat.slice(), c = new math.Generator(5).randn(2 * n), kept = [];
  const z = new math.Generator(6).randn(2 * n), t = new math.Generator(7).rand(n).map((x) => 0.5 + x / 2), r = t.map((x) => x / 3), grads = new Float64Array(flat.length);
  const value = () => math.evaluate(network, z, n, t, r, new Float64Array(2 * n)).reduce((sum, u, i) => sum + u * c[i], 0);
  math.evaluate(network, z, n, t, r, new Float64Array(2 * n), 2, kept);
  const dz = math.backward(network, kept, n, c, grads), pairs = [];
  for (let i = 0; i < flat.length; i += 97) {
    const moved = (by) => (math.setWeights(network, flat.map((w, k) => (k === i ? w + by : w))), value());
    pairs.push([grads[i], (moved(h) - moved(-h)) / (2 * h)]);
  }
  math.setWeights(network, flat);
  for (let i = 0; i < z.length; i++) {
    const at = z[i], moved = (by) => ((z[i] = at + by), value());
    pairs.push([dz[i], (moved(h) - moved(-h)) / (2 * h)]);
    z[i] = at;
  }
  return pairs;
}"""


@pytest.fixture(scope="module")
def tabs(tmp_path_factory):
    """The page, and `slow`: without WebAssembly and without workers."""
    (path,) = write_pages(tmp_path_factory.mktemp("pages"), ["draw"], True)
    with sync_playwright() as playwright, chromium(playwright) as browser:
        with watched(browser, offline=True) as fast, watched(browser, offline=True) as slow:
            slow.add_init_script("delete globalThis.WebAssembly; delete globalThis.Worker")
            for tab in (fast, slow):
                tab.goto(path.as_uri())
                tab.wait_for_selector(DONE)
            yield {"fast": fast, "slow": slow}
            assert not fast.complaints + slow.complaints + fast.blocked


def test_the_gradient_is_that_of_finite_differences(tabs):
    tabs["slow"].evaluate(MADE, ["mixed", [0, 1, 1, 0, 1, 1], 0])  # float64
    pairs = torch.tensor(tabs["slow"].evaluate(DIFFERENCES, [8, 1e-5]), dtype=torch.float64)
    assert pairs[:, 0].abs().mean() > 0.1
    assert (pairs[:, 0] - pairs[:, 1]).abs().max() < 1e-7


@pytest.mark.parametrize("method", LEARNERS)
def test_a_run_is_torchs(tabs, method):
    angle = torch.arange(40) * (2 * torch.pi / 40)
    mixture = GaussianMixture(torch.stack([angle.sin(), (2 * angle).sin()], 1), 0.06)
    consistency, network = method == "consistency", MLP((2,))
    role = Role(network, lr=1e-2, warmup=50, ema=0.5 if consistency else 0.97)
    form = {name: SETTINGS[method][name] for name in ("form", "grid", "solver", "weight")} if consistency else {}
    kind = ConsistencyLoss if consistency else FlowMapLoss
    options = form | {"average": role.average.module} if consistency else {"shares": FLOW_MAPS[method]}
    role.loss = kind(velocity=mixture.velocity, adaptive=0.5, **options)
    shares = {"diagonal": 1.0, "end": 0.0} if consistency else {}
    given = [batches(mixture.sample, 128, **shares)(step) for step in range(100)]
    start = torch.tensor(
        tabs["fast"].evaluate(MADE, [method, mixture.means.flatten().tolist(), generator(0).initial_seed()])
    )
    assert (start - flat_weights(network)).abs().max() < 1e-6
    keys = ("x", "eps", "t", "r", "split", "objective_draw")
    sent = [{key: batch[key].flatten().tolist() for key in keys} for batch in given]
    first = tabs["fast"].evaluate(RUN, sent[:1])
    for step, batch in enumerate(given):
        _, errors = accumulate_gradient(role, batch)
        if step == 0:
            grads = torch.cat([weight.grad.flatten() for weight in network.parameters()])
            assert (torch.tensor(first["grads"]) - grads).abs().max() < 1e-4 * grads.abs().max()
            assert first["loss"] == pytest.approx(float(errors["loss"]), rel=1e-5)
        role.update(step, STEPS)
    there = tabs["fast"].evaluate(RUN, sent[1:])
    assert (torch.tensor(there["weights"]) - flat_weights(network)).abs().max() < 1e-4
    assert (torch.tensor(there["average"]) - flat_weights(role.average.module)).abs().max() < 1e-4
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
