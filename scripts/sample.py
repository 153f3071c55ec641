"""Sample a run, an export or released weights: `minianyflow sample`."""

import sys

from minianyflow.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
