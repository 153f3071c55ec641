"""The command line: `python -m minianyflow COMMAND`. `make` calls nothing else.

This module needs nothing but Python until a command that needs more is run: `setup` installs the rest.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from minianyflow.support.cli import Parser, run, whole_numbers
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT, browser, setup


def demo(arguments):
    """Race every method against the exact answer; writes any_step.json and any_step.png."""
    from minianyflow.plane.race import run, table

    report = run(**experiment(arguments))
    floors = (
        report["exact_flow"]["sliced_w2"],
        report["fresh_noise"]["sliced_w2"],
        report["fresh_noise"]["sliced_w2_pooled"],
        report["reference_floor"]["sliced_w2"],
    )
    print(f"\n{table(report)}")
    print(
        "floors: exact flow {:.1f}, fresh noise {:.1f} (pooled {:.1f}), data {:.1f}".format(*(1000 * f for f in floors))
    )
    print(f"\n{table(report, 'path_error')}")
    print(f"\nwritten: {arguments.output}/any_step.json, {arguments.output}/any_step.png")
    return 0


def ablate(arguments):
    """Change one thing at a time in the mixed flow map and in the baseline, twenty minutes; writes ablation.json."""
    from minianyflow.plane.ablation import run
    from minianyflow.plane.race import table

    report = run(**experiment(arguments))
    print(f"\n{table(report)}\n\n{table(report, 'path_error')}\n\nwritten: {arguments.output}/ablation.json")
    return 0


def weights(arguments):
    """Train the video codec, teacher and students, an hour; says how they compare with those in toy_data/video."""
    from minianyflow.video.report import comparison
    from minianyflow.video.stages import train_all

    train_all(arguments.output, arguments.workers, arguments.quiet)
    print(comparison(arguments.output, arguments.workers, arguments.quiet))
    return 0


def video(arguments):
    """Measure the trained video students at 1 to 128 steps, about 40 minutes; writes any_step.json and pictures."""
    from minianyflow.video.report import run, table

    nfes = whole_numbers(arguments.nfe, "step counts")
    report = run(arguments.weights, arguments.output, None, nfes, arguments.workers, arguments.quiet)
    print(f"\n{table(report)}\n")
    print(f"written to {arguments.output}: any_step.json, any_step.png, from_ideal.png, contact_sheet.png")
    return 0


def exposure(arguments):
    """Exposure bias on the circle process, where it is exact, six minutes; writes exposure.json and exposure.png."""
    from minianyflow.plane.exposure import run

    run(whole_numbers(arguments.seeds), output=arguments.output, workers=arguments.workers, quiet=arguments.quiet)
    print(f"\nwritten: {arguments.output}/exposure.json, {arguments.output}/exposure.png")
    return 0


def experiment(arguments):
    """What the commands that train take, as their functions take it."""
    from minianyflow.plane.race import BUDGET

    return {
        "dataset": arguments.dataset,
        "seeds": whole_numbers(arguments.seeds),
        "budget": replace(BUDGET, steps=getattr(arguments, "steps", BUDGET.steps)),
        "output": arguments.output,
        "workers": arguments.workers,
        "quiet": arguments.quiet,
    }


def lab(arguments):
    """Open the course in JupyterLab."""
    page, settings = "/lab/tree/notebooks/README.md", ROOT / "notebooks/.lab"  # which show Markdown rendered
    options = [f"--LabApp.default_url={page}", f"--LabApp.app_settings_dir={settings}"]
    options += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # or it refuses, in a container
    return subprocess.call([sys.executable, "-m", "jupyterlab", *options], cwd=ROOT)


def live(arguments):
    """Serve the scenes as a full-window app for a class, offline, with the first one drawn before it is opened."""
    from minianyflow.live.app import run

    return run(arguments.scene, arguments.port, not arguments.no_browser)


def live_html(arguments):
    """Write each scene as one page that needs no server and no network; with --animation a GIF of the first instead."""
    from minianyflow.live.pages import animate, write_pages

    if arguments.animation:
        browser(install=True)
    names = arguments.scene or (["race"] if arguments.animation else None)
    pages = write_pages(arguments.output, names, arguments.quiet)
    written = [animate(pages[0], arguments.animation)] if arguments.animation else pages
    for path in written:
        print(f"written: {path}, {Path(path).stat().st_size / 1e6:.2f} MB")
    return 0


def bench_live(arguments):
    """Measure in a headless browser how quickly the scenes answer, a minute or two; fails if a bar is missed."""
    from benchmarks.scene_speed import main as measure

    return measure(["--repeats", str(arguments.repeats), *(["--quiet"] if arguments.quiet else [])])


def course(arguments):
    """Run the notebooks from fresh kernels and save them with their outputs, or compare them with what is saved."""
    import nbformat
    from tqdm import tqdm

    from minianyflow.course.notebooks import compare, execute, notebooks

    chosen = [path for path in notebooks() if not arguments.only or path.name.startswith(arguments.only)]
    if not chosen:
        known = ", ".join(path.name[:2] for path in notebooks())
        raise InputError(f"no notebook begins with {arguments.only!r}; expected one of {known}")
    if arguments.figures:
        try:
            Path(arguments.figures).mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise InputError(f"cannot write to {arguments.figures} ({problem.strerror}); name another folder") from None
    differences = []
    for path in tqdm(chosen, unit="notebook"):
        fresh = execute(path, arguments.figures)
        if arguments.compare:
            differences += [f"{path.name}: {line}" for line in compare(nbformat.read(path, as_version=4), fresh)]
        else:
            nbformat.write(fresh, path)
    print("\n".join(differences) or f"{len(chosen)} notebooks run, every claim holds")
    return 1 if differences else 0


def exercises(arguments):
    """Write the student's exercise files from the solutions."""
    from minianyflow.course.exercises import write_exercises

    print("\n".join(str(path.relative_to(ROOT)) for path in write_exercises()))
    return 0


def test(arguments):
    """Run every test and every notebook, or with --fast the quick tests."""
    chosen = ["-m", "not slow"] if arguments.fast else ["--nbmake", "--nbmake-timeout=600", "tests", "notebooks"]
    if not arguments.fast:
        try:
            browser(install=True)
        except InputError as problem:
            print(f"{problem}; the tests that need it will fail", file=sys.stderr)
    return subprocess.call([sys.executable, "-m", "pytest", *chosen], cwd=ROOT)


def check(arguments):
    """The quick loop: lint, then the fast tests."""
    arguments.fast = True
    ruff = [sys.executable, "-m", "ruff"]
    lint = subprocess.call([*ruff, "check", "."], cwd=ROOT) or subprocess.call(
        [*ruff, "format", "--check", "."], cwd=ROOT
    )
    return lint or test(arguments)


def parse(argv):
    """The arguments of a command, and the function that runs it under `.command`."""
    parser = Parser("python -m minianyflow", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(function):
        each = commands.add_parser(
            function.__name__.replace("_", "-"),
            help=function.__doc__.splitlines()[0],
            description=function.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        each.set_defaults(command=function)
        return each

    add(setup)
    for function, output in ((demo, "outputs/demo"), (ablate, "outputs/ablation")):
        each = add(function)
        each.add_argument("--dataset", default="spiral", help="spiral, ring8 or checkerboard")
        each.add_argument("--seeds", default="0,1,2", help="trained together, as one network")
        each.add_argument(
            "--steps",
            type=int,
            default=argparse.SUPPRESS,
            help="training steps of every method (default: 10000)",
        )
        each.add_argument("--output", default=output, help="folder for what is written")
        each.add_argument("--workers", default=2, type=int, help="processes; each trains one method on one core")
        each.add_argument("--quiet", action="store_true", help="no progress bars")
    for function, output in ((weights, "outputs/weights"), (video, "outputs/video"), (exposure, "outputs/exposure")):
        each = add(function)
        if function is exposure:
            each.add_argument("--seeds", default="0,1,2", help="trained together, as one network")
        each.add_argument("--output", default=output, help="folder for what is written")
        each.add_argument("--workers", default=2, type=int, help="processes; each takes one core")
        each.add_argument("--quiet", action="store_true", help="no progress bars")
        if function is video:
            each.add_argument("--weights", default=str(ROOT / "toy_data/video"), help="folder of the trained networks")
            each.add_argument("--nfe", default="1,2,4,8,16,32,64,128", help="step counts; fewer take less time")
    add(lab)
    each = add(live)
    each.add_argument("--scene", default="race", help="the one that is drawn first")
    each.add_argument("--port", default=8866, type=int, help="of this machine; 0 for any that is free")
    each.add_argument("--no-browser", action="store_true", help="only say the address")
    each = add(live_html)
    each.add_argument("--scene", action="append", help="only this one; may be said again (default: all)")
    each.add_argument("--output", default="outputs/live", help="folder for what is written")
    each.add_argument("--animation", metavar="GIF", help="a file to write, from noise to data, instead of all pages")
    each.add_argument("--quiet", action="store_true", help="no progress bar")
    each = add(bench_live)
    each.add_argument("--repeats", default=5, type=int, help="of every measurement")
    each.add_argument("--quiet", action="store_true", help="no progress bar")
    each = add(course)
    each.add_argument("--only", help="the number of one notebook, say 03")
    each.add_argument("--compare", action="store_true", help="write nothing; say where claims differ from those saved")
    each.add_argument("--figures", metavar="FOLDER", help="write every figure there too, for slides")
    add(exercises)
    add(test).add_argument("--fast", action="store_true", help="leave out the tests marked slow")
    add(check)
    return parser.parse_args(argv)


def main(argv=None):
    """Run one command; returns its exit status."""

    def command():
        arguments = parse(argv)
        return arguments.command(arguments)

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
