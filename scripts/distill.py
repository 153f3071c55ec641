"""Distil Wan2.1, one stage per run: `minianyflow distill`."""

import sys

from minianyflow.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
