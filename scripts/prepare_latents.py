"""Encode captioned videos once, for every run: `minianyflow prepare-latents`."""

import sys

from minianyflow.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare-latents", *sys.argv[1:]]))
