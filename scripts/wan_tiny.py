"""All stages of both architectures on a tiny Wan, as they run on the real one: two cores, under five minutes.

Makes the tiny Wan, then tunes a teacher, trains the forward stage and distils on-policy, bidirectional and causal; the
last students are sampled, exported and sampled again. Prints every command before it runs, and a table at the end.
OUTPUT/evaluations.json is what docs/wan/evaluations.json is a copy of.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from minianyflow.support.cli import Parser, run
from minianyflow.support.errors import InputError

ARCHITECTURES, STAGES = ("bidirectional", "causal"), ("teacher", "forward", "on_policy")


def commands(folder):
    """All commands in order: lists of arguments."""
    where = [f"runs={folder}", f"base={folder}/wan", f"data={folder}/wan/latents"]
    yield ["make_tiny_wan.py", f"{folder}/wan"]
    for architecture in ARCHITECTURES:
        for stage in STAGES:
            yield ["distill.py", "--config", architecture, stage, "tiny", *where]
        run, export = f"{folder}/{architecture}-on_policy", f"{folder}/{architecture}-pipeline"
        prompt = ["--prompt", "a red square moves left", "--steps", "1", "4"]
        yield ["sample.py", run, *prompt, "--output", f"{folder}/{architecture}-samples"]
        yield ["export.py", run, export]
        yield ["sample.py", export, *prompt, "--output", f"{folder}/{architecture}-exported"]


def table(folder):
    """Evaluations per sample of every stage, its seconds, and the median share of a step waiting for data."""
    lines = ["evaluations per sample (forwards, backwards)".ljust(79) + "seconds  waiting"]
    counted = {}
    for architecture in ARCHITECTURES:
        for stage in STAGES:
            report = json.loads((Path(folder) / f"{architecture}-{stage}" / "run.json").read_text())
            roles = report["evaluations_a_sample"]
            counts = ", ".join(f"{role} {n['forwards']:.2f}, {n['backwards']:.2f}" for role, n in roles.items())
            measured = f"{report['seconds']:6.0f}  {report['waiting_for_data']['median']:7.2%}"
            lines.append(f"{architecture} {stage}".ljust(26) + counts.ljust(54) + measured)
            rounded = {role: {kind: round(n, 4) for kind, n in count.items()} for role, count in roles.items()}
            counted[f"{architecture} {stage}"] = rounded
    (Path(folder) / "evaluations.json").write_text(json.dumps(counted, indent=1) + "\n")
    return "\n".join(lines)


def main(argv=None):
    """Run every command, stop at the first that fails, print the table; returns the exit status."""
    parser = Parser("wan_tiny.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="outputs/tiny", help="a new folder (default: outputs/tiny)")
    arguments = parser.parse_args(argv)
    if Path(arguments.output).exists():
        raise InputError(f"{arguments.output} exists; remove it, or name a new folder with --output")
    start, one = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": "1"}  # small networks run best on one thread
    for name, *rest in commands(arguments.output):
        print(f"\n$ python scripts/{name} {shlex.join(rest)}", flush=True)
        try:
            status = subprocess.call([sys.executable, str(Path(__file__).with_name(name)), *rest], env=one)
        except KeyboardInterrupt:
            raise InputError(f"interrupted; remove {arguments.output}, then run the same command again") from None
        if status:
            return status
    print(f"\n{table(arguments.output)}\n\nall of it took {time.perf_counter() - start:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
