"""What more steps buy: sample a run, an export, released weights or Wan2.1 at 1 to 128 steps, measure, draw, compare.

Wan2.1 itself, a WanPipeline, is the teacher to compare with, followed by Euler's method. The released AnyFlow weights
carry a non-commercial licence.
"""

import sys

from minianyflow.support.cli import Parser, run

SIZES = {"frames": "4 n + 1", "height": "pixels", "width": "pixels", "length": "tokens a prompt"}


def main(argv=None):
    """Parse, evaluate, print the table; returns the exit status."""
    parser = Parser("evaluate.py", description=__doc__)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="run folders of distill.py, exported pipelines, names on the hub like Wan-AI/Wan2.1-T2V-1.3B-Diffusers or "
        "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers; ratios are to the first",
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="prompts, one a line")
    steps = [1, 2, 4, 8, 16, 32, 64, 128]
    parser.add_argument("--steps", nargs="+", type=int, default=steps, help="step counts (default: 1 to 128, doubling)")
    parser.add_argument("--data", metavar="SHARDS", help="folder of held-out latents (default: none, and no distance)")
    parser.add_argument("--videos", type=int, default=5, help="clips of each prompt (default: 5, as VBench wants)")
    for name, what in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: the source's, or Wan2.1's)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same for all sources (default: 0)")
    parser.add_argument("--batch", type=int, default=1, help="clips sampled and decoded together (default: 1)")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale, for teachers alone (default: 1, none)")
    parser.add_argument("--negative", metavar="TEXT", help="its null prompt (default: that of --data, or Wan2.1's)")
    parser.add_argument(
        "--vbench", nargs="+", metavar="DIMENSION", help="what VBench scores (default: all it can here)"
    )
    parser.add_argument("--no-vbench", action="store_true", help="do not look for VBench")
    parser.add_argument(
        "--vbench-python",
        default=sys.executable,
        metavar="PYTHON",
        help="one that has the package vbench (default: this)",
    )
    parser.add_argument("--output", default="outputs/evaluation", metavar="OUT", help="(default: outputs/evaluation)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="(default: bf16 on a GPU, fp32 on a CPU)")
    arguments = parser.parse_args(argv)
    from accelerate import PartialState

    from minianyflow.wan.evaluate import evaluate, table

    report = evaluate(arguments)
    PartialState().destroy_process_group()  # one that is left to the end of Python may abort it
    if report:  # on the main process
        print(f"\n{table(report)}\n\nwritten: {arguments.output}, any_step.json, any_step.png, sheet.png and videos")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
