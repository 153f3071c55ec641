"""Evaluate sources at 1 to 128 steps: `minianyflow evaluate`."""

import sys

from minianyflow.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
