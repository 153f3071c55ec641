"""Plan a run: memory, FLOP, hours and money: `minianyflow plan`."""

import sys

from minianyflow.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
