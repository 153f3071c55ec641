"""Sample a run, an export or released weights: `minianyflow sample`."""

import sys

from minianyflow.support.cli import run
from minianyflow.wan.commands import sample

if __name__ == "__main__":
    sys.exit(run(lambda: sample(sys.argv[1:])))
