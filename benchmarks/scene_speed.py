"""How quickly the scenes answer, measured in a headless Chromium: four figures, each with its bar.

`python -m benchmarks.scene_speed` takes a minute or two; its exit status is 1 if a bar is missed.
"""

import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright
from tqdm import tqdm

from benchmarks.browser import jupyter_lab, open_notebook, run_cells, shut_down, watched
from minianyflow.live.app import serve, write_notebook
from minianyflow.live.pages import READY, chromium, page_text
from minianyflow.live.player import Pack
from minianyflow.live.scenes import open_scene
from minianyflow.support import cli, install
from minianyflow.support.errors import InputError

PARTICLES, PANELS = 1000, 3
SCRUB_STEPS, CONTROL_STEPS = 32, 16
SECONDS = 2.0  # of scrubbing, per measurement
BARS = {
    "scrub": (f"scrubbing, {PARTICLES} particles x {SCRUB_STEPS} steps x {PANELS} panels", "frames/s", "at least", 30),
    "control": (f"control moved to new picture, {PARTICLES} particles, {CONTROL_STEPS} steps", "ms", "at most", 150),
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
  const menu = menus.find((menu) => menu.querySelector(".widget-label").textContent === label).querySelector("select");
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


def run(repeats: int = 5, quiet: bool = False) -> dict[str, list[float]]:
    """Measure all four `repeats` times; returns {name: [figures]}."""
    if repeats < 1:
        raise InputError(f"{repeats} repeats; expected at least 1")
    with ExitStack() as stack:
        browser = stack.enter_context(chromium(stack.enter_context(sync_playwright())))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        bar = stack.enter_context(tqdm(total=2 + 2 * repeats, unit="measurement", disable=quiet or None))
        figures = {"scrub": scrub(browser, folder, repeats)}
        bar.update()
        figures |= {name: [] for name in BARS if name not in figures}
        write_notebook(
            folder / "race.ipynb", f"from minianyflow.live import scenes\nscenes.race(steps={CONTROL_STEPS})"
        )
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


def scrub(browser, folder: Path, repeats: int) -> list[float]:
    """Frames per second, `repeats` times, of the race without the panel of the exact flow."""
    race, pack = open_scene("race", steps=SCRUB_STEPS), Pack()
    scene = race.draw(pack, particles=PARTICLES, **race.state())
    scene["panels"] = scene["panels"][-PANELS:]
    page = {"title": race.title, "controls": [], "scenes": {"": scene}}
    (folder / "scrub.html").write_text(page_text(page, pack.payload), encoding="utf-8")
    with watched(browser) as tab:
        tab.goto((folder / "scrub.html").as_uri())
        tab.wait_for_selector(READY)
        tab.evaluate(SCRUB, 0.5)  # once for the compiler
        return [tab.evaluate(SCRUB, SECONDS) for _ in range(repeats)]


def moves(page, repeats: int) -> list[float]:
    """Milliseconds from a change of the menu `flow map` to the new picture, in a notebook that is open."""
    label = "flow map"
    options = page.evaluate(
        """(label) => [...document.querySelectorAll(".widget-dropdown")]
        .find((menu) => menu.querySelector(".widget-label").textContent === label)
        .querySelectorAll("option").values().map((each) => each.value).toArray()""",
        label,
    )
    chosen = [options[(k + 1) % len(options)] for k in range(len(options) * (1 + repeats))]
    times = [page.evaluate(MOVE, [label, shown]) for shown in chosen]
    return times[len(options) :]  # the first round loads each student


def missed(figures: dict[str, list[float]]) -> list[str]:
    """The names of the bars that are not met."""
    middle = {name: statistics.median(figures[name]) for name in BARS}
    better = {"at least": lambda figure, bar: figure >= bar, "at most": lambda figure, bar: figure <= bar}
    return [name for name, (_, _, word, bar) in BARS.items() if not better[word](middle[name], bar)]


def table(figures: dict[str, list[float]]) -> str:
    """The figures beside their bars, and the load of the machine, as text."""
    width = max(len(what) for what, *_ in BARS.values())
    lines = [f"{'median of several':<{width}}  {'measured':>16}  bar"]
    for name, (what, unit, word, bar) in BARS.items():
        middle, spread = statistics.median(figures[name]), f"{min(figures[name]):.3g} to {max(figures[name]):.3g}"
        verdict = "MISSED" if name in missed(figures) else "holds"
        lines += [f"{what:<{width}}  {middle:>7.3g} {unit:<8}  {word} {bar}: {verdict} ({spread})"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return "\n".join([*lines, f"{cores} of {os.cpu_count()} cores{load} (of the whole machine)"])


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table; 1 if a bar is missed."""
    parser = cli.Parser("python -m benchmarks.scene_speed", description=__doc__)
    parser.add_argument("--repeats", default=5, type=int, help="of every measurement (default: 5)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    install.browser(install=True)
    figures = run(arguments.repeats, arguments.quiet)
    print(table(figures))
    return 1 if missed(figures) else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
