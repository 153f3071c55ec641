"""Encode captioned videos once, for every run: a folder of latents, prompts and the null prompt (shards.py).

    accelerate launch scripts/prepare_latents.py --videos FOLDER --captions FILE --output data/wan-1.3b

Interrupted, it goes on where it was: run the same command again. --verify checks a finished folder, every byte of it.
"""

import sys
import time
from datetime import timedelta

from minianyflow.support.cli import Parser, run


def prepare(arguments):
    """Say what it takes, encode, write the manifest; returns the exit status."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from minianyflow.wan.config import find_device
    from minianyflow.wan.data.clips import Options, read_captions
    from minianyflow.wan.data.prepare import Preparation

    options = Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})
    clips = read_captions(arguments.captions, arguments.limit)
    patient = InitProcessGroupKwargs(timeout=timedelta(days=30))  # one process may be hours behind another
    accelerator = Accelerator(cpu=find_device(arguments.device).type == "cpu", kwargs_handlers=[patient])
    part, main = (accelerator.process_index, accelerator.num_processes), accelerator.is_main_process
    where = (arguments.base, clips, arguments.videos, arguments.output)
    work = Preparation(*where, options, accelerator.device, part, arguments.skip)
    if main:
        work.begin(write=not arguments.dry_run, retry=arguments.retry)
    accelerator.wait_for_everyone()
    finished, pending = work.finished(), work.pending()
    accelerator.wait_for_everyone()  # all have seen the same, before it changes
    if finished:
        say(main, f"{arguments.output} is finished already; --verify checks it")
    elif main and pending:
        announce(work, pending, accelerator.distributed_type.value)
    accelerator.wait_for_everyone()  # the others begin when there is room
    if not finished and not arguments.dry_run:
        start = time.perf_counter()
        work.encode(pending)
        accelerator.wait_for_everyone()
        if main:
            report(work, work.finish(), time.perf_counter() - start)
    accelerator.end_training()  # a process group that is left to the end of Python may abort it
    return 0


def announce(work, pending, kind):
    """Print the disk and the time that the shards `pending` take; raise InputError if there is no room."""
    size = work.bytes_of(pending)
    free = work.check_room(size)
    count, shape, done = len(work.clips_to_encode(pending)), work.options, work.shards - len(pending)
    clips = f"{count} clips, {shape.frames} frames of {shape.width} x {shape.height}"
    processes = f"{work.parts} processes ({kind})" if work.parts > 1 else "1 process"
    say(True, f"{clips}: {len(pending)} shards to make, {done} are there; {processes}")
    seconds = work.time_of(pending)
    took = f"about {duration(seconds / work.parts)}, {seconds / max(count, 1):.2g} s a clip on one process"
    say(True, f"disk: {gigabytes(size)} of {gigabytes(free)} that are free; time: {took}")


def report(work, manifest, seconds):
    """Print what was written."""
    skipped, clips = manifest["skipped"]["count"], f"{manifest['rows']} clips in {len(manifest['shards'])} shards"
    say(True, f"written: {work.output}, {clips}, in {duration(seconds)}")
    if skipped:
        say(
            True,
            f"skipped: {skipped} of {len(work.clips)} clips; {work.output}/skipped.jsonl says why; --retry tries again",
        )


def say(main, line):
    """Print a line at once, on the main process."""
    if main:
        print(line, flush=True)


def check(arguments):
    """Compare a finished folder with its manifest, and the model if one is named; returns the exit status."""
    from tqdm import tqdm

    from minianyflow.wan.data.prepare import verify_model
    from minianyflow.wan.data.shards import read_manifest, verify

    lines = verify(arguments.output, lambda shards: tqdm(shards, desc="verifying", unit="shard", mininterval=0.5))
    if arguments.base:
        lines += verify_model(arguments.output, arguments.base)
    manifest = read_manifest(arguments.output)
    print(
        "\n".join(lines) or f"{arguments.output}: {manifest['rows']} clips in {len(manifest['shards'])} shards, whole"
    )
    return 1 if lines else 0


def gigabytes(size):
    """'1.5 GB'."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def duration(seconds):
    """'3.5 hours'."""
    unit, name = next(
        (each for each in ((86400, "days"), (3600, "hours"), (60, "minutes")) if seconds >= each[0]), (1, "s")
    )
    return f"{seconds / unit:.2g} {name}"


def main(argv=None):
    """Parse, prepare or verify; returns the exit status."""
    parser = Parser("prepare_latents.py", description=__doc__.splitlines()[0])
    parser.add_argument("--videos", metavar="FOLDER", help="where the videos are")
    parser.add_argument("--captions", metavar="FILE", help='jsonl of {"file", "caption"}, or csv with these columns')
    parser.add_argument("--base", help="pipeline folder or name on the hub (default: Wan-AI/Wan2.1-T2V-1.3B-Diffusers)")
    parser.add_argument(
        "--output", metavar="OUT", required=True, help="a new folder, or an unfinished one to go on with"
    )
    parser.add_argument("--frames", type=int, default=81, help="4 n + 1 (default: 81)")
    parser.add_argument("--height", type=int, default=480, help="pixels (default: 480)")
    parser.add_argument("--width", type=int, default=832, help="pixels (default: 832)")
    parser.add_argument("--fps", type=float, default=16.0, help="frames a second (default: 16, as Wan's)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt (default: 512)")
    parser.add_argument("--null", metavar="TEXT", help="the null prompt (default: Wan2.1's negative prompt)")
    parser.add_argument("--shard-size", type=int, default=64, help="clips of a shard (default: 64)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="that numbers are kept in")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N clips only")
    parser.add_argument(
        "--skip",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="stop if more is skipped (default: 0.1 of the clips)",
    )
    parser.add_argument(
        "--retry", action="store_true", help="try again what was skipped or lost, in a finished OUT too"
    )
    parser.add_argument("--dry-run", action="store_true", help="say how much disk and time it takes, and stop")
    parser.add_argument("--verify", action="store_true", help="check a finished OUT; with --base the model, too")
    arguments = parser.parse_args(argv)
    if arguments.verify:
        return check(arguments)
    for name in ("videos", "captions"):
        if getattr(arguments, name) is None:
            parser.error(f"--{name} is missing; expected --videos FOLDER --captions FILE, or --verify")
    if arguments.retry and arguments.dry_run:
        parser.error("--retry changes what is there; expected it without --dry-run")
    from minianyflow.wan.data.clips import WAN_NULL

    arguments.base = arguments.base or "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    arguments.null = WAN_NULL if arguments.null is None else arguments.null
    return prepare(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
