"""Sample at any step counts: a run of distill.py, a pipeline of export.py, or NVIDIA's released AnyFlow weights.

The released weights carry a non-commercial licence. Wan2.1 itself and other teachers are sampled without guidance here;
evaluate.py has --guidance.
"""

import sys

from minianyflow.support.cli import Parser, run

SIZES = {"frames": "4 n + 1", "height": "pixels", "width": "pixels", "length": "tokens a prompt"}


def main(argv=None):
    """Parse, sample, say what was written; returns the exit status."""
    parser = Parser("sample.py", description=__doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a run folder, an exported pipeline, or a name on the hub: nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers, "
        "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers (causal), or those of 14B",
    )
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="prompts")
    parser.add_argument("--prompts", metavar="FILE", help="or a file of them, one a line")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4, 32], help="step counts (default: 1 4 32)")
    for name, what in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: the source's, or Wan2.1's)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the same for every step count (default: 0)")
    parser.add_argument("--image", metavar="FILE", help="the first frame")
    parser.add_argument("--video", metavar="FILE", help="the first frames, at 16 a second")
    parser.add_argument("--context", type=int, help="how many frames of --video (default: the first two chunks)")
    parser.add_argument("--output", default="outputs/samples", metavar="OUT", help="folder (default: outputs/samples)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="(default: bf16 on a GPU, fp32 on a CPU)")
    arguments = parser.parse_args(argv)
    from minianyflow.wan.sample import sample_clips

    sample_clips(arguments)
    print(f"written: {arguments.output}, clips and sheet.png")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
