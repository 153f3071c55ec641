"""The command line: its commands, a parser and a runner whose complaints are one line each.

This module needs nothing but Python until a command that needs more is run: `setup` installs the rest.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
import traceback
from importlib import import_module

from minianyflow.support.errors import InputError, choose

LONGEST = 1000  # characters of an error
PATIENCE = 10  # seconds that further processes keep an error to themselves
COMMANDS = {  # name: where its function of argv is; docs/ is in no wheel
    "setup": "support.commands:setup",
    "demo": "plane.commands:demo",
    "exposure": "plane.commands:exposure",
    "weights": "video.commands:weights",
    "video": "video.commands:video",
    "lab": "support.commands:lab",
    "live": "live.commands:live",
    "live-html": "live.commands:live_html",
    "site": "docs.site:site",
    "make-tiny-wan": "wan.commands:make_tiny_wan",
    "prepare-latents": "wan.data.commands:prepare_latents",
    "plan": "planner.commands:plan",
    "gpu-check": "planner.commands:gpu_check",
    "distill": "wan.commands:distill",
    "sample": "wan.commands:sample",
    "export": "wan.commands:export",
    "evaluate": "wan.commands:evaluate",
    "course": "docs.course:course",
    "exercises": "docs.course:exercises",
    "docs": "docs.pages:docs",
    "check": "support.commands:check",
    "test": "support.commands:test",
    "test-all": "support.commands:test_all",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like all others; `run` takes --traceback."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.add_argument("--traceback", action="store_true", help="show where an error comes from")

    def parse_known_args(self, args=None, namespace=None):
        """The arguments without --traceback."""
        for word in sys.argv[1:] if args is None else args:
            if re.fullmatch("--[a-z-]+=--", word):  # Python before 3.13 takes it for an empty list
                self.error(f"{word} gives no value")
        found, others = super().parse_known_args(args, namespace)
        vars(found).pop("traceback", None)
        for value in vars(found).values():
            for word in value if isinstance(value, list) else [value]:
                if str(word).startswith("~/"):
                    self.error(f"{word}: nobody has put a folder in the place of this ~; write the whole path")
        return found, others

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


def command(name):
    """The function of a command: it takes the arguments behind its name and returns the exit status."""
    module, function = choose("command", name, COMMANDS).split(":")
    if not module.startswith("docs."):
        return getattr(import_module(f"minianyflow.{module}"), function)
    from minianyflow.support.install import ROOT, needs_checkout

    needs_checkout(name)
    sys.path += [str(ROOT)] * (str(ROOT) not in sys.path)
    return getattr(import_module(module), function)


def main(argv=None):
    """Run one command; returns its exit status. Every error is one line; --traceback shows where it comes from."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave their cores to others
    os.environ.pop("MPLBACKEND", None)  # of a notebook or a desktop: commands draw into files
    os.environ["MATPLOTLIBRC"] = os.devnull  # a person's own settings would change the pictures
    if os.path.exists("matplotlibrc"):  # which matplotlib prefers to any other
        with contextlib.suppress(ImportError):  # before set-up
            import matplotlib

            matplotlib.rcdefaults()
            matplotlib.use("agg")  # rcdefaults leaves the backend
    named = argv and argv[0] not in ("-h", "--help")
    return run((lambda: command(argv[0])(argv[1:])) if named else (lambda: _list_commands(argv)), argv)


def _list_commands(argv):
    lines = [f"  {name:16}{_about(name)}" for name in COMMANDS]
    print("python -m minianyflow COMMAND [--help]\n\n" + "\n".join(lines), file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2


def _about(name):
    try:
        return command(name).__doc__.splitlines()[0]
    except InputError as problem:  # no checkout
        return str(problem)


def _interrupt(number, frame):
    raise KeyboardInterrupt


def run(command, argv=None):
    """command(), whose exit status is returned: every error is one line on stderr, every interruption too.

    A stack trace is printed if --traceback is among the arguments, argv.
    """
    try:
        signal.signal(signal.SIGTERM, _interrupt)  # a polite kill is an interruption, too
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # letters that a locale does not have end no work
        status = command()
        if sys.stdout:
            sys.stdout.flush()  # a full disk is told of here, not while Python ends
        return status
    except BaseException as problem:  # a panic of a library in Rust is no Exception
        if isinstance(problem, SystemExit | GeneratorExit):
            raise
        status, line = _explained(problem)
        _drop_unwritten()
        if "--traceback" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        elif status != 130 and os.environ.get("LOCAL_RANK", "0") not in ("", "0"):  # one of several processes
            for number in (signal.SIGTERM, signal.SIGINT):  # its launcher ends it once another has ended
                signal.signal(number, signal.SIG_DFL)
            time.sleep(PATIENCE)
        if line:
            print(line if len(line) <= LONGEST else f"{line[:LONGEST]} ...", file=sys.stderr)
        return status


def _explained(problem):
    """(exit status, one line or none) of what ended a command."""
    kinds = {kind.__name__ for kind in type(problem).__mro__}
    words = " ".join((getattr(problem, "strerror", None) or str(problem)).split())
    causes = [problem]  # a library that was being imported may have made another error of an interruption
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    ours = isinstance(problem, InputError | OSError)
    if not ours and any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return 130, "\ninterrupted: what is unfinished does not count; run the same command again"
    if isinstance(problem, InputError):
        return 2, f"error: {words}"
    if isinstance(problem, ModuleNotFoundError):
        where = "`.venv/bin/python` (on Windows `.venv\\Scripts\\python`), or `make`"
        return 2, f"error: {problem.name} is not installed here; run `python -m minianyflow setup`, then use {where}"
    if isinstance(problem, BrokenPipeError):
        return 141, ""  # who reads the output has left, as `| head` does
    if isinstance(problem, MemoryError) or "OutOfMemoryError" in kinds or "allocate memory" in words:
        return (
            2,
            f"error: out of memory ({words or 'no details'}); ask for less at a time: smaller sizes, fewer workers",
        )
    if isinstance(problem, UnicodeEncodeError):
        found = f"{problem.object[max(0, problem.start - 99) : problem.end]!a} cannot be written as {problem.encoding}"
        return 2, f"error: {found}; expected names and texts in UTF-8: set PYTHONUTF8=1 and run the same again"
    if isinstance(problem, OSError):
        place = problem.filename2 or problem.filename or "the output"
        return 2, f"error: {place}: {words}; expected a place to read and write with room left: mend it, run again"
    if isinstance(problem, RecursionError):
        return 2, "error: an input is nested too deeply; expected a few levels: look at the files that were given"
    return 1, f"error: {type(problem).__name__}: {words}; that was not foreseen: --traceback shows where"


def _drop_unwritten():
    """Let nothing that stdout could not take come up again while Python ends."""
    try:
        sys.stdout.flush()
    except (AttributeError, ValueError):  # no stdout, or a closed one
        pass
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def utf8(text):
    """A text as the type of an argument; bytes that are not UTF-8 are refused."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!a} is not UTF-8; expected a text that is") from None
    return text


def seed(text):
    """A whole number that a random generator takes, as the type of an argument."""
    if not re.fullmatch(r"-?[0-9]{1,15}", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at most 15 digits")
    return int(text)


def whole_numbers(text):
    """'0,1,2' to (0, 1, 2), as the type of an argument."""
    try:
        return tuple(seed(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers with commas between, like 0,1,2") from None
