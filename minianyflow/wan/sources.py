"""What can be sampled: the folder of a run, an exported pipeline, released AnyFlow weights or Wan2.1 itself."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from typing_extensions import TypedDict

from minianyflow.networks.causal_attention import chunk_partition, compressed_chunks
from minianyflow.networks.pipelines import load_lora
from minianyflow.support.errors import InputError
from minianyflow.support.files import check_json, read_json, regular
from minianyflow.wan.config import Config, load_config
from minianyflow.wan.data.captions import MARK, is_empty
from minianyflow.wan.data.options import WAN_CLIP, fps_of
from minianyflow.wan.folders import (
    PIPELINES,
    class_name,
    codec_factor,
    configuration,
    is_folder,
    load_parts,
    load_transformer,
)
from minianyflow.wan.run import Clip, load_run, read_run
from minianyflow.wan.run_networks import network_of, transformer_of


class Exported(TypedDict):
    """The fields of minianyflow.json."""

    stage: Literal["teacher", "forward", "on_policy"]
    clip: Clip


class ExportedLora(TypedDict):
    """More fields of it, of an adapter alone."""

    architecture: Literal["bidirectional", "causal"]
    causal: dict
    lora_of: str
    shift: float


MOST_STEPS, LONGEST = 10**5, 10**5
EXPECTED = "the folder of a run or of an export, released weights like nvidia/AnyFlow-..., or Wan2.1"


class NoPrompts(InputError):
    """A file of prompts is empty, gone, or cannot be read now."""


@dataclass
class Source:
    """What is sampled: u(z, t, r, prompt), its configuration, its usual clip, pixels per side of a latent.

    `config.base` is the pipeline with its codec and text encoder.
    """

    network: Callable
    config: Config
    clip: dict[str, int]
    factor: int = 8

    @property
    def fps(self) -> int:
        """Frames per second of its videos."""
        return fps_of(self.network.transformer.config.in_channels)

    def shape(self, clip: dict[str, int]) -> tuple[int, int, int, int]:
        """(F, C, h, w) of a clip's latents."""
        frames, channels = (clip["frames"] - 1) // 4 + 1, self.network.transformer.config.in_channels
        return frames, channels, clip["height"] // self.factor, clip["width"] // self.factor


def find_source(name: str, dtype: torch.dtype, device: torch.device | str, base: str | None = None) -> Source:
    """The `Source` called `name`, a folder or a name on the hub. Raises InputError for another name.

    base: where the base of an exported LoRA is now; None: where it was.
    """
    config, clip = identify(name)
    lora = (Path(name) / LORA_WEIGHT_NAME_SAFE).is_file()
    if base and not lora:
        raise InputError(f"--base with {name}, which holds its own; expected it with an exported LoRA alone")
    config = replace(config, base=base) if base else config
    if any(str(start).startswith("nvidia/") for start in (config.base, config.student, config.teacher)):
        licence = "NVIDIA's released AnyFlow weights carry a non-commercial licence; see their page on the hub"
        print(f"note: {licence}", file=sys.stderr)
    if _is_run(name):
        transformer, config = load_run(name, "student", dtype, device)
        return Source(network_of(transformer, config), config, clip, codec_factor(config.base))
    if lora:
        transformer = transformer_of(config, config.base, dtype, device)
        load_lora(transformer, name)
        return Source(network_of(transformer, config), config, clip, codec_factor(config.base))
    transformer = load_transformer(name, config.architecture, dtype, device=device)
    (scheduler,) = load_parts(name, "scheduler")
    shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))  # flow_shift is Wan's own
    config = replace(config, shift=shift)
    if config.architecture == "causal":
        first, *others = transformer.config.chunk_partition
        config = replace(config, causal=replace(config.causal, first=first, rest=max(others, default=first)))
    network = network_of(transformer, config)
    network.timesteps = float(scheduler.config.num_train_timesteps)  # tiny ones count to 5: networks/wan.py
    return Source(network, config, clip, codec_factor(name))


def identify(name: str) -> tuple[Config, dict[str, int]]:
    """Configuration and usual clip of a source, before its weights are loaded. Raises InputError as `find_source`."""
    folder, index, beside = Path(name), Path(name) / "model_index.json", Path(name) / "minianyflow.json"
    local = is_folder(name, EXPECTED)
    if _is_run(name):
        config, run = read_run(name)
        return config, run["clip"]
    exported = read_json(beside, "export the run again", Exported) if beside.is_file() else {}
    if "lora_of" in exported:
        exported = check_json(exported, ExportedLora, beside, "export the run again")
        given = [f"{name}={json.dumps(exported[name])}" for name in ("shift", "causal")]
        told = load_config([exported["architecture"]], given)
        return replace(told, stage=exported["stage"], base=exported["lora_of"]), WAN_CLIP | exported["clip"]
    if local and not index.is_file():
        raise InputError(f"neither run.json nor model_index.json in {folder}; expected {EXPECTED}")
    index = configuration(name, "pipeline", lambda: DiffusionPipeline.load_config(name))
    kind, more = class_name(index), (index.get("transformer_2") or [None])[0]
    if kind not in PIPELINES or more:
        raise InputError(f"{name} holds a {kind}{' of two transformers' if more else ''}; expected {EXPECTED}")
    architecture, stage = ("bidirectional", "teacher") if PIPELINES[kind] == "Wan" else (PIPELINES[kind], "forward")
    config = replace(load_config([architecture]), base=name, stage=exported.get("stage", stage))
    return config, WAN_CLIP | exported.get("clip", {})


def _is_run(name):
    return any((Path(name) / file).is_file() for file in ("config.yaml", "run.json"))


def check_numbers(steps: list[int], **frames: int | None) -> None:
    """Raise InputError for step counts or numbers of frames that no source can make."""
    for count in steps:
        if not 1 <= count <= MOST_STEPS:
            raise InputError(f"{count} steps; expected whole numbers, at least 1, at most {MOST_STEPS}")
    for name, number in frames.items():
        if number is not None and (number < 1 or number % 4 != 1):
            raise InputError(f"{name} {number}; expected 4 n + 1, like 1, 17 or 81: the codec takes four together")


def check_clip(source: Source, clip: dict[str, int], context: int = 0) -> None:
    """Raise InputError for a clip that the network cannot make, or that cannot start with `context` frames."""
    size, causal = source.network.transformer.config, source.config.architecture == "causal"
    frames, chunks = (clip["frames"] - 1) // 4 + 1, ()
    if causal:
        chunks = chunk_partition(frames, source.config.causal.first, source.config.causal.rest, ragged=True)
    most = size.rope_max_seq_len  # positions along each axis
    if not causal and frames > most:
        raise InputError(f"{clip['frames']} frames; expected at most {4 * most - 3}")
    coarse = causal and compressed_chunks(chunks, size.full_chunk_limit)
    _, *patches = size.compressed_patch_size if coarse else size.patch_size
    for side, patch in zip(("height", "width"), patches, strict=True):
        multiple = source.factor * patch
        if clip[side] < 1 or clip[side] % multiple:
            expected = f"a multiple of {multiple}: the codec's {source.factor}, patches of {patch}"
            raise InputError(f"{side} {clip[side]}; expected {expected}")
        if clip[side] > (largest := most * source.factor * size.patch_size[-1]):
            raise InputError(f"{side} {clip[side]}; expected at most {largest}, which the model has places for")
    if not 1 <= clip["length"] <= LONGEST:
        raise InputError(f"length {clip['length']}; expected 1 to {LONGEST} tokens, 512 for Wan2.1")
    if context >= clip["frames"]:
        raise InputError(f"a start of {context} frames in a clip of {clip['frames']}; expected fewer, or more frames")
    ends = [4 * sum(chunks[:count]) - 3 for count in range(1, len(chunks))]
    if causal and context and context not in ends:
        raise InputError(f"a start of {context} frames; expected {' or '.join(map(str, ends))}, where a chunk ends")


def read_prompts(texts: list[str] | None = None, file: str | Path | None = None) -> list[str]:
    """The prompts that are not empty, of a list or one per line of a file. Raises NoPrompts if there are none."""
    if file is not None:
        if Path(file).suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"):
            raise InputError(f"{file} is a table by its name; expected a text file, one prompt per line, like a .txt")
        try:
            texts = regular(file).read_text(encoding="utf-8").replace(MARK, "").split("\n")  # U+2028 ends no line
        except (OSError, UnicodeDecodeError) as problem:
            why = getattr(problem, "strerror", None) or "not UTF-8"
            raise NoPrompts(f"cannot read {file} ({why}); expected a text file, one prompt per line") from None
    prompts = [text.strip() for text in texts if not is_empty(text)]
    if not prompts:
        raise NoPrompts(f"no prompts in {file or 'the list'}; expected at least one that is not empty")
    return prompts
