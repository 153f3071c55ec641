"""Export a run to stock diffusers: `minianyflow export`."""

import sys

from minianyflow.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
