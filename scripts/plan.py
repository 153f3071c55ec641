"""Plan a run: memory, FLOP, hours and money: `minianyflow plan`."""

import sys

from minianyflow.planner.commands import plan
from minianyflow.support.cli import run

if __name__ == "__main__":
    sys.exit(run(lambda: plan(sys.argv[1:])))
