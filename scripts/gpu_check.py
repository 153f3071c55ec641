"""Check a GPU against the plan: real shapes of Wan2.1 with random weights, a few real training steps of every stage.

Nothing is downloaded. Prints step time, model TFLOP/s as a share of the matrix rate measured first, and memory by part
beside the plan's; gpu_check.md and gpu_check.json are for docs/gpu.md. A case that would not fit is left out, and said.
"""

import json
import sys

from minianyflow.support.cli import Parser, run


def main(argv=None):
    """Parse, measure, print the table; returns the exit status."""
    parser = Parser("gpu_check.py", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["1.3b", "14b"], help="1.3b, 14b, tiny (default: 1.3b 14b)")
    parser.add_argument(
        "--architectures", nargs="+", default=["bidirectional", "causal"], help="bidirectional, causal (default: both)"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        default=["teacher", "forward", "on_policy"],
        help="teacher, forward, on_policy (default: all three)",
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each, after one that is not (default: 3)")
    parser.add_argument("--batch", type=int, default=2, help="clips a step, one after another (default: 2)")
    for name, default in (("frames", 81), ("height", 480), ("width", 832)):
        parser.add_argument(f"--{name}", type=int, help=f"of the clip (default: {default}; less for tiny)")
    parser.add_argument("--output", default="outputs/gpu_check", help="a new folder (default: outputs/gpu_check)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for tiny alone (default: cuda)")
    parser.add_argument(
        "--profile", action="store_true", help="profile one more step: the longest operations, a file a case"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON in place of the table")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="options of minianyflow/wan/configs/base.yaml"
    )
    arguments = parser.parse_args(argv)
    from minianyflow.planner.gpu_check import Request, check, markdown

    clip = {name: getattr(arguments, name) for name in ("frames", "height", "width")}
    clip = {name: value for name, value in clip.items() if value is not None}
    request = Request(
        tuple(arguments.sizes),
        tuple(arguments.architectures),
        tuple(arguments.stages),
        arguments.steps,
        arguments.batch,
        clip,
        arguments.device,
        tuple(arguments.set),
        arguments.profile,
    )
    report = check(request, arguments.output, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(report, indent=1) if arguments.json else f"\n{markdown(report)}")
    print(f"written: {arguments.output}/gpu_check.md, gpu_check.json", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
