"""The command line: `python -m minianyflow COMMAND`. `make` and the files of scripts/ call nothing else.

This module needs nothing but Python until a command that needs more is run: `setup` installs the rest.
"""

import sys


def _interrupted(kind, problem, trace, other=sys.excepthook):
    """Ctrl-C while Python loads is one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        other(kind, problem, trace)


sys.excepthook = _interrupted

from importlib import import_module  # noqa: E402

from minianyflow.support.cli import run  # noqa: E402
from minianyflow.support.errors import choose  # noqa: E402

COMMANDS = {  # name: where its function of argv is
    "setup": "support.commands:setup",
    "demo": "plane.commands:demo",
    "ablate": "plane.commands:ablate",
    "exposure": "plane.commands:exposure",
    "weights": "video.commands:weights",
    "video": "video.commands:video",
    "lab": "course.commands:lab",
    "live": "live.commands:live",
    "live-html": "live.commands:live_html",
    "site": "live.site:site",
    "make-tiny-wan": "wan.commands:make_tiny_wan",
    "prepare-latents": "wan.data.commands:prepare_latents",
    "plan": "planner.commands:plan",
    "gpu-check": "planner.commands:gpu_check",
    "distill": "wan.commands:distill",
    "sample": "wan.commands:sample",
    "export": "wan.commands:export",
    "evaluate": "wan.commands:evaluate",
    "course": "course.commands:course",
    "exercises": "course.commands:exercises",
    "docs": "course.docs:docs",
    "check": "support.commands:check",
    "test": "support.commands:test",
    "test-all": "support.commands:test_all",
}


def command(name):
    """The function of a command: it takes the arguments behind its name and returns the exit status."""
    module, function = choose("command", name, COMMANDS).split(":")
    return getattr(import_module(f"minianyflow.{module}"), function)


def main(argv=None):
    """Run one command; returns its exit status. Every error is one line; --traceback shows where it comes from."""
    argv = sys.argv[1:] if argv is None else argv
    named = argv and argv[0] not in ("-h", "--help")
    return run((lambda: command(argv[0])(argv[1:])) if named else (lambda: _list_commands(argv)), argv)


def _list_commands(argv):
    lines = [f"  {name:16}{command(name).__doc__.splitlines()[0]}" for name in COMMANDS]
    print("python -m minianyflow COMMAND [--help]\n\n" + "\n".join(lines), file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2


if __name__ == "__main__":
    sys.exit(main())
