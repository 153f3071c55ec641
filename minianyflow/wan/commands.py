"""The commands for Wan2.1: distill, sample, export, evaluate, make_tiny_wan. Each takes argv and returns a status."""

import sys
from functools import partial

from minianyflow.support.cli import Parser, seed, utf8
from minianyflow.support.errors import InputError

SOURCES = "run folder, exported pipeline, or name on the hub like nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers"
SIZES = {"frames": "4 n + 1", "height": "pixels", "width": "pixels", "length": "tokens per prompt"}


def distill(argv: list[str]) -> int:
    """Distil Wan2.1, one stage per run: teacher tuning, forward flow-map training, or on-policy distillation.

    minianyflow distill --config wan-1.3b causal forward [key=value ...]

    On several GPUs: accelerate launch --config_file FILE -m minianyflow distill ..., with a file of scripts/accelerate.
    SIGTERM (exit status 143) and Ctrl-C (130) save after the current step; the same command then resumes.
    """
    parser = Parser("minianyflow distill", description=distill.__doc__.splitlines()[0])
    words = "overlays of minianyflow/wan/configs in order: model, architecture, stage; or paths of your own"
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help=words)
    parser.add_argument("--print-config", action="store_true", help="print every option with its value, and stop")
    words = "save and end (status 143) before the process is so old: before a scheduler ends it"
    parser.add_argument("--minutes", type=float, metavar="N", help=words)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options; --print-config shows them all")
    arguments = parser.parse_args(argv)
    from minianyflow.wan.config import as_yaml, load_config

    if arguments.minutes is not None and not arguments.minutes > 0:
        raise InputError(f"--minutes {arguments.minutes:g}; expected more than 0, like 55")
    files = [name for name in arguments.config if "=" not in name]
    pairs = [name for name in arguments.config if "=" in name]  # those that follow --config
    config = load_config(files, [*pairs, *arguments.overrides])
    if arguments.print_config:
        print(as_yaml(config, words=True), end="")
        return 0
    from accelerate import PartialState

    from minianyflow.wan.guard import Preempted, exit_at_once
    from minianyflow.wan.stages import distil

    try:
        run = distil(config, arguments.minutes)
    except Preempted as stopped:
        if PartialState().is_main_process:
            print(f"\n{stopped}; the same command resumes from there", file=sys.stderr)
        return exit_at_once(stopped.status)
    if run:  # on the main process
        pace = f"{60 * run['steps'] / run['seconds']:.3g} steps/min"
        print(f"\nwritten: {config.output}, after {run['seconds']} seconds, {pace}")
        for name, value in run["history"][-1].items():
            if name != "step":
                first = next(entry[name] for entry in run["history"] if name in entry)  # a kind of row may be absent
                print(f"{name:24} {first:10.4g} at first, {value:10.4g} at the end")
        if waited := run["waiting_for_data"]:
            print(f"waiting for data: {waited['median']:.2%} of a step (median), {waited['all']:.2%} of all")
        for role, count in run["evaluations_a_sample"].items():
            print(f"{role:10} {count['forwards']:6.2f} forwards and {count['backwards']:.2f} backwards a sample")
    return 0


def sample(argv: list[str]) -> int:
    """Sample at any step counts: a run of distill, an export, or NVIDIA's released AnyFlow weights.

    Prompt k has the noise that diffusers makes with torch.Generator().manual_seed(seed + k), k = 0, 1, ...
    The released weights carry a non-commercial licence. Wan2.1 itself and other teachers are sampled without guidance
    here; evaluate has --guidance.
    """
    parser = Parser("minianyflow sample", description=sample.__doc__)
    parser.add_argument("source", metavar="SOURCE", help=SOURCES + ", or the causal nvidia/AnyFlow-FAR-...")
    parser.add_argument("--prompt", nargs="+", type=utf8, metavar="TEXT", help="prompts")
    parser.add_argument("--prompts", metavar="FILE", help="or a file of them, one per line")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4, 32], help="step counts (default: 1 4 32)")
    parser.add_argument("--image", metavar="FILE", help="the first frame")
    parser.add_argument("--video", metavar="FILE", help="the first frames, at the model's 16 or 24 per second")
    parser.add_argument("--context", type=int, help="how many frames of --video (default: the first two chunks)")
    words = "beside the mp4 files: latents (safetensors, frames first), png (frames without loss)"
    parser.add_argument("--write", nargs="+", choices=("latents", "png"), default=[], help=words)
    words = "seconds of one clip of a causal source, chunk by chunk into a growing file; prompts and steps take turns, "
    words += "and the file of --prompts is read again before every chunk"
    parser.add_argument("--stream", type=float, metavar="SECONDS", help=words)
    parser.add_argument("--base", metavar="FOLDER", help="of an exported LoRA (default: where it was trained)")
    _sampling_options(parser, "outputs/samples")
    options = vars(parser.parse_args(argv))
    texts, file, image, video = (options.pop(name) for name in ("prompt", "prompts", "image", "video"))
    if (texts is None) == (file is None):
        raise InputError("give either --prompt TEXT ... or --prompts FILE")
    if image and video:
        raise InputError("both --image and --video; a clip starts from one of them: leave out the other")
    if options["context"] and not video:
        raise InputError("--context without --video; it is the number of its frames to start from")
    from minianyflow.wan.sample import sample_clips
    from minianyflow.wan.sources import read_prompts

    options |= {"context": 1} if image else {}
    if (seconds := options.pop("stream")) is not None:
        from minianyflow.wan.stream import stream_clip

        options |= {"prompts": partial(read_prompts, texts, file), "start": image or video, "clip": _clip(options)}
        made = stream_clip(seconds=seconds, **options)
        print(f"first frame after {made['first_frame']:.2f} s, {made['per_second']:.1f} frames per second")
        print(f"written: {options['output']}/stream.mp4, {made['frames']} frames")
        return 0
    sample_clips(prompts=read_prompts(texts, file), start=image or video, clip=_clip(options), **options)
    print(f"written: {options['output']}, clips and sheet.png")
    return 0


def export(argv: list[str]) -> int:
    """Export a run of distill to stock diffusers: a whole pipeline folder, or its LoRA adapter alone."""
    parser = Parser("minianyflow export", description=export.__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder of distill")
    parser.add_argument("output", metavar="OUT", help="a new folder")
    parser.add_argument("--lora", action="store_true", help="the adapter alone, for pipeline.load_lora_weights(OUT)")
    parser.add_argument("--role", choices=("student", "student-last"), default="student", help="averaged, or last")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: the run's precision)")
    words = "with --lora, a second file by the names of the original Wan code or of kohya"
    parser.add_argument("--layout", choices=("wan", "kohya"), help=words)
    parser.add_argument("--push", metavar="OWNER/MODEL", help="upload it to the hub, as a private repository")
    parser.add_argument("--dry-run", action="store_true", help="with --push: list what would be uploaded")
    arguments = parser.parse_args(argv)
    if arguments.lora and arguments.dtype:
        raise InputError("--dtype with --lora; an adapter is written in float32, as trained: leave out --dtype")
    if arguments.layout and not arguments.lora:
        raise InputError("--layout without --lora; it names the layers of an adapter: add --lora")
    if arguments.dry_run and not arguments.push:
        raise InputError("--dry-run without --push OWNER/MODEL; nothing else is uploaded")
    from minianyflow.wan.export import check_hub_name, export_lora, export_pipeline, push_to_hub

    if arguments.push:
        check_hub_name(arguments.push)
    if arguments.lora:
        export_lora(arguments.run, arguments.output, arguments.role, arguments.layout)
    else:
        export_pipeline(arguments.run, arguments.output, arguments.role, arguments.dtype)
    print(f"written: {arguments.output}; its README.md says how to load it")
    if arguments.push:
        push_to_hub(arguments.output, arguments.push, arguments.dry_run)
    return 0


def evaluate(argv: list[str]) -> int:
    """Sample a run, an export, released weights or Wan2.1 at 1 to 128 steps, measure, draw, compare.

    Wan2.1 itself, a WanPipeline, is the teacher to compare with, followed by Euler's method. The released AnyFlow
    weights carry a non-commercial licence.
    """
    parser = Parser("minianyflow evaluate", description=evaluate.__doc__)
    words = f"{SOURCES} or Wan-AI/Wan2.1-T2V-1.3B-Diffusers; ratios are to the first"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=words)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="prompts, one per line")
    steps = [1, 2, 4, 8, 16, 32, 64, 128]
    parser.add_argument("--steps", nargs="+", type=int, default=steps, help="step counts (default: 1 to 128, doubling)")
    parser.add_argument("--data", metavar="FOLDER", help="folder of held-out latents (default: none, and no distance)")
    parser.add_argument("--videos", type=int, default=5, help="clips per prompt (default: 5, as VBench wants)")
    parser.add_argument("--batch", type=int, default=1, help="clips sampled and decoded together (default: 1)")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale, for teachers alone (default: 1, none)")
    parser.add_argument(
        "--negative", type=utf8, metavar="TEXT", help="its null prompt (default: that of --data, or Wan2.1's)"
    )
    _sampling_options(parser, "outputs/evaluation")
    options = vars(parser.parse_args(argv))
    from accelerate import PartialState

    from minianyflow.wan.evaluate import evaluate as evaluate_sources
    from minianyflow.wan.evaluate import table

    report = evaluate_sources(clip=_clip(options), **options)
    PartialState().destroy_process_group()  # one that is left to the end of Python may abort it
    if report:  # on the main process
        print(f"\n{table(report)}\n\nwritten: {options['output']}, any_step.json, any_step.png, sheet.png and videos")
    return 0


def make_tiny_wan(argv: list[str]) -> int:
    """Make a tiny Wan: a pipeline folder in Wan2.1's layout, of random weights, with captioned videos and latents."""
    parser = Parser("minianyflow make-tiny-wan", description=make_tiny_wan.__doc__)
    parser.add_argument("output", metavar="OUT", help="a new folder")
    parser.add_argument("--seed", type=seed, default=0, help="another seed, other weights and clips (default: 0)")
    arguments = parser.parse_args(argv)
    from minianyflow.wan import folders
    from minianyflow.wan.data.latents import LatentSet

    folders.make_tiny_wan(arguments.output, arguments.seed, videos=True)
    data = LatentSet(f"{arguments.output}/latents")
    print(f"written: {arguments.output}, a WanPipeline of random weights")
    print(f"written: {arguments.output}/videos and captions.jsonl, {len(data)} captioned clips")
    print(f"written: {arguments.output}/latents, the same as latents {data.shape} (frames, channels, h, w)")
    return 0


def _sampling_options(parser, output):
    for name, words in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"{words} (default: the source's, or Wan2.1's)")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise, the same for all (default: 0)")
    parser.add_argument("--output", default=output, metavar="OUT", help=f"folder (default: {output})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="(default: bf16 on a GPU, fp32 on a CPU)")


def _clip(options):
    """The sizes that are given, taken out of the options."""
    sizes = {name: options.pop(name) for name in SIZES}
    return {name: size for name, size in sizes.items() if size is not None}
