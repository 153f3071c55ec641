"""The samples of a source in a folder, one file per clip: a clip whose file exists is not sampled again.

    settings.json              how they are sampled; other settings need another folder
    latents/4_steps/00003.*    of clip 3: latents (safetensors); evaluations, seconds and motion (json)
    videos/4_steps/            for VBench: `{prompt}-{index}.mp4` and nothing else
    vbench/4_steps/            VBench's results, if its command was run (docs/evaluation.md)

Clip `index` of prompt p is number index x prompts + p, so that the first numbers cover every prompt. Its noise depends
on seed and number alone: it is the same for every source and step count.
"""

import gc
import hashlib
import math
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Annotated, NotRequired

import torch
from accelerate import PartialState
from pydantic import Field
from safetensors.torch import save_file
from torch.nn.functional import avg_pool2d
from tqdm import tqdm
from typing_extensions import TypedDict

from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.support.errors import InputError
from minianyflow.support.files import check_json, read_json, unfinished_folder
from minianyflow.support.reports import write_report
from minianyflow.times import generator
from minianyflow.wan.data.latents import read_file
from minianyflow.wan.data.options import DTYPES
from minianyflow.wan.data.write_video import write_clip
from minianyflow.wan.folders import decode_latents, embed, load_parts
from minianyflow.wan.run import Clip
from minianyflow.wan.sampler import guided_network, sample
from minianyflow.wan.sources import Source

Figures = dict.fromkeys(("seconds", "evaluations", "change", "second_change"), float)
Figures |= dict.fromkeys(("flow", "continued"), NotRequired[float])  # clips of before have none
Figures = TypedDict("Figures", Figures)
Scores = dict[str, Annotated[list, Field(min_length=1)]]  # VBench's: a score, then one per video
MOST = 2**28  # numbers in the latents that stay on disk: 1 GB per step count, 128 clips of Wan's size
LATENT_FRAME, BLOCK = 4, 8  # frames of one; pixels of a block of the optical flow
LONGEST = 240  # bytes of a file name without its suffix
AGAIN = "name another folder for the output, or remove it"


class Settings(TypedDict):
    """The fields of settings.json that every source has."""

    source: str
    prompts: list[str]
    videos: int
    clip: Clip
    seed: int


class Samples:
    """The samples of one source in `folder`.

    settings: plain enough for JSON: prompts, videos (per prompt), clip, seed, precision, and of a teacher guidance and
    negative, the text of its null prompt.
    Raises InputError for a folder with samples of other settings.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.folder, self.settings = Path(folder), settings
        self.prompts, self.seed = settings["prompts"], settings["seed"]
        self.count = len(self.prompts) * settings["videos"]  # clips per step count
        path = self.folder / "settings.json"
        before = read_json(path, AGAIN, Settings) if path.exists() else {}
        for name in settings if before else ():
            if before.get(name) != settings[name]:
                raise InputError(f"{folder} holds clips that were sampled with another setting ({name}); {AGAIN}")
        if not before and PartialState().is_main_process:
            self._put(path, partial(write_report, settings))

    def latents(self, steps: int, number: int) -> Path:
        """The file of a clip's latents; its figures are beside it, with the suffix .json."""
        return self.folder / "latents" / f"{steps}_steps" / f"{number:05}.safetensors"

    def video(self, steps: int, number: int) -> Path:
        """The file of a clip's video."""
        index, prompt = divmod(number, len(self.prompts))
        return self.folder / "videos" / f"{steps}_steps" / f"{file_stem(self.prompts[prompt])}-{index}.mp4"

    def titles(self) -> dict[str, str]:
        """{file name of a video: its prompt}."""
        return {self.video(1, number).name: self.prompts[number % len(self.prompts)] for number in range(self.count)}

    def compared(self, shape: tuple[int, ...]) -> int:
        """Number of first clips that are compared: their latents stay on disk."""
        return min(self.count, max(2, MOST // torch.Size(shape).numel()))

    def finished(self, steps: int, number: int, compared: int) -> bool:
        """Whether a clip is sampled, decoded and measured."""
        latents = self.latents(steps, number)
        files = [latents.with_suffix(".json"), self.video(steps, number), *[latents] * (number < compared)]
        return all(file.exists() for file in files)

    def read(self, steps: int, count: int) -> torch.Tensor:
        """Latents (count, F, C, h, w), float32, of the first clips."""
        files = [self.latents(steps, number) for number in range(count)]
        clips = [read_file(file, "latents")[0]["latents"] for file in files]
        for file, clip in zip(files, clips, strict=True):
            if clip.shape != clips[0].shape:
                raise InputError(f"{file} holds {[*clip.shape]}, {files[0]} {[*clips[0].shape]}; {AGAIN}")
        return torch.stack(clips)

    def figures(self, steps: int) -> dict[str, list[float]]:
        """Evaluations, seconds and motion: {name: [one per clip]}."""
        files = [self.latents(steps, number).with_suffix(".json") for number in range(self.count)]
        clips = [read_json(file, AGAIN, Figures) for file in files]
        there = [name for name in Figures.__annotations__ if all(name in clip for clip in clips)]
        return {name: [clip[name] for clip in clips] for name in there}

    def vbench(self, steps: int) -> dict[str, float]:
        """{dimension: score} of all `*_eval_results.json` in vbench/, {} if VBench was not run."""
        files = sorted((self.folder / "vbench" / f"{steps}_steps").glob("*_eval_results.json"))
        results = [(file, *result) for file in files for result in read_json(file, AGAIN, Scores).items()]
        return {f"vbench_{name}": check_json(scores[0], float, file, AGAIN) for file, name, scores in results}

    def make(self, source: Source, steps: list[int], device: torch.device, batch: int = 1) -> None:
        """Sample, decode and measure the clips that are missing."""
        compared, count = self.compared(source.shape(self.settings["clip"])), range(self.count)
        missing = {n: [number for number in count if not self.finished(n, number, compared)] for n in steps}
        pieces = [(n, numbers[k : k + batch]) for n, numbers in missing.items() for k in range(0, len(numbers), batch)]
        if pieces := pieces[PartialState().process_index :: PartialState().num_processes]:
            self._sample(source, pieces, device, compared)
        source.network = None
        gc.collect()
        PartialState().wait_for_everyone()

    def _sample(self, source, pieces, device, compared):
        """Sample `pieces`, pairs (step count, numbers of clips). The text encoder, which is large, is gone by then."""
        texts, dtype = [*self.prompts, self.settings["negative"]], DTYPES[self.settings["precision"]]
        embedded = embed(source.config.base, texts, self.settings["clip"]["length"], dtype, device)
        vae = load_parts(source.config.base, "vae")[0].to(device)
        network, shape = EvaluationCounter(source.network.to(device)), source.shape(self.settings["clip"])
        guidance, total = self.settings["guidance"], sum(steps * len(numbers) for steps, numbers in pieces)
        u = guided_network(network, source.config, embedded[-1:], guidance) if guidance != 1 else network
        with tqdm(total=total, unit="step", desc=f"sampling {self.folder.name}", disable=None) as bar:
            for steps, numbers in pieces:
                noise = torch.stack([torch.randn(shape, generator=generator(self.seed, number)) for number in numbers])
                prompt = embedded[[number % len(self.prompts) for number in numbers]]
                before, start = network.rows, _now(device)
                clips = sample(source.config, u, noise.to(device), prompt, steps).float()
                seconds, rows = (_now(device) - start) / len(numbers), (network.rows - before) / len(numbers)
                if not bool(clips.isfinite().all()):
                    raise InputError(f"{self.folder.name} at {steps} steps is not finite; use fp32, or train it longer")
                videos, clips = decode_latents(vae, clips, len(numbers)).cpu(), clips.cpu()
                for number, latents, video in zip(numbers, clips, videos, strict=True):
                    path, figures = self.latents(steps, number), {"seconds": seconds, "evaluations": rows}
                    if number < compared:
                        self._put(path, partial(save_file, {"latents": latents.contiguous()}))
                    self._put(self.video(steps, number), partial(write_clip, clip=video, fps=source.fps))
                    self._put(path.with_suffix(".json"), partial(write_report, figures | motion(video)))
                bar.update(steps * len(numbers))

    def _put(self, path, write):
        """write(path), so that the file is there whole or not at all; never a second one beside it."""
        with unfinished_folder(self.folder, path) as inside:
            write(inside / path.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(inside / path.name, path)


def motion(video: torch.Tensor) -> dict[str, float]:
    """Mean squares of first and second differences in time of the frames (T, 3, H, W) of a clip; and for `persistence`:

    flow, continued: the optical flow of each latent frame (Lucas and Kanade 1981, blocks of 8 x 8 pixels of frames that
    are about 64 high or wide), weighted by the contrast of a block: its mean square, its product with that of the next.
    """
    first, second = video.diff(dim=0), video.diff(n=2, dim=0)
    figures = {
        "change": float(first.square().mean()) if len(first) else 0.0,
        "second_change": float(second.square().mean()) if len(second) else 0.0,
    }
    if len(first) < 2 * LATENT_FRAME or min(video.shape[2:]) < BLOCK:
        return figures | {"flow": 0.0, "continued": 0.0}
    small = avg_pool2d(video.mean(1)[None], max(1, min(video.shape[2:]) // (8 * BLOCK)))[0]
    down, right = ((slope[1:] + slope[:-1]) / 2 for slope in torch.gradient(small, dim=(1, 2)))
    later = small.diff(dim=0)
    products = torch.stack([right * right, right * down, down * down, right * later, down * later])
    windows = products[:, : len(later) // LATENT_FRAME * LATENT_FRAME].unflatten(1, (-1, LATENT_FRAME)).mean(2)
    xx, xy, yy, xt, yt = avg_pool2d(windows, BLOCK, BLOCK // 2)
    contrast, least = xx + yy, 1e-3 * (xx + yy).mean() + 1e-12
    determinant = (xx + least) * (yy + least) - xy**2
    flow = torch.stack([xy * yt - (yy + least) * xt, xy * xt - (xx + least) * yt]) / determinant
    weight, now, after = torch.minimum(contrast[1:], contrast[:-1]), flow[:, :-1], flow[:, 1:]
    squares = [float((weight * part.square().sum(0)).sum()) for part in (now, after)]
    return figures | {"flow": math.prod(squares) ** 0.5, "continued": float((weight * (now * after).sum(0)).sum())}


def roughness(figures: dict[str, list[float]]) -> float:
    """Second differences over first, of all clips of `motion`; NaN if nothing moves.

    0: every change continues the last one; 2: changes are independent of the last one; 3: frames are independent.
    """
    change = sum(figures["change"])
    return sum(figures["second_change"]) / change if change else float("nan")


def persistence(figures: dict[str, list[float]]) -> float:
    """How much of the optical flow of a latent frame is that of the one before, of all clips of `motion`; 1: all.

    Things leave their blocks, so data read less than 1. Redrawn at every latent frame: 0. NaN if nothing flows.
    """
    flow = sum(figures["flow"])
    return sum(figures["continued"]) / flow if flow else float("nan")


def file_stem(prompt: str) -> str:
    """A prompt as the start of a file name: the prompt itself if it can be one, as VBench expects."""
    name = re.sub(r"[/\\\0\n]", "_", prompt).lstrip(".")
    if name != prompt or len(name.encode()) > LONGEST:  # shortened, and unlike others of the same start
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        name = f"{name.encode()[: LONGEST - 9].decode(errors='ignore')}_{digest}"
    return name


def source_fingerprint(name: str) -> str:
    """A hash of the sizes and times of a source's files, which identifies its weights; of one on the hub, its name."""
    if not Path(name).is_dir():
        return name
    files = sorted(path for kind in ("safetensors", "json", "yaml") for path in Path(name).rglob(f"*.{kind}"))
    stats = [(str(path.relative_to(name)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
