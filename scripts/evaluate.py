"""Evaluate sources at 1 to 128 steps: `minianyflow evaluate`."""

import sys

from minianyflow.support.cli import run
from minianyflow.wan.commands import evaluate

if __name__ == "__main__":
    sys.exit(run(lambda: evaluate(sys.argv[1:])))
