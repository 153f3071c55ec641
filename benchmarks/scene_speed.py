"""How quickly the scenes answer, measured in a headless Chromium: four figures, each with its bar."""

import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from minianyflow.live.app import serve
from minianyflow.live.browser import (
    READY,
    chromium,
    jupyter_lab,
    open_notebook,
    run_cells,
    shut_down,
    watched,
    write_notebook,
)
from minianyflow.support.errors import InputError

PARTICLES, STEPS, FRAMES_OF, MOVED_TO = 1000, 32, 3, 16  # of the bars: 32 steps when scrubbed, 16 when a control moves
SECONDS = 2.0  # of scrubbing, for one figure
BARS = {
    "scrub": (f"scrubbing, {PARTICLES} particles x {STEPS} steps x {FRAMES_OF} panels", "frames/s", "at least", 30),
    "control": (f"control moved to new picture, {PARTICLES} particles, {MOVED_TO} steps", "ms", "at most", 150),
    "notebook": ("opened notebook, kernel ready, to the first picture", "s", "at most", 3),
    "live": ("make live, page opened to first scene usable", "s", "at most", 6),
}

# Time goes to and fro by the range that a hand would move; counted are the pictures that were drawn.
SCRUB = """async (seconds) => {
  const root = document.querySelector(".lm-player"), range = root.querySelector("input[type=range]");
  const drawn = Number(root.dataset.frames), began = performance.now();
  for (let now = began; now - began < 1000 * seconds; now = await new Promise(requestAnimationFrame)) {
    range.value = 0.5 + 0.5 * Math.cos((now - began) / 500);
    range.dispatchEvent(new Event("input"));
  }
  return (1000 * (Number(root.dataset.frames) - drawn)) / (performance.now() - began);
}"""

# From the change of a menu, there and back through the kernel and its network, until the new scene is drawn.
MOVE = """async ([label, shown]) => {
  const root = document.querySelector(".lm-player"), before = root.dataset.serial;
  const menus = [...document.querySelectorAll(".widget-dropdown")];
  const menu = menus.find((each) => each.querySelector(".widget-label").textContent === label).querySelector("select");
  const drawn = new Promise((done) => {
    const watch = new MutationObserver(() => root.dataset.serial !== before && (watch.disconnect(), done()));
    watch.observe(root, { attributes: true });
  });
  const began = performance.now();
  menu.value = shown;
  menu.dispatchEvent(new Event("change", { bubbles: true }));
  await drawn;
  return performance.now() - began;
}"""


def run(repeats=5, quiet=False):
    """Measure all four `repeats` times; returns {name: [figures]}."""
    with ExitStack() as stack:
        browser, folder = stack.enter_context(chromium()), Path(stack.enter_context(TemporaryDirectory()))
        bar = stack.enter_context(tqdm(total=2 + 2 * repeats, unit="measurement", disable=quiet or None))
        figures = {"scrub": scrub(browser, folder, repeats)}
        bar.update()
        figures |= {name: [] for name in BARS if name not in figures}
        write_notebook(folder / "race.ipynb", f"from minianyflow.live import scenes\nscenes.race(steps={MOVED_TO})")
        address = stack.enter_context(jupyter_lab(folder))
        for last in [False] * (repeats - 1) + [True]:
            with watched(browser) as page:
                open_notebook(page, address, "race.ipynb")
                start = time.perf_counter()
                run_cells(page)
                page.wait_for_selector(READY)
                figures["notebook"].append(time.perf_counter() - start)
                bar.update()
                if last:
                    figures["control"] = moves(page, repeats)
                    bar.update()
                shut_down(page)
        for _ in range(repeats):  # a server each: the first page after a start is what a class sees
            with serve() as (address, _), watched(browser) as page:
                start = time.perf_counter()
                page.goto(address)
                page.wait_for_selector(READY)
                figures["live"].append(time.perf_counter() - start)
                bar.update()
    return figures


def scrub(browser, folder, repeats):
    """Frames a second, several times over; the panels are those of the race without the exact flow's."""
    from minianyflow.live.pages import page_text
    from minianyflow.live.player import Pack
    from minianyflow.live.scenes import open_scene

    race, pack = open_scene("race", steps=STEPS), Pack()
    scene = race.draw(pack, particles=PARTICLES, **race.state())
    scene["panels"] = scene["panels"][-FRAMES_OF:]
    page = {"title": race.title, "controls": [], "scenes": {"": scene}}
    (folder / "scrub.html").write_text(page_text(page, pack.payload), encoding="utf-8")
    with watched(browser) as tab:
        tab.goto((folder / "scrub.html").as_uri())
        tab.wait_for_selector(READY)
        tab.evaluate(SCRUB, 0.5)  # once for the compiler
        return [tab.evaluate(SCRUB, SECONDS) for _ in range(repeats)]


def moves(page, repeats):
    """Milliseconds from a menu to the new picture, in a notebook that is open: flow map there and back."""
    label = "flow map"
    options = page.evaluate(
        """(label) => [...document.querySelectorAll(".widget-dropdown")]
        .find((each) => each.querySelector(".widget-label").textContent === label)
        .querySelectorAll("option").values().map((each) => each.value).toArray()""",
        label,
    )
    chosen = [options[(k + 1) % len(options)] for k in range(len(options) * (1 + repeats))]
    times = [page.evaluate(MOVE, [label, shown]) for shown in chosen]
    return times[len(options) :]  # the first round loads each student


def table(figures):
    """The figures beside their bars, as text; with what the machine was doing."""
    width = max(len(what) for what, *_ in BARS.values())
    lines = [f"{'median of several':<{width}}  {'measured':>16}  bar"]
    short = missed(figures)
    for name, (what, unit, word, bar) in BARS.items():
        middle, spread = statistics.median(figures[name]), f"{min(figures[name]):.3g} to {max(figures[name]):.3g}"
        verdict = "MISSED" if name in short else "holds"
        lines += [f"{what:<{width}}  {middle:>7.3g} {unit:<8}  {word} {bar}: {verdict} ({spread})"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return "\n".join([*lines, f"{cores} of {os.cpu_count()} cores{load} (of the whole machine)"])


def missed(figures):
    """The names of the bars that are not met."""
    middle = {name: statistics.median(figures[name]) for name in BARS}
    return [
        name
        for name, (_, _, word, bar) in BARS.items()
        if (middle[name] < bar if word == "at least" else middle[name] > bar)
    ]


def report(repeats=5, quiet=False):
    """Measure and print the table; 1 if a bar is missed."""
    if repeats < 1:
        raise InputError(f"{repeats} repeats; expected at least 1")
    figures = run(repeats, quiet)
    print(table(figures))
    return 1 if missed(figures) else 0
