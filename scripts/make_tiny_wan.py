"""Make a tiny Wan of random weights: `minianyflow make-tiny-wan`."""

import sys

from minianyflow.support.cli import run
from minianyflow.wan.commands import make_tiny_wan

if __name__ == "__main__":
    sys.exit(run(lambda: make_tiny_wan(sys.argv[1:])))
