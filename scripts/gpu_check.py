"""Check a GPU against the plan: `minianyflow gpu-check`."""

import sys

from minianyflow.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["gpu-check", *sys.argv[1:]]))
