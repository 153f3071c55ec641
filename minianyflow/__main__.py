"""The command line: `python -m minianyflow COMMAND`. `make` calls nothing else.

This module needs nothing but Python until a command that needs more is run: `setup` installs the rest.
"""

import argparse
import subprocess
import sys
from dataclasses import replace

from minianyflow.errors import InputError
from minianyflow.install import ROOT, setup


def demo(arguments):
    """Race every method against the exact answer; writes any_step.json and any_step.png."""
    from minianyflow.demo import run, table

    report = run(**experiment(arguments))
    floors = (
        report["exact_flow"]["sliced_w2"],
        report["measure"]["renoised_floor"],
        report["reference_floor"]["sliced_w2"],
    )
    print(f"\n{table(report)}")
    print(
        "the exact flow reads {:.1f}, fresh samples {:.1f}, the data itself {:.1f}".format(*(1000 * f for f in floors))
    )
    print(f"\n{table(report, 'path_error')}")
    print(f"\nwritten: {arguments.output}/any_step.json, {arguments.output}/any_step.png")
    return 0


def ablate(arguments):
    """Change one thing at a time in the mixed flow map and in the baseline: 15 minutes; writes ablation.json."""
    from minianyflow.ablation import run
    from minianyflow.demo import table

    report = run(**experiment(arguments))
    print(f"\n{table(report)}\n\n{table(report, 'path_error')}\n\nwritten: {arguments.output}/ablation.json")
    return 0


def experiment(arguments):
    """What the commands that train take, as their functions take it."""
    from minianyflow.demo import BUDGET

    return {
        "dataset": arguments.dataset,
        "seeds": whole_numbers(arguments.seeds),
        "budget": BUDGET if arguments.steps is None else replace(BUDGET, steps=arguments.steps),
        "output": arguments.output,
        "workers": arguments.workers,
        "quiet": arguments.quiet,
    }


def test(arguments):
    """Run every test, or with --fast the quick ones."""
    quick = ["-m", "not slow"] if arguments.fast else []
    return subprocess.call([sys.executable, "-m", "pytest", *quick], cwd=ROOT)


def check(arguments):
    """The quick loop: lint, then the fast tests."""
    arguments.fast = True
    ruff = [sys.executable, "-m", "ruff"]
    lint = subprocess.call([*ruff, "check", "."], cwd=ROOT) or subprocess.call(
        [*ruff, "format", "--check", "."], cwd=ROOT
    )
    return lint or test(arguments)


def whole_numbers(text):
    """'0,1,2' to (0, 1, 2)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"seeds {text!r}; expected whole numbers with commas between, like 0,1,2") from None


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like all others."""

    def error(self, message):
        """Raise instead of printing the usage."""
        raise InputError(f"{message}; see {self.prog} --help")


def parse(argv):
    """The arguments of a command, and the function that runs it under `.command`."""
    parser = Parser("python -m minianyflow", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(function):
        each = commands.add_parser(
            function.__name__,
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
        each.add_argument("--steps", type=int, help="training steps of every method (default: the demo's budget)")
        each.add_argument("--output", default=output, help="folder for what is written")
        each.add_argument("--workers", default=2, type=int, help="processes; each trains one method on one core")
        each.add_argument("--quiet", action="store_true", help="no progress bars")
    add(test).add_argument("--fast", action="store_true", help="leave out the tests marked slow")
    add(check)
    return parser.parse_args(argv)


def main(argv=None):
    """Run one command; returns its exit status. Bad input is one line, an interruption too."""
    try:
        arguments = parse(argv)
        return arguments.command(arguments)
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written; run the same command again to start over", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
