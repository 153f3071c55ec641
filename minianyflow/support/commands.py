"""The commands that set the project up and test it. They belong to a checkout; the rest work from a wheel too."""

import os
import subprocess
import sys

from minianyflow.support.cli import Parser
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT, audit, browser, lowest_python, needs_checkout
from minianyflow.support.install import setup as install


def setup(argv):
    """Make .venv and install the pinned packages into it; does nothing where that is done."""
    parser = Parser("minianyflow setup", description=setup.__doc__)
    parser.add_argument("--browser", action="store_true", help="also get Debian's chromium by apt-get, where none is")
    arguments = parser.parse_args(argv)
    needs_checkout("setup")
    if arguments.browser:
        browser(install=True)
    return install()


def test(argv):
    """Run every test but the long ones, browser and notebooks too, in three processes: a quarter of an hour."""
    Parser("minianyflow test", description=test.__doc__).parse_args(argv)
    _look_for_browser()
    return _pytest("--nbmake", "--nbmake-timeout=600", "-m", "not long", *SLOWEST_FIRST)


def test_all(argv):
    """Run every test, then the fast ones with the lowest versions, then audit the packages: half an hour or more."""
    Parser("minianyflow test-all", description=test_all.__doc__).parse_args(argv)
    _look_for_browser()
    failed = _pytest("--nbmake", "--nbmake-timeout=900", *SLOWEST_FIRST)
    failed = _pytest("-m", FAST, f"--deselect={PINNED}", "tests", python=lowest_python()) or failed
    wrong, unknown = audit()
    print("\n".join([*wrong, *unknown] or ["the pinned packages have no known vulnerability"]))
    return bool(wrong) or failed


def check(argv):
    """The quick loop, under a minute: lint, the floors of the house, tables in the docs, then the fast tests."""
    Parser("minianyflow check", description=check.__doc__).parse_args(argv)
    needs_checkout("check")
    steps = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["minianyflow", "docs", "--check"])
    failed = [step for step in steps if subprocess.call([sys.executable, "-m", *step], cwd=ROOT)]
    return bool(failed) or _pytest("-m", FAST, "tests")


def lab(argv: list[str]) -> int:
    """Open the course in JupyterLab."""
    Parser("minianyflow lab", description=lab.__doc__).parse_args(argv)
    command = [sys.executable, *lab_command(), "--LabApp.default_url=/lab/tree/notebooks/README.md"]
    return subprocess.call(command, cwd=ROOT)


def lab_command(alone: int = 600) -> list[str]:
    """The arguments of python that start JupyterLab, for the command and for the tests.

    A kernel ends when its notebook is closed (notebooks/.lab), or `alone` seconds after its page is gone.
    """
    options = {"LabApp.app_settings_dir": ROOT / "notebooks/.lab", "MappingKernelManager.cull_idle_timeout": alone}
    options |= {"MappingKernelManager.cull_interval": min(alone, 30), "MappingKernelManager.cull_connected": False}
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # or it refuses, in a container
    return ["-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items()), *root]


FAST = "not slow and not long"
PINNED = "tests/support/test_packages.py::test_what_is_installed_is_what_is_pinned"
SLOWEST_FIRST = ("notebooks", "tests/wan", "tests/live", "tests")  # a file is one worker's: no large one comes last


def _pytest(*arguments, python=sys.executable):
    needs_checkout("test")
    # the slow ones in three on two cores: one often waits, for a kernel, a browser or processes of its own
    workers = (f"--numprocesses={2 if FAST in arguments else 3}", "--dist=loadfile", "--no-loadscope-reorder")
    return subprocess.call([python, "-m", "pytest", *workers, *arguments], cwd=ROOT)


def _look_for_browser():
    try:
        browser()
    except InputError as problem:
        print(f"{problem}; the tests that need it will fail", file=sys.stderr)
