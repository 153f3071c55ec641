"""Check a GPU against the plan: `minianyflow gpu-check`."""

import sys

from minianyflow.planner.commands import gpu_check
from minianyflow.support.cli import run

if __name__ == "__main__":
    sys.exit(run(lambda: gpu_check(sys.argv[1:])))
