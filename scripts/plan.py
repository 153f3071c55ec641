"""What a run of distill.py will take: memory by part, FLOP, hours and money; whether it fits, and what to change.

    python scripts/plan.py --config wan-14b bidirectional on_policy accumulate=16 --gpu h200 --price 3

Counted without a GPU and without weights; not measured on a GPU.
"""

import json
import sys

from minianyflow.support.cli import Parser, run


def main(argv=None):
    """Parse, count, print; returns the exit status."""
    parser = Parser("plan.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE",
        help="overlays of minianyflow/wan/configs in order, as distill.py takes them: wan-14b bidirectional on_policy",
    )
    parser.add_argument("--gpu", default="h200", help="h200, h100, a100-80, l40s or rtx4090 (default: h200)")
    parser.add_argument("--gpus", type=int, default=1, help="how many (default: 1)")
    parser.add_argument(
        "--sharded", action="store_true", help="with FSDP2 (eight_gpus_fsdp2.yaml), not DDP (eight_gpus_ddp.yaml)"
    )
    parser.add_argument("--memory", type=float, help="GB of another GPU, of 10^9 bytes: MiB x 0.001048576")
    parser.add_argument("--rate", type=float, help="its dense bfloat16 TFLOP/s (both default to those of --gpu)")
    parser.add_argument(
        "--price", type=float, help="of one GPU for an hour, in any currency (default: money is left out)"
    )
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the rate, which model FLOP are hoped to reach (default: 0.5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of docs/plan.md, at --share and --price: two minutes"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of configs/base.yaml")
    arguments = parser.parse_args(argv)
    from minianyflow.planner.gpus import find_gpu
    from minianyflow.planner.plan import plan_run
    from minianyflow.planner.report import PRICE, as_json, bills, check_share, describe, table
    from minianyflow.wan.config import load_config

    check_share(arguments.share, arguments.price)
    if arguments.table:
        price = PRICE if arguments.price is None else arguments.price
        print(table(arguments.share), bills(price, arguments.share), sep="\n\n")
        return 0
    files = [each for each in arguments.config if "=" not in each]
    pairs = [each for each in arguments.config if "=" in each]  # those that follow --config
    config = load_config(files, [*pairs, *arguments.overrides])
    gpu = find_gpu(arguments.gpu, arguments.memory, arguments.rate)
    plan = plan_run(config, gpu=gpu, gpus=arguments.gpus, sharded=arguments.sharded)
    if arguments.json:
        print(json.dumps(as_json(plan, arguments.share, arguments.price), indent=1))
    else:
        print(describe(plan, arguments.share, arguments.price))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
