"""The command line: `python -m minianyflow COMMAND`. `make` and the files of scripts/ call nothing else."""

import sys


def _interrupted(kind, problem, trace, other=sys.excepthook):
    """Ctrl-C while Python loads is one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        other(kind, problem, trace)


sys.excepthook = _interrupted

from minianyflow.support.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
