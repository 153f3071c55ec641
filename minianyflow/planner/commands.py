"""The commands of the planner: plan, gpu_check. Each takes argv and returns an exit status."""

import json
import sys

from minianyflow.support.cli import Parser

SETUP = {"gpu": "--gpu {}", "gpus": "--gpus {}", "sharded": "--sharded"}  # options of plan, not of the configuration


def plan(argv: list[str]) -> int:
    """Plan a run of distill: memory by part, FLOP, hours and money; whether it fits, and what to change.

    minianyflow plan --config wan-14b bidirectional on_policy accumulate=16 --gpu h200 --price 3

    Counted without a GPU and without weights; not measured on a GPU.
    """
    parser = Parser("minianyflow plan", description=plan.__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE",
        help="overlays of minianyflow/wan/configs in order, as distill takes them: wan-14b bidirectional on_policy",
    )
    parser.add_argument("--gpu", default="h200", help="h200, h100, a100-80, l40s or rtx4090 (default: h200)")
    parser.add_argument("--gpus", type=int, default=1, help="how many (default: 1)")
    parser.add_argument(
        "--sharded", action="store_true", help="with FSDP2 (eight_gpus_fsdp2.yaml), not DDP (eight_gpus_ddp.yaml)"
    )
    parser.add_argument("--memory", type=float, help="GB of another GPU, of 10^9 bytes: MiB x 0.001048576")
    parser.add_argument("--rate", type=float, help="its dense bfloat16 TFLOP/s (both default to those of --gpu)")
    parser.add_argument("--price", type=float, help="per GPU-hour, in any currency (default: money is left out)")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the rate, that model FLOP are hoped to reach (default: 0.5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; with --table that of docs/plan/plans.json")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/plan.md, counted anew: a minute")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options, as distill --print-config shows them"
    )
    arguments = parser.parse_args(argv)
    from minianyflow.planner import report
    from minianyflow.planner.gpus import find_gpu
    from minianyflow.planner.plan import plan_run, published_plans
    from minianyflow.wan.config import load_config

    share, price = arguments.share, arguments.price
    report.check_share(share, price)
    if arguments.table:
        plans, price = published_plans(), report.PRICE if price is None else price
        tables = report.stage_table(plans, share), report.bill_table(plans, price, share)
        print(
            report.plans_as_json(plans) if arguments.json else "\n\n".join(tables), end="" if arguments.json else "\n"
        )
        return 0
    files = [name for name in arguments.config if "=" not in name]
    pairs = [name for name in arguments.config if "=" in name]  # those that follow --config
    config = load_config(files, [*pairs, *arguments.overrides])
    gpu = find_gpu(arguments.gpu, arguments.memory, arguments.rate)
    planned = plan_run(config, gpu=gpu, gpus=arguments.gpus, sharded=arguments.sharded)
    if arguments.json:
        print(json.dumps(report.as_json(planned, share, price, _as_arguments), indent=1))
    else:
        print(report.describe(planned, share, price, _as_arguments))
    return 0


def _as_arguments(changes):
    """Options as this command takes them."""
    from minianyflow.planner.report import as_options

    flags = [flag.format(changes[name]) for name, flag in SETUP.items() if changes.get(name)]
    rest = as_options({name: value for name, value in changes.items() if name not in SETUP or value is None})
    return " ".join([*flags, *([rest] if rest else [])])


def gpu_check(argv: list[str]) -> int:
    """Check a GPU against the plan: real shapes of Wan2.1 with random weights, a few training steps of every stage.

    Nothing is downloaded. Prints step time, model TFLOP/s as a share of the matrix rate measured first, and memory by
    part beside the plan's; gpu_check.md and gpu_check.json are for docs/gpu.md. A case that would not fit is left out.
    """
    parser = Parser("minianyflow gpu-check", description=gpu_check.__doc__)
    for name, known, default in (
        ("sizes", ["1.3b", "14b", "tiny"], ["1.3b", "14b"]),
        ("architectures", ["bidirectional", "causal"], None),
        ("stages", ["teacher", "forward", "on_policy"], None),
    ):
        words = f"{', '.join(known)} (default: {' '.join(default) if default else 'all'})"
        parser.add_argument(f"--{name}", nargs="+", default=default or known, help=words)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per case, after one that is not (default: 3)")
    parser.add_argument("--batch", type=int, default=2, help="clips per step, one after another (default: 2)")
    for name, default in (("frames", 81), ("height", 480), ("width", 832)):
        parser.add_argument(f"--{name}", type=int, help=f"of the clip (default: {default}; less for tiny)")
    parser.add_argument("--output", default="outputs/gpu_check", help="a new folder (default: outputs/gpu_check)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for tiny alone (default: cuda)")
    parser.add_argument("--profile", action="store_true", help="profile one more step: the longest operations per case")
    parser.add_argument("--json", action="store_true", help="print the report as JSON in place of the table")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="options, as distill --print-config shows them"
    )
    arguments = parser.parse_args(argv)
    from minianyflow.planner.gpu_check import Request, check, markdown

    clip = {name: getattr(arguments, name) for name in ("frames", "height", "width")}
    request = Request(
        sizes=tuple(arguments.sizes),
        architectures=tuple(arguments.architectures),
        stages=tuple(arguments.stages),
        steps=arguments.steps,
        batch=arguments.batch,
        clip={name: value for name, value in clip.items() if value is not None},
        device=arguments.device,
        options=tuple(arguments.set),
        profile=arguments.profile,
    )
    report = check(request, arguments.output, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(report, indent=1) if arguments.json else f"\n{markdown(report)}")
    print(f"written: {arguments.output}/gpu_check.md, gpu_check.json", file=sys.stderr)
    return 0
