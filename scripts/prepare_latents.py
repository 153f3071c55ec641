"""Encode captioned videos once, for every run: `minianyflow prepare-latents`."""

import sys

from minianyflow.support.cli import run
from minianyflow.wan.data.commands import prepare_latents

if __name__ == "__main__":
    sys.exit(run(lambda: prepare_latents(sys.argv[1:])))
