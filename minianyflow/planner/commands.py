"""The commands of the planner: plan, gpu_check. Each takes argv and returns an exit status."""

import json
import sys

from minianyflow.support.cli import Parser

KINDS, STAGES = ("bidirectional", "causal"), ("teacher", "forward", "on_policy")
FLAGS = {"gpu": "--gpu {}", "gpus": "--gpus {}", "sharded": "--sharded"}  # what plan takes beside a configuration


def plan(argv: list[str]) -> int:
    """Plan a run of distill: memory by part, FLOP, hours and money; whether it fits, and what to change.

    minianyflow plan --config wan-14b bidirectional on_policy accumulate=16 --gpu h200 --price 3

    Counted without a GPU and without weights; not measured on a GPU.
    """
    parser = Parser("minianyflow plan", description=plan.__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", nargs="+", default=[], metavar="FILE", help="overlays in order, as distill takes them")
    add("--gpu", default="h200", help="rtx4080, rtx4090, l40s, a100-80, h100, pro6000 or h200 (default: h200)")
    add("--gpus", type=int, default=1, help="number of GPUs (default: 1)")
    add("--sharded", action="store_true", help="with FSDP2 (eight_gpus_fsdp2.yaml), not DDP (eight_gpus_ddp.yaml)")
    add("--memory", type=float, help="GB of another GPU, of 10^9 bytes: MiB x 0.001048576")
    add("--rate", type=float, help="its dense bfloat16 TFLOP/s (both default to those of --gpu)")
    add("--price", type=float, help="per GPU-hour, in any currency (default: money is left out)")
    add("--share", type=float, default=0.5, help="of the rate, that model FLOP are hoped to reach (default: 0.5)")
    for name in ("frames", "height", "width"):
        add(f"--{name}", type=int, help="of the clip (default: that of the data; without data 81 x 480 x 832)")
    add("--json", action="store_true", help="print JSON; with --table that of docs/plan/plans.json")
    add("--table", action="store_true", help="print the tables of docs/plan.md, counted anew: some minutes")
    add(
        "--stream",
        action="store_true",
        help="print the frames per second that a stream could reach; --json: stream.json",
    )
    add("overrides", nargs="*", metavar="key=value", help="options of the configuration")
    arguments = parser.parse_args(argv)
    from tqdm import tqdm

    from minianyflow.planner import report
    from minianyflow.planner.gpus import find_gpu
    from minianyflow.planner.plan import plan_run, published_plan
    from minianyflow.wan.config import load_config
    from minianyflow.wan.data.options import Options

    share, price = arguments.share, arguments.price
    report.check_share(share, price)
    if arguments.stream:
        from minianyflow.planner.stream import SIZES, chunk_flop, table

        flop = {size: chunk_flop(size) for size in SIZES}
        print(json.dumps(flop, indent=1) if arguments.json else table(flop, share))
        return 0
    if arguments.table:
        plans = {name: published_plan(name) for name in tqdm(report.PUBLISHED, unit="plan")}
        rows = {name: report.as_row(plan) for name, plan in plans.items()}
        lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]  # of plans.json
        bill = report.bill_table(rows, report.PRICE if price is None else price, share)
        tables = f"{report.stage_table(rows, share)}\n\n{bill}"
        print("{\n" + ",\n".join(lines) + "\n}" if arguments.json else tables)
        return 0
    files = [name for name in arguments.config if "=" not in name]
    pairs = [name for name in arguments.config if "=" in name]  # those that follow --config
    config, gpu = load_config(files, [*pairs, *arguments.overrides]), (arguments.gpu, arguments.memory, arguments.rate)
    clip = {name: value for name in ("frames", "height", "width") if (value := getattr(arguments, name)) is not None}
    Options(**clip)  # raises for what Wan cannot take
    planned = plan_run(config, clip or None, gpu=find_gpu(*gpu), gpus=arguments.gpus, sharded=arguments.sharded)
    if arguments.json:
        print(json.dumps(report.as_json(planned, share, price, FLAGS), indent=1))
    else:
        print(report.describe(planned, share, price, FLAGS))
    return 0


def gpu_check(argv: list[str]) -> int:
    """Check a GPU against the plan: real shapes of Wan2.1 with random weights, a few training steps of every stage.

    Nothing is downloaded. Prints step time, model TFLOP/s as a share of the matrix rate measured first, and memory by
    part beside the plan's; gpu_check.md and gpu_check.json are for docs/gpu.md. A case that would not fit is left out.
    """
    parser = Parser("minianyflow gpu-check", description=gpu_check.__doc__)
    add = parser.add_argument
    for name, known in (("sizes", ["1.3b", "14b", "tiny"]), ("architectures", KINDS), ("stages", STAGES)):
        default = [value for value in known if value != "tiny"]
        words = f"{', '.join(known)} (default: {' '.join(default)})"
        add(f"--{name}", nargs="+", choices=known, default=default, metavar="NAME", help=words)
    add("--steps", type=int, default=3, help="timed steps per case, after one that is not (default: 3)")
    add("--batch", type=int, default=2, help="clips per step, one after another (default: 2)")
    for name, default in (("frames", 81), ("height", 480), ("width", 832)):
        add(f"--{name}", type=int, help=f"of the clip (default: {default}; less for tiny)")
    add("--output", default="outputs/gpu_check", help="a new folder (default: outputs/gpu_check)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for tiny alone (default: cuda)")
    add("--profile", action="store_true", help="profile one more step: the longest operations per case")
    add("--ways", action="store_true", help="every case in all ways to hold it: memory=, offload=, the smallest first")
    add("--json", action="store_true", help="print the report as JSON in place of the table")
    add("--set", dest="options", nargs="+", default=[], metavar="key=value", help="options of the configuration")
    options = vars(parser.parse_args(argv))
    from minianyflow.planner.gpu_check import Request, check, markdown

    clip = {name: value for name in ("frames", "height", "width") if (value := options.pop(name)) is not None}
    output, as_json = options.pop("output"), options.pop("json")
    report = check(Request(clip=clip, **options), output, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(report, indent=1) if as_json else f"\n{markdown(report)}")
    print(f"written: {output}/gpu_check.md, gpu_check.json", file=sys.stderr)
    return 0
