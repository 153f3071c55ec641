"""The commands that set the project up and test it. They belong to a checkout; the rest work from a wheel too."""

import subprocess
import sys
from importlib import import_module

from minianyflow.support.cli import Parser
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT, audit, browser, lowest_python
from minianyflow.support.install import setup as install


def setup(argv):
    """Make .venv and install the pinned packages into it; does nothing where that is done."""
    parser = Parser("minianyflow setup", description=setup.__doc__)
    parser.add_argument("--browser", action="store_true", help="also get Debian's chromium by apt-get, where none is")
    arguments = parser.parse_args(argv)
    _needs_checkout("setup")
    if arguments.browser:
        browser(install=True)
    return install()


def test(argv):
    """Run every test but the long ones, browser and notebooks too, in two processes: a quarter of an hour."""
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
    _needs_checkout("check")
    steps = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["minianyflow", "docs", "--check"])
    failed = [step for step in steps if subprocess.call([sys.executable, "-m", *step], cwd=ROOT)]
    return bool(failed) or _pytest("-m", FAST, "tests")


def docs(argv):
    """Write the tables of README.md and docs/ from the committed reports; --check only compares."""
    parser = Parser("minianyflow docs", description=docs.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not current")
    check = parser.parse_args(argv).check
    stale = from_checkout("docs.pages").write(check)
    print("\n".join(f"{page}: {'not current' if check else 'written'}" for page in stale) or "all tables are current")
    return int(check and bool(stale))


FAST = "not slow and not long"
PINNED = "tests/support/test_packages.py::test_what_is_installed_is_what_is_pinned"
SLOWEST_FIRST = ("notebooks", "tests/wan", "tests/live", "tests")  # a file is one worker's: no large one comes last


def _pytest(*arguments, python=sys.executable):
    _needs_checkout("test")
    workers = ("--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder")
    return subprocess.call([python, "-m", "pytest", *workers, *arguments], cwd=ROOT)


def _look_for_browser():
    try:
        browser()
    except InputError as problem:
        print(f"{problem}; the tests that need it will fail", file=sys.stderr)


def from_checkout(module):
    """A module of the checkout that is in no wheel."""
    _needs_checkout(module)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return import_module(module)


def _needs_checkout(command):
    if not (ROOT / "pyproject.toml").is_file():
        raise InputError(f"{command} works in a checkout of the project; expected one: this is an installed package")
