"""Clips that the page makes are those of the library: the same weights, noises, samplers and measures, in a browser."""

import base64
import json

import pytest
import torch
from playwright.sync_api import sync_playwright

from benchmarks.browser import watched
from minianyflow import generator
from minianyflow.live.graphs import FILE, graph_of, prompted
from minianyflow.live.pages import DONE, chromium, write_pages
from minianyflow.live.player import STATIC, Pack
from minianyflow.live.video_scene import CHUNKS, WHOLE, load, packed
from minianyflow.networks.wan import TextEncoder
from minianyflow.video.measures import physics
from minianyflow.video.motion import flights
from minianyflow.video.report import how_sampled, sample
from toy_data import blobs

pytestmark = pytest.mark.slow

SAMPLE = """async ([video, math, graphs, networks, bytes, how, noise, steps, fresh]) => {
  const [{ makeRunner, weightsOf, sampled, tensorOf, measured }, { Generator, timeGrid }] = (
    await Promise.all([video, math].map((code) => import(`data:text/javascript;base64,${code}`))));
  const data = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0)), all = JSON.parse(graphs);
  const runners = networks.map(({ graphs, order, offset, count }) => {
    const weights = weightsOf(new Uint16Array(data.buffer, offset, count), order);
    return graphs.map((graph) => makeRunner(all[graph], weights));
  });
  const source = new Generator(fresh), z = tensorOf(new Generator(noise).randn(640), [2, 5, 4, 4, 4]);
  const work = sampled(runners[0], how, z, timeGrid(steps), (size) => source.randn(size));
  for (;;) {
    const { value, done } = work.next();
    if (!done) continue;
    const clips = runners[1][0]([value]);
    return [[...value.data], [...clips.data], measured(clips)];
  }
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright, chromium(playwright) as browser:
        yield browser


@torch.no_grad()
def in_torch(name, steps, seed):
    """Latents, clips, the share of frames with as many balls as asked for, pixels off straight flights."""
    z, balls = torch.randn(2, 5, 4, 4, 4, generator=generator(seed)), torch.tensor([1, 2])
    latents = sample(how_sampled(name), load(name), z, TextEncoder()(blobs.PROMPTS), steps)
    clips = load("codec").decode(latents)
    right = float((physics(clips, balls)["count"] == balls[:, None]).float().mean())
    return latents, clips, right, sum(float(flights(clips[ball - 1 : ball], ball).residual) for ball in (1, 2)) / 2


@pytest.mark.parametrize("name", [*WHOLE.values(), *CHUNKS.values()])
def test_the_page_samples_what_the_library_samples(browser, name):
    steps, seed, pack = 3, 5, Pack()
    networks = [packed(pack, part) for part in (name, "codec")]
    for network in networks:
        array = pack.arrays[network.pop("flat")]
        network |= {"offset": array["offset"], "count": array["shape"][0]}
    networks[1]["graphs"] = ["decode"]
    code = [base64.b64encode((STATIC / f"{file}.js").read_bytes()).decode() for file in ("video", "compute")]
    seeds = [generator(*key).initial_seed() for key in ((seed,), (steps, 0))]
    given = [*code, FILE.read_text(), networks, base64.b64encode(pack.payload).decode(), how_sampled(name)]
    with watched(browser) as tab:
        latents, clips, measures = tab.evaluate(SAMPLE, [*given, seeds[0], steps, seeds[1]])
    expected = in_torch(name, steps, seed)
    for found, mine in zip((latents, clips), expected[:2], strict=True):
        assert (torch.tensor(found).view(mine.shape) - mine).abs().max() < 3e-5 * mine.abs().max()
    assert (measures["right"], measures["off"]) == pytest.approx(expected[2:], abs=1e-4)


@pytest.mark.parametrize(("graph", "name"), [("dense", "inertia"), ("whole", "on_policy")])
def test_the_graphs_are_those_of_the_networks(graph, name):
    """Traced anew: the same operations, and constants but for rounding."""
    made = graph_of(prompted(name), torch.zeros(2, 5, 4, 4, 4), torch.ones(2), torch.zeros(2))
    made, kept = json.loads(json.dumps(made)), json.loads(FILE.read_text())[graph]
    tables = [[node.pop(2) for node in one["nodes"] if node[0] == "constant"] for one in (made, kept)]
    assert made == kept
    for mine, theirs in zip(*tables, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_the_scene_shows_them(browser, tmp_path):
    (path,) = write_pages(tmp_path, ["video"], True)
    with watched(browser, offline=True) as tab:
        tab.goto(path.as_uri())
        tab.wait_for_selector(DONE, timeout=180_000)
        read = "() => player.shown().panels.map(({ clips, measures }) => [[...clips.values], measures])"
        panels = tab.evaluate(read)
        assert not tab.complaints + tab.blocked
    counted = [int(measures["evaluations"]) for _, measures in panels]
    assert counted == [1, 2, 4, 8, 16, 5, 8, 14, 26, 50]  # chunk by chunk: three chunks, and two are remembered
    for place, name, steps in ((2, "on_policy", 4), (5, "causal_on_policy", 1)):
        _, clips, right, off = in_torch(name, steps, 0)
        values, measures = panels[place]
        assert (torch.tensor(values).view(clips.shape) / 255 - clips).abs().max() < 3e-3  # 256 greys
        assert measures["balls as asked"] == f"{right:.0%}"
        assert float(measures["off straight flight"].split()[0]) == pytest.approx(off, abs=6e-3)
