"""How quickly the scenes answer, measured in a headless Chromium: each figure with its bar.

`python -m benchmarks.scene_speed` takes five minutes on two cores; its exit status is 1 if a bar is missed.
"""

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright
from tqdm import tqdm

from benchmarks.browser import (
    jupyter_lab,
    open_notebook,
    page_faults,
    run_cells,
    served,
    shut_down,
    watched,
    write_notebook,
)
from minianyflow.live.pages import DONE, READY, chromium, write_pages
from minianyflow.support import cli, install
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT

PARTICLES, PANELS = 1000, 4
SCRUB_STEPS, CONTROL_STEPS = 32, 16
SECONDS = 2.0  # of scrubbing, per measurement
BARS = {
    "scrub": (f"scrubbing, {PARTICLES} particles x {SCRUB_STEPS} steps x {PANELS} panels", "frames/s", "at least", 30),
    "drag": ("dragged noise to new jumps and exact path, all panels drawn", "ms", "at most", 16),
    "network": (f"{PARTICLES} points x {CONTROL_STEPS} steps in the page", "ms", "at most", 200),
    "draw": ("drawn heart recognisable in one step (path error .1), the mixture alone", "s", "at most", 5),
    "control": ("JupyterLab: control moved to first picture, 16 steps", "ms", "at most", 30),
    "complete": (f"the same to all {PARTICLES} particles and their measures", "ms", "at most", 600),
    "notebook": ("opened notebook, kernel ready, to the first picture", "s", "at most", 3),
    "page": ("page opened from a file to the first picture", "s", "at most", 2),
    "size": ("the race's page, all students in it", "MB", "at most", 1),
    "link": ("link to the site's first scene that moves under the hand", "s", "at most", 2),
    "site": ("whole site", "MB", "at most", 25),
    "built": ("the site built, by its command", "s", "at most", 60),
    "faults": ("faults of its pages: file and http, 1400 and 390 px, light and dark", "", "at most", 0),
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

# From the change of a menu until the new picture is drawn; and until all particles and measures are there.
MOVE = """async () => {
  const root = document.querySelector(".lm-player"), menu = document.querySelector('[name="flow_map"]');
  const until = (attribute, holds) => new Promise((done) => {
    const watch = new MutationObserver(() => holds() && (watch.disconnect(), done(performance.now() - began)));
    watch.observe(root, { attributes: true, attributeFilter: [attribute] });
  });
  const before = root.dataset.serial, began = performance.now();
  const drawn = until("data-serial", () => root.dataset.serial !== before);
  const complete = until("data-done", () => root.dataset.done === "1");
  menu.selectedIndex = (menu.selectedIndex + 1) % menu.options.length;
  menu.dispatchEvent(new Event("input", { bubbles: true }));
  return [await drawn, await complete];
}"""

# A noise moves by a hair; counted is all work until the picture is drawn.
DRAG = """async () => {
  const root = document.querySelector(".lm-player"), { world, again } = player;
  await new Promise(requestAnimationFrame);
  const began = performance.now();
  world.drag(0, [Math.random(), Math.random()], new Set(player.shown().paths));
  again();
  const worked = performance.now() - began;
  const frame = await new Promise(requestAnimationFrame); // of the browser; the player draws in it, before this goes on
  return worked + performance.now() - frame;
}"""

# Seconds of training until one step is .1 from the exact ends.
LEARN = """async () => {
  player.set({ learners: "mixed" });
  document.querySelector(".lm-bar button").click();
  const [pupil] = player.world.school.pupils;
  while (!pupil.history.some(([, error]) => error <= 0.1)) await new Promise((done) => setTimeout(done, 50));
  return pupil.history.find(([, error]) => error <= 0.1)[0];
}"""

NETWORK = """(steps) => {
  const u = player.world.map("teacher_step", "spiral"), z = player.world.z, began = performance.now();
  let state = Float64Array.from(z), speed = new Float64Array(z.length);
  for (let k = 0; k < steps; k++) {
    u(state, z.length / 2, 1 - k / steps, 1 - (k + 1) / steps, speed);
    state = state.map((value, i) => value - speed[i] / steps);
  }
  return performance.now() - began;
}"""


# A scene in a frame of the site follows the hand: the time is moved, and another picture is drawn.
FOLLOWS = """() => {
  const range = document.querySelector(".lm-player input[type=range]"), { dataset } = range.closest(".lm-player");
  range.value = 0.5;
  range.dispatchEvent(new Event("input"));
  return new Promise((done) => {
    const look = () => (dataset.position === "0.5000" ? done() : requestAnimationFrame(look));
    look();
  });
}"""


def run(repeats: int = 5, quiet: bool = False) -> dict[str, list[float]]:
    """Measure everything `repeats` times; returns {name: [figures]}."""
    if repeats < 1:
        raise InputError(f"{repeats} repeats; expected at least 1")
    with ExitStack() as stack:
        browser = stack.enter_context(chromium(stack.enter_context(sync_playwright())))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        bar = stack.enter_context(tqdm(total=2 + repeats, unit="measurement", disable=quiet or None))
        figures = {name: [] for name in BARS}
        page, paper = write_pages(folder / "pages", ["race", "draw"], quiet=True)
        figures["size"] = [page.stat().st_size / 1e6]
        for _ in range(repeats):
            with watched(browser) as tab:
                start = time.perf_counter()
                tab.goto(page.as_uri())
                tab.wait_for_selector(READY)
                figures["page"].append(time.perf_counter() - start)
                tab.wait_for_selector(DONE)
                tab.evaluate(f"player.set({{steps: {CONTROL_STEPS}}})")
                tab.wait_for_selector(DONE)
                for _ in range(3):  # the first ones are the compiler's
                    dragged, evaluated = tab.evaluate(DRAG), tab.evaluate(NETWORK, CONTROL_STEPS)
                figures["drag"].append(dragged)
                figures["network"].append(evaluated)
                tab.evaluate(f"player.set({{steps: {SCRUB_STEPS}}})")
                tab.wait_for_selector(DONE)
                tab.evaluate(SCRUB, 0.5)
                figures["scrub"].append(tab.evaluate(SCRUB, SECONDS))
            with watched(browser) as tab:
                tab.goto(paper.as_uri())
                tab.wait_for_selector(DONE)
                figures["draw"].append(tab.evaluate(LEARN))
            bar.update()
        site, start = folder / "site", time.perf_counter()
        subprocess.run([sys.executable, "-m", "minianyflow", "site", "--output", site, "--quiet"], cwd=ROOT, check=True)
        figures["built"] = [time.perf_counter() - start]
        figures["site"] = [sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6]
        with served(site) as address:
            for _ in range(repeats):
                with watched(browser) as tab:
                    start = time.perf_counter()
                    tab.goto(address, wait_until="commit")
                    scene = tab.locator("iframe.scene").first.element_handle().content_frame()
                    scene.wait_for_selector(READY)
                    scene.evaluate(FOLLOWS)
                    figures["link"].append(time.perf_counter() - start)
        figures["faults"] = [len(page_faults(browser, site)[1])]
        bar.update()
        scene = f"from minianyflow.live import scenes\nscenes.race(steps={CONTROL_STEPS})"
        write_notebook(folder / "race.ipynb", scene)
        address = stack.enter_context(jupyter_lab(folder))
        for _ in range(max(1, repeats // 2)):
            with watched(browser) as tab:
                open_notebook(tab, address, "race.ipynb")
                start = time.perf_counter()
                run_cells(tab)
                tab.wait_for_selector(READY)
                figures["notebook"].append(time.perf_counter() - start)
                tab.wait_for_selector(DONE)
                moved = [tab.evaluate(MOVE) for _ in range(4)]  # each to a student that was not shown before
                figures["control"] += [first for first, _ in moved]
                figures["complete"] += [complete for _, complete in moved]
                shut_down(tab)
        bar.update()
    return figures


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
    install.browser()
    figures = run(arguments.repeats, arguments.quiet)
    print(table(figures))
    return 1 if missed(figures) else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
