"""What can be sampled, a run, an export, released AnyFlow weights or Wan2.1, and its clips at any step counts."""

import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.utils import logging
from tqdm import tqdm

from minianyflow.networks.causal_attention import chunk_partition, compressed_chunks
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.wan.config import find_device, load_config
from minianyflow.wan.data.videos import WAN_CLIP, read_video, write_clips
from minianyflow.wan.folders import (
    codec_factor,
    decode_latents,
    encode_prompts,
    encode_video,
    load_parts,
    load_transformer,
)
from minianyflow.wan.run import load_run, read_run
from minianyflow.wan.run_networks import network_of
from minianyflow.wan.sampler import sample

KINDS = {  # pipelines of diffusers, each as architecture and stage; Wan2.1 itself is a teacher that nobody has tuned
    "AnyFlowPipeline": ("bidirectional", "forward"),
    "AnyFlowFARPipeline": ("causal", "forward"),
    "WanPipeline": ("bidirectional", "teacher"),
}
SOURCES = (
    "expected a run folder of distill.py, a folder of export.py, released weights like nvidia/AnyFlow-..., or Wan2.1"
)
RELEASED = "NVIDIA's released AnyFlow weights carry a non-commercial licence"


@dataclass
class Source:
    """What is sampled: u(z, t, r, prompt), its configuration, the clips it knows, pixels to a side of a latent.

    `config.base` is the pipeline that has its codec.
    """

    network: object
    config: object
    clip: dict
    factor: int = 8

    def shape(self, clip):
        """(F, C, h, w) of a clip's latents."""
        frames, channels = (clip["frames"] - 1) // 4 + 1, self.network.transformer.config.in_channels
        return frames, channels, clip["height"] // self.factor, clip["width"] // self.factor


def check_source(name):
    """Raise InputError where `find_source` would, as far as can be said before weights are loaded."""
    if not Path(name).is_dir() and (Path(name).exists() or name.count("/") != 1 or name[0] in "./~"):
        raise InputError(f"no folder {name}; {SOURCES}")
    return read_run(name) if _is_run(name) else _kind(name)


def find_source(name, dtype, device):
    """The `Source` called `name`. Raises InputError where there is none."""
    known = check_source(name)
    if _is_run(name):
        config, made = known
        tell(config.base, config.student, config.teacher)
        transformer, config = load_run(name, "student", dtype, device)
        return Source(network_of(transformer, config), config, made["clip"])
    return _pipeline(name, *known, dtype, device)


def known_clip(name):
    """The clips that a source knows, as its `clip`, before its weights are loaded."""
    known = check_source(name)
    return known[1]["clip"] if _is_run(name) else WAN_CLIP | _beside(name).get("clip", {})


def _is_run(name):
    return any((Path(name) / file).is_file() for file in ("config.yaml", "run.json"))


def _pipeline(name, architecture, stage, dtype, device):
    tell(name)
    known = _beside(name)
    transformer = load_transformer(name, architecture, dtype, device=device)
    (scheduler,) = load_parts(name, "scheduler")
    config = load_config([architecture])
    shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))  # Wan's own says flow_shift
    config = replace(config, base=name, shift=shift, stage=known.get("stage", stage))
    clip = WAN_CLIP | known.get("clip", {})
    if architecture == "causal":
        first, *others = transformer.config.chunk_partition
        config = replace(config, causal=replace(config.causal, first=first, rest=max(others, default=first)))
    network = network_of(transformer, config)
    network.timesteps = float(scheduler.config.num_train_timesteps)  # tiny ones count to 5: wan.TINY_TIMESTEPS
    return Source(network, config, clip, codec_factor(name))


def _beside(name):
    """What export.py wrote beside a pipeline; {} for others."""
    beside = Path(name) / "minianyflow.json"
    try:
        return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except ValueError as problem:
        raise InputError(f"{beside} is not JSON ({problem}); export the run again") from None


def _kind(name):
    """Architecture and stage, by the index of a pipeline."""

    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise InputError(f"neither run.json nor model_index.json in {name}; {SOURCES}")
    logging.set_verbosity_error()  # what it tries again and why is many lines
    try:
        with warnings.catch_warnings(action="ignore"):
            index = DiffusionPipeline.load_config(name)
    except Exception as problem:  # what diffusers and the hub raise for a broken source is anything
        why = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise InputError(f"{name} does not load ({why}); check the name and the network, or give a folder") from None
    kind, more = index.get("_class_name"), (index.get("transformer_2") or [None])[0] or index.get("expand_timesteps")
    if kind not in KINDS or more:
        raise InputError(f"{name} holds a {kind}{' of Wan2.2' if more else ''}; {SOURCES}")
    return KINDS[kind]


def tell(*names):
    """Say on stderr whose licence holds."""
    if any(str(name).startswith("nvidia/") for name in names):
        print(f"note: {RELEASED}; see their page on the hub", file=sys.stderr)


def check_clip(source, clip, context):
    """Raise InputError for a clip that the network cannot make, or that cannot go on from `context` frames."""

    size, causal = source.network.transformer.config, source.config.architecture == "causal"
    frames, known, chunks = (clip["frames"] - 1) // 4 + 1, (context + 3) // 4, ()
    if causal:
        chunks = chunk_partition(frames, source.config.causal.first, source.config.causal.rest, ragged=True)
    if not causal and frames > size.rope_max_seq_len:
        raise InputError(f"{clip['frames']} frames; expected at most {4 * size.rope_max_seq_len - 3}")
    old = causal and compressed_chunks(chunks, size.full_chunk_limit)
    _, *patch = size.compressed_patch_size if old else size.patch_size
    for what, each in zip(("height", "width"), patch, strict=True):
        if clip[what] < 1 or clip[what] % (source.factor * each):
            expected = f"a multiple of {source.factor * each}: the codec's {source.factor}, patches of {each}"
            raise InputError(f"{what} {clip[what]}; expected {expected}")
    if clip["length"] < 1:
        raise InputError(f"length {clip['length']}; expected at least 1 token, 512 for Wan2.1")
    if context >= clip["frames"]:
        raise InputError(f"a start of {context} frames in a clip of {clip['frames']}; expected fewer: ask for --frames")
    ends = [4 * sum(chunks[:count]) - 3 for count in range(1, len(chunks))]
    if causal and known and context not in ends:
        raise InputError(f"a start of {context} frames; expected {' or '.join(map(str, ends))}, where a chunk ends")


def read_prompts(texts, file):
    """The prompts, of the command line or one a line of a file; exactly one of the two."""
    if (texts is None) == (file is None):
        raise InputError("give either --prompt TEXT ... or --prompts FILE")
    if file is not None:
        try:
            texts = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            why = getattr(problem, "strerror", None) or "not UTF-8"
            raise InputError(f"cannot read {file} ({why}); expected a text file, one prompt a line") from None
    prompts = [text.strip() for text in texts if text.strip()]
    if not prompts:
        raise InputError(f"no prompts in {file or 'the command line'}; expected at least one that is not empty")
    return prompts


def check_arguments(arguments):
    """Raise InputError for what is wrong whatever the source."""
    for steps in arguments.steps:
        if steps < 1:
            raise InputError(f"{steps} steps asked for; expected whole numbers, at least 1")
    for what, number in (("frames", arguments.frames), ("context", arguments.context)):
        if number is not None and (number < 1 or number % 4 != 1):
            raise InputError(f"{what} {number}; expected 4 n + 1, like 1, 17 or 81: the codec takes four together")
    if arguments.image and arguments.video:
        raise InputError("both --image and --video; a clip goes on from one of them: leave out the other")
    if arguments.context and not arguments.video:
        raise InputError("--context without --video; it says how many of its frames are kept")
    for file in filter(None, (arguments.image, arguments.video)):
        if not Path(file).is_file():
            raise InputError(f"no file {file}; expected a picture or a video")


def sample_clips(arguments):
    """Sample every prompt at every step count and write clips and sheet."""
    check_arguments(arguments)
    prompts, device = read_prompts(arguments.prompt, arguments.prompts), find_device(arguments.device)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    source = find_source(arguments.source, dtype, device)
    config, given = source.config, {name: getattr(arguments, name) for name in WAN_CLIP}
    clip = source.clip | {name: value for name, value in given.items() if value is not None}
    chunks = config.causal.first + config.causal.rest
    context = 1 if arguments.image else (arguments.context or 4 * chunks - 3) if arguments.video else 0
    check_clip(source, clip, context)
    size = clip["height"], clip["width"]
    start = read_video(arguments.image or arguments.video, context, *size) if context else None

    try:
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"cannot write to {arguments.output} ({problem.strerror}); name another --output") from None
    tokenizer, text_encoder, vae = load_parts(config.base, "tokenizer", "text_encoder", "vae", dtype=dtype)
    embedded = encode_prompts(tokenizer, text_encoder.to(device), prompts, clip["length"])
    del tokenizer, text_encoder  # UMT5 is larger than the 1.3B model
    vae.to(device)
    prefix = None if start is None else encode_video(vae, start.to(device))
    shape = source.shape(clip)
    steps = list(dict.fromkeys(arguments.steps))
    clips = {f"{each} step{'s' * (each > 1)}": [] for each in steps}
    with tqdm(total=len(prompts) * sum(steps), unit="step", desc="sampling") as bar:
        for number, prompt in enumerate(embedded.split(1)):
            noise = torch.randn(1, *shape, generator=generator(arguments.seed, number)).to(device)
            for count, videos in zip(steps, clips.values(), strict=True):
                latents = sample(config, source.network, noise, prompt, count, prefix)
                videos.append(decode_latents(vae, latents).cpu())
                bar.update(count)
    write_clips(arguments.output, {label: torch.cat(videos) for label, videos in clips.items()}, prompts)
