"""Export a run to stock diffusers: `minianyflow export`."""

import sys

from minianyflow.support.cli import run
from minianyflow.wan.commands import export

if __name__ == "__main__":
    sys.exit(run(lambda: export(sys.argv[1:])))
