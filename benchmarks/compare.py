"""Flow maps beside velocity models of flow_matching and torchcfm: same network, targets and CPU seconds.

Needs the extra `peers`: pip install 'minianyflow[peers]'. Takes about (seconds + 30) x 6 / workers seconds a target:
nine minutes by default. The defaults are those of the run in docs/peers.md.
"""

import sys

from minianyflow.support.cli import Parser, run, whole_numbers


def main(argv=None):
    """Parse, compare, print the tables; returns the exit status."""
    parser = Parser("compare.py", description=__doc__)
    parser.add_argument(
        "--target", nargs="+", default=["spiral"], metavar="NAME", help="spiral, ring8, checkerboard (default: spiral)"
    )
    parser.add_argument("--seconds", type=float, default=150.0, help="CPU seconds of training for each (default: 150)")
    parser.add_argument("--width", type=int, default=128, help="of every network (default: 128)")
    parser.add_argument("--seeds", default="0,1,2", help="trained together, as one network (default: 0,1,2)")
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="PEER",
        help="flow_matching, torchcfm, 'torchcfm, OT' (default: all; nothing after --peers: ours alone)",
    )
    parser.add_argument("--output", default="outputs/compare", help="folder (default: outputs/compare)")
    parser.add_argument("--workers", type=int, default=2, help="processes; each trains one on one core (default: 2)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    from dataclasses import replace

    from benchmarks import peers
    from minianyflow.plane.race import BUDGET

    chosen = tuple(peers.PEERS) if arguments.peers is None else tuple(arguments.peers)
    seeds, targets = whole_numbers(arguments.seeds), tuple(arguments.target)
    options = (arguments.seconds, chosen, arguments.output, arguments.workers, arguments.quiet)
    options += (replace(BUDGET, width=arguments.width),)
    report = peers.run(targets, seeds, *options)
    for name, target in report["targets"].items():
        print(f"\n{name}\n\n{peers.table(target)}\n\n{peers.ratio_table(target)}")
    print(f"\nwritten: {arguments.output}/peers.json, {arguments.output}/peers.png")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
