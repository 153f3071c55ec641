"""The command prepare-latents."""

import dataclasses
import math
import time
from datetime import timedelta
from pathlib import Path

from minianyflow.support.cli import Parser, seed, utf8
from minianyflow.support.errors import InputError

BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def prepare_latents(argv) -> int:
    """Encode captioned videos once, for every run: a folder of latents, prompts and the null prompt.

    Run the same command again after an interruption, or with better videos: it encodes what has no file yet. Several
    processes: accelerate launch.
    """
    parser = Parser("minianyflow prepare-latents", description=prepare_latents.__doc__.splitlines()[0])
    add = parser.add_argument
    add("--videos", metavar="FOLDER", help="where the videos are")
    add("--parquet", metavar="FOLDER", help="in place of both: latents as FastVideo stores them, to be converted")
    add("--captions", metavar="FILE", help='jsonl of {"file", "caption"}, or csv with these columns')
    add("--base", help=f"pipeline folder or name on the hub (default: {BASE})")
    add("--output", metavar="OUT", required=True, help="a new folder, or an unfinished one to go on with")
    add("--frames", type=int, default=81, help="4 n + 1 (default: 81)")
    add("--height", type=int, default=480, help="pixels (default: 480)")
    add("--width", type=int, default=832, help="pixels (default: 832)")
    words = "FRAMESxHEIGHTxWIDTH, several: in place of one size, each clip goes where it fits"
    add("--bucket", dest="buckets", nargs="+", metavar="SIZE", help=words)
    add("--fps", type=float, help="frames per second (default: the model's, 16 of Wan2.1, 24 of Wan2.2-TI2V-5B)")
    add("--length", type=int, default=512, help="tokens of a prompt (default: 512)")
    add("--null", type=utf8, metavar="TEXT", help="the null prompt (default: Wan2.1's negative prompt)")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the stored numbers (default: bf16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--limit", type=int, metavar="N", help="the first N clips only")
    add("--skip", type=float, default=0.1, metavar="SHARE", help="stop if more is skipped (default: 0.1 of the clips)")
    add("--links", action="store_true", help="take files that are links out of the folder of the videos, too")
    add("--seed", type=seed, default=0, help="which clips the contact sheet shows (default: 0)")
    add("--dry-run", action="store_true", help="say how much disk and time it takes, and stop")
    add("--verify", action="store_true", help="check a finished OUT")
    arguments = parser.parse_args(argv)
    if arguments.verify:
        return _verify(arguments)
    if arguments.parquet:
        return _convert(arguments)
    for name in ("videos", "captions"):
        if getattr(arguments, name) is None:
            parser.error(f"--{name} is missing; expected --videos FOLDER --captions FILE, or --parquet, or --verify")
    return _prepare(arguments)


def _verify(arguments):
    from minianyflow.wan.data.buckets import open_latents
    from minianyflow.wan.data.latents import verify

    data = open_latents(arguments.output)
    problems = [problem for one in getattr(data, "sets", [data]) for problem in verify(one.folder)]
    print("\n".join(problems) or f"{arguments.output}: {len(data)} clips, whole")
    return 1 if problems else 0


def _options(arguments):
    from minianyflow.wan.data.options import Options

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    return Options(**{name: value for name, value in given.items() if value is not None})


def _convert(arguments):
    from minianyflow.wan.config import find_device
    from minianyflow.wan.data.parquet import convert_parquet
    from minianyflow.wan.data.prepare import fetch

    options, device = _options(arguments), find_device(arguments.device)
    count = convert_parquet(arguments.parquet, fetch(arguments.base or BASE), arguments.output, options, device)
    print(f"written: {arguments.output}, {count} clips", flush=True)
    return 0


def _prepare(arguments):
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from minianyflow.wan.config import find_device
    from minianyflow.wan.data.buckets import read_bucket, sort_clips
    from minianyflow.wan.data.captions import read_captions
    from minianyflow.wan.data.latents import MANIFEST
    from minianyflow.wan.data.prepare import fps_of_base

    options = _options(arguments)
    clips, output = read_captions(arguments.captions, arguments.limit), Path(arguments.output)
    if arguments.fps is None:
        options = dataclasses.replace(options, fps=fps_of_base(arguments.base or BASE))
    buckets = {name: read_bucket(name, options) for name in arguments.buckets or ()}
    is_set, is_buckets = (output / MANIFEST).exists(), any(output.glob(f"*/{MANIFEST}"))
    if is_buckets if not buckets else is_set:
        raise InputError(
            f"{output} was made {'with' if is_buckets else 'without'} --bucket: name another output folder"
        )
    patient = InitProcessGroupKwargs(timeout=timedelta(days=30))  # one process may be hours behind another
    accelerator = Accelerator(cpu=find_device(arguments.device).type == "cpu", kwargs_handlers=[patient])
    if not buckets:
        _prepare_set(arguments, clips, output, options, accelerator)
    else:
        found = sort_clips(clips, arguments.videos, buckets)
        if accelerator.is_main_process:
            print(f"buckets: {', '.join(f'{name} {len(found.get(name, ()))} clips' for name in buckets)}", flush=True)
        for name, some in found.items():
            _prepare_set(arguments, some, output / name, buckets[name], accelerator)
    accelerator.end_training()  # a process group that is left to the end of Python may abort it
    return 0


def _prepare_set(arguments, clips, output, options, accelerator):
    """Prepare clips of one size in the folder `output`."""
    from accelerate.utils import gather_object

    from minianyflow.wan.data.prepare import Preparation

    part, main = (accelerator.process_index, accelerator.num_processes), accelerator.is_main_process
    where = (arguments.base or BASE, clips, arguments.videos, output)
    work = Preparation(*where, options, accelerator.device, part, arguments.skip, arguments.links)
    if main:
        work.begin(write=not arguments.dry_run)
    accelerator.wait_for_everyone()
    pending = work.pending()
    accelerator.wait_for_everyone()  # all processes have listed the same files, before that changes
    if main and pending:
        _announce(work, pending, accelerator.distributed_type.value)
    accelerator.wait_for_everyone()  # the others begin when there is room
    if not arguments.dry_run:
        start = time.perf_counter()
        skipped = gather_object(work.encode(pending))
        if main:
            report = work.finish(skipped)["report"]
            took, count = _duration(time.perf_counter() - start), len(clips) - len(skipped)
            print(f"written: {output}, {count} clips, in {took}", flush=True)
            for what, number in report.items():
                print(f"  {what}: {number}", flush=True)
            print(f"look at {work.draw_sheet(arguments.seed)}: clips as encoded and decoded again", flush=True)
        if main and skipped:
            why = f"{output}/skipped.jsonl says why; the same command tries them again"
            print(f"skipped: {len(skipped)} of {len(clips)} clips; {why}", flush=True)


def _announce(work, pending, kind):
    """Print the disk and the time that the clips `pending` take."""
    count, processes, shape = len(pending), work.part[1], work.options
    clips = f"{count} clips to encode, {len(work.clips) - count} are there"
    shape = f"{shape.frames} frames of {shape.width} x {shape.height}"
    print(f"{clips}; {shape}; {f'{processes} processes ({kind})' if processes > 1 else '1 process'}", flush=True)
    seconds, size, free = work.estimate(pending)
    total = f"about {_duration(seconds * count / processes)}, {seconds:.2g} s per clip on one process"
    print(f"disk: about {size / 1e9:.3g} GB of {free / 1e9:.3g} GB that are free; time: {total}", flush=True)


def _duration(seconds):
    """Days, hours, minutes and seconds."""
    return str(timedelta(seconds=math.ceil(seconds)))
