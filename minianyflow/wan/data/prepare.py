"""From captioned videos to a folder of latents (latents.py): the library behind the command prepare-latents.

A clip is done when its file exists, so an interrupted run goes on by encoding what is missing. Processes share the
clips by their numbers, and every prompt is encoded alone, since rounding depends on the batch: what is written depends
neither on the number of processes nor on interruptions.
"""

import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import huggingface_hub
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from minianyflow.networks.weights import fingerprint
from minianyflow.support.errors import InputError
from minianyflow.support.files import lock_folder, read_json, remove_leftovers, staging_folder
from minianyflow.wan.data.captions import Clip, is_empty
from minianyflow.wan.data.latents import (
    MANIFEST,
    NULL,
    clip_name,
    file_bytes,
    manifest_bytes,
    read_file,
    read_manifest,
    without_padding,
)
from minianyflow.wan.data.options import DTYPES, Options, fps_of
from minianyflow.wan.data.read_video import read_clip, to_float
from minianyflow.wan.data.write_video import clip_sheet
from minianyflow.wan.folders import (
    count_tokens,
    decode_latents,
    encode_prompts,
    encode_video,
    is_folder,
    load,
    load_parts,
)
from minianyflow.wan.prefetch import prefetch

SKIPPED = "skipped.jsonl"  # which clips were skipped, and why
SHEET, SHOWN, SIDE = "sheet.png", 16, 160  # the contact sheet, clips on it, pixels of a still's longer side
CLEANED = "ftfy, HTML entities, blanks"  # what diffusers' prompt_clean does to a caption, as Wan's own code
ROUND = 1024  # prompts that are in memory while their videos are encoded
TIMED = 8  # to estimate the disk and the time for all, at most so many clips are encoded, and at most one of so many
CHANGES = {  # {what: the words of the report}
    "repeated": "clips with repeated frames",
    "cut": "captions cut at {} tokens",
    "colours": "colours converted from {}",
    "transparent": "transparency over black",
    "interlaced": "deinterlaced",
}
HEADER = 500  # bytes of a clip's file beside its numbers, about
SKIP, FEW = 0.1, 20  # this share of the clips may be skipped, or a few; more means that videos are gone

# The model


def fetch(base: str) -> Path:
    """The folder of a pipeline: `base` itself, or what the hub has under that name, without its transformer."""
    if is_folder(base):
        return Path(base)
    parts = ["model_index.json", "vae/*", "text_encoder/*", "tokenizer/*"]
    return Path(load(base, "pipeline", lambda: huggingface_hub.snapshot_download(base, allow_patterns=parts)))


def fps_of_base(base: str) -> float:
    """Frames per second of the videos that a pipeline makes."""
    return float(fps_of(read_json(fetch(base) / "vae/config.json", "expected a pipeline folder").get("z_dim")))


def model_identity(folder: Path) -> dict[str, str]:
    """Which model a pipeline's folder holds: a text per part that changes with its configuration, weights or files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (folder / "tokenizer").glob("[!.]*") if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    parts = {name: fingerprint(folder / name) for name in ("vae", "text_encoder")}
    return parts | {"tokenizer": digest.hexdigest()[:12]}


# The work


@dataclass
class Preparation:
    """Latents of `clips` in `output`: `begin` on the main process, `encode` on all of them, `finish` on the main one.

    base: a pipeline's folder or name on the hub. videos: the folder of the clips. part: (index, parts), this process of
    so many. skip: the share of the clips so far that may be skipped; a few always may. links: whether a file
    may be a link to a place outside `videos`.
    Raises InputError for a folder that other clips, options or weights made.
    """

    base: str
    clips: list[Clip]
    videos: Path
    output: Path
    options: Options
    device: str | torch.device = "cpu"
    part: tuple[int, int] = (0, 1)
    skip: float = SKIP
    links: bool = False

    def __post_init__(self):
        self.videos, self.output = Path(self.videos), Path(self.output)
        if not self.videos.is_dir():
            raise InputError(f"no folder {self.videos}; expected the folder of the videos")
        if not 0 <= self.skip <= 1:
            raise InputError(f"skip={self.skip}; expected a share of the clips, from 0 to 1")
        self.source, self.dtype = fetch(self.base), DTYPES[self.options.dtype]
        codec = read_json(self.source / "vae/config.json", "expected a pipeline folder")
        channels, factor = codec.get("z_dim"), codec.get("scale_factor_spatial", 8)
        if not isinstance(channels, int):
            raise InputError(f"the vae of {self.source} has no z_dim; expected a pipeline of Wan's family")
        shape = self.options
        if shape.height % (2 * factor) or shape.width % (2 * factor):
            sizes = f"height={shape.height}, width={shape.width}"
            raise InputError(f"{sizes}; expected multiples of {2 * factor}: the codec's {factor}, patches of 2")
        self.shape = ((shape.frames - 1) // 4 + 1, channels, shape.height // factor, shape.width // factor)
        self.vae = self.text_parts = self.lock = None  # loaded and locked when needed

    def begin(self, write: bool = True) -> None:
        """Check that the folder is of this work; with `write` make and lock it."""
        lines = "\n".join(json.dumps(clip, ensure_ascii=False) for clip in self.clips)
        captions = f"{len(self.clips)} clips, {hashlib.sha256(lines.encode()).hexdigest()[:12]}"
        made = {"captions": captions} | asdict(self.options) | model_identity(self.source)
        self.head = {"clips": len(self.clips), "base": str(self.base), "cleaned": CLEANED, "made": made}
        found = read_manifest(self.output, unfinished=True)
        for name, value in made.items() if found else ():
            before = found.get("made", {}).get(name)
            if before != value:
                why = f"{self.output} was made with {name}={before!r}; asked for {name}={value!r}"
                raise InputError(f"{why}: name another output folder")
        if write:
            self.lock = lock_folder(self.output)
            if not found:
                self._write(MANIFEST, manifest_bytes(self.head, finished=False))

    def pending(self) -> list[int]:
        """The numbers of the clips that have no file: skipped ones too, since their videos may be better by now."""
        existing = {f"{path.parent.name}/{path.name}" for path in self.output.glob("[0-9]*/[!.]*.safetensors")}
        return [number for number in range(len(self.clips)) if clip_name(number) not in existing]

    def estimate(self, pending: list[int]) -> tuple[float, float, int]:
        """What the clips `pending` will take: seconds per clip on one process, bytes in all, and bytes that are free.

        A few of them are encoded, which `encode` will encode again. Raises InputError if there is too little room.
        """
        few = pending[:: max(TIMED, -(-len(pending) // TIMED))]
        for numbers in (few[:1], few, pending[: TIMED**2]):  # the first one loads the models
            start = time.perf_counter()
            prompts = [self._encode_prompt(number) for number in numbers]
            encoded = sum(not isinstance(latents, str) for _, latents, _ in self._encode_videos(numbers))
            if numbers is few and encoded:  # else all of the few will be skipped
                break
        seconds = (time.perf_counter() - start) / max(encoded, 1)
        tokens = sum(map(torch.numel, prompts)) / len(prompts)
        size = len(pending) * (HEADER + self.dtype.itemsize * (math.prod(self.shape) + tokens))
        place = next(folder for folder in (self.output.absolute(), *self.output.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if size > free:
            room = f"about {size / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB free in {place}"
            raise InputError(f"{room}; make room, name another output folder, or take fewer clips")
        return seconds, size, free

    # Encoding

    def encode(self, pending: list[int]) -> list[dict]:
        """Write this process's share of the clips `pending`; returns {"number", "file", "reason"} per skipped clip.

        The text encoder and the codec take turns in memory, as UMT5 is large.
        """
        index, parts = self.part
        own, skipped = [number for number in pending if number % parts == index], []
        if index == 0 and not (self.output / NULL).exists():
            self._write(NULL, file_bytes({"prompt": self._encode_text(self.options.null)}, self.options.null))
        with tqdm(total=len(own), unit="clip", mininterval=0.5, disable=index > 0) as bar:
            for numbers in (own[start : start + ROUND] for start in range(0, len(own), ROUND)):
                bar.set_description("prompts")
                prompts = {number: self._encode_prompt(number) for number in numbers}
                cut = {number for number in numbers if self._is_cut(number)}
                self.text_parts = None
                bar.set_description("videos")
                for number, latents, changes in self._encode_videos(numbers):
                    if isinstance(latents, str):
                        skipped.append({"number": number, "file": self.clips[number].file, "reason": latents})
                        self._check_skipped(skipped, -(-(number + 1) // parts))
                    else:
                        tensors = {"latents": latents, "prompt": prompts[number]}
                        changes |= {"cut": self.options.length} if number in cut else {}
                        self._write(clip_name(number), file_bytes(tensors, self.clips[number].caption, changes))
                    bar.update()
        return skipped

    def _encode_prompt(self, number):
        """A clip's prompt (L', D)."""
        return without_padding(self._encode_text(self.clips[number].caption)[0])

    def _is_cut(self, number):
        return count_tokens(self.text_parts[0], self.clips[number].caption) > self.options.length

    def _encode_text(self, text):
        """A prompt (1, L, D) on the CPU."""
        if self.text_parts is None:
            tokenizer, text_encoder = load_parts(self.source, "tokenizer", "text_encoder", dtype=self.dtype)
            self.text_parts = tokenizer, text_encoder.to(self.device)
        return encode_prompts(*self.text_parts, [text], self.options.length).to(self.dtype).cpu()

    def _encode_videos(self, numbers) -> Iterator[tuple[int, Tensor | str, dict]]:
        """(number, latents (F, C, h, w) or why there are none, changes); the next clip is read meanwhile."""
        read = prefetch(lambda index: self._read(self.clips[numbers[index]]), len(numbers))
        for index, number in enumerate(numbers):
            frames, changes = read(index)
            yield number, self._encode_video(frames), changes

    def _read(self, clip):
        """Bytes (T, H, W, 3), or the reason why there are none; and what was changed."""
        path, options = self.videos / clip.file, self.options
        if is_empty(clip.caption):
            return "empty caption", {}
        if not self.links and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.videos)):
            return "is a link out of --videos (expected a file inside; --links takes it)", {}
        try:
            return read_clip(path, options.frames, options.height, options.width, options.fps)
        except InputError as problem:
            if not self.videos.is_dir():  # a disk that went away is no reason to skip the clips on it
                again = "put it back and run the same command again"
                raise InputError(f"the folder of videos {self.videos} is gone; {again}") from None
            return str(problem).removeprefix(f"{path} "), {}

    def _encode_video(self, frames):
        if isinstance(frames, str):
            return frames
        latents = encode_video(self._codec(), to_float(frames.to(self.device)))[0].to(self.dtype).cpu()
        return latents if latents.isfinite().all() else "its latents are not finite"

    def _codec(self):
        if self.vae is None:
            (vae,) = load_parts(self.source, "vae")
            self.vae = vae.to(self.device)
        return self.vae

    def _check_skipped(self, skipped, total):
        """Raise InputError if too many of `total` clips, those encoded before included, were skipped."""
        most = int(max(FEW, self.skip * total)) if self.skip else 0
        if len(skipped) > most:
            last = f"the last was {skipped[-1]['file']} ({skipped[-1]['reason']})"
            raise InputError(
                f"{len(skipped)} of {total} clips had to be skipped, {last}; expected at most {most} (skip="
                f"{self.skip:g}): see that the videos are there and run the same command again, or allow more"
            )

    def finish(self, skipped: list[dict]) -> dict:
        """Write skipped.jsonl and the manifest, which is returned. skipped: what `encode` returned on all processes."""
        skipped = sorted(skipped, key=lambda line: line["number"])
        self._write(SKIPPED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped).encode())
        if len(skipped) == len(self.clips):
            raise InputError(f"none of {len(self.clips)} clips could be read; {self.output / SKIPPED} says why")
        self._check_skipped(skipped, len(self.clips))
        manifest = self.head | {"skipped": self.pending(), "shape": self.shape, "report": self._report(skipped)}
        self._write(MANIFEST, manifest_bytes(manifest, finished=True))
        for folder in (self.output, *self.output.glob("[0-9]*")):
            remove_leftovers(folder)
        return manifest

    def _done(self):
        """The numbers of the clips that have a file."""
        return sorted({*range(len(self.clips))} - {*self.pending()})

    def _report(self, skipped):
        """What was changed in the clips that have a file, and why others have none: {what: how many}."""
        counts = Counter()
        for number in self._done():
            for what, value in read_file(self.output / clip_name(number))[1].get("changes", {}).items():
                if what == "repeated":
                    counts["frames repeated"] += value
                counts[CHANGES[what].format(value)] += 1
        for line in skipped:
            counts["skipped: " + re.split(" ?[(;]", line["reason"])[0]] += 1
        return dict(sorted(counts.items()))

    def draw_sheet(self, seed: int = 0) -> Path:
        """Write the contact sheet: clips drawn with `seed`, as their latents decode. Returns its path."""
        numbers = sorted(random.Random(seed).sample(done := self._done(), min(SHOWN, len(done))))
        videos, titles = [], []
        for number in numbers:
            tensors, metadata = read_file(self.output / clip_name(number), "latents")
            codec = self._codec()
            video = decode_latents(codec, tensors["latents"][None].to(codec.device))[0].float().cpu()  # (T, 3, H, W)
            scale = min(1, SIDE / max(video.shape[2:]))
            videos.append(functional.interpolate(video, scale_factor=scale, mode="area"))
            titles.append(f"{number}: {textwrap.shorten(metadata['text'], 60)}")
        sheet, data = clip_sheet({"": torch.stack(videos)}, titles, columns=4), io.BytesIO()
        sheet.savefig(data, format="png", dpi=60)
        self._write(SHEET, data.getvalue())
        return self.output / SHEET

    def _write(self, name, data):
        """A file of the output, whole or not at all, and on the disk itself."""
        path = self.output / name
        with staging_folder(path.parent) as folder, (folder / path.name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
