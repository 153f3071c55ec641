"""Make a tiny Wan: a pipeline folder in Wan2.1's layout, of random weights, with captioned latents in it."""

import sys

from minianyflow.support.cli import Parser, run


def main(argv=None):
    """Parse, make, say what was written; returns the exit status."""
    from minianyflow.wan.data.shards import LatentShards
    from minianyflow.wan.folders import make_tiny_wan

    parser = Parser("make_tiny_wan.py", description=__doc__)
    parser.add_argument("output", metavar="OUT", help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other weights and clips (default: 0)")
    arguments = parser.parse_args(argv)
    make_tiny_wan(arguments.output, arguments.seed)
    data = LatentShards(f"{arguments.output}/latents")
    print(f"written: {arguments.output}, a WanPipeline of random weights")
    print(f"written: {arguments.output}/latents, {len(data)} captioned clips of {data.shape} (frames, channels, h, w)")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
