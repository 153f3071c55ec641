"""Export a run of distill.py to stock diffusers: a whole pipeline folder, or its LoRA adapter alone."""

import sys

from minianyflow.support.cli import Parser, run
from minianyflow.support.errors import InputError


def main(argv=None):
    """Parse, export, say what was written; returns the exit status."""
    parser = Parser("export.py", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder of distill.py")
    parser.add_argument("output", metavar="OUT", help="a new folder")
    parser.add_argument("--lora", action="store_true", help="the adapter alone, for pipeline.load_lora_weights(OUT)")
    parser.add_argument("--role", choices=("student", "student-last"), default="student", help="averaged, or last")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: the run's precision)")
    arguments = parser.parse_args(argv)
    if arguments.lora and arguments.dtype:
        raise InputError("--dtype with --lora; an adapter is written in float32, as trained: leave out --dtype")
    from minianyflow.wan.export import export_lora, export_pipeline

    if arguments.lora:
        export_lora(arguments.run, arguments.output, arguments.role)
    else:
        export_pipeline(arguments.run, arguments.output, arguments.role, arguments.dtype)
    print(f"written: {arguments.output}; its README.md says how to load it")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
