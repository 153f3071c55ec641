"""Make a tiny Wan of random weights: `minianyflow make-tiny-wan`."""

import sys

from minianyflow.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["make-tiny-wan", *sys.argv[1:]]))
