"""Distil Wan2.1, one stage per run: `minianyflow distill`."""

import sys

from minianyflow.support.cli import run
from minianyflow.wan.commands import distill

if __name__ == "__main__":
    sys.exit(run(lambda: distill(sys.argv[1:])))
