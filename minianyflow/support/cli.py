"""The command line's own parts: a parser and a runner whose complaints are one line each. Needs nothing but Python."""

import argparse
import signal
import sys

from minianyflow.support.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like all others."""

    def error(self, message):
        """Raise instead of printing the usage."""
        raise InputError(f"{message}; see {self.prog} --help")


def experiment_parser(command, output, seeds=None):
    """A parser with the options of every experiment: --output, --workers, --quiet, and --seeds if it takes some."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(f"minianyflow {command.__name__}", description=command.__doc__, formatter_class=defaults)
    if seeds:
        parser.add_argument("--seeds", default=seeds, type=whole_numbers, help="trained together, as one network")
    parser.add_argument("--output", default=output, help="folder for what is written")
    parser.add_argument("--workers", default=2, type=int, help="processes; each takes one core")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def run(command):
    """command(), whose exit status is returned: bad input, a missing package and an interruption are one line each."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is an interruption, too
        return command()
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        where = "`.venv/bin/python` (on Windows `.venv\\Scripts\\python`), or `make`"
        problem = f"{missing.name} is not installed here; run `python -m minianyflow setup`, then use {where}"
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what is unfinished does not count; run the same command again", file=sys.stderr)
        return 130


def whole_numbers(text):
    """'0,1,2' to (0, 1, 2), as the type of an argument."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers with commas between, like 0,1,2") from None
