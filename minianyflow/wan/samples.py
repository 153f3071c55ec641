"""What a source has sampled, kept in a folder: every clip a file of its own, so that nothing is sampled twice.

    settings.json              what it was sampled with; other settings need another folder
    latents/4_steps/00003.*    of clip 3: its latents (safetensors), what it cost, and how its frames move (json)
    videos/4_steps/            as VBench wants them: `{prompt}-{index}.mp4` and nothing else

Clip `index` of prompt p is number index x prompts + p, so that the first numbers have every prompt. Its noise depends
on seed and number alone: it is the same for every source and step count.
"""

import gc
import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.wan.data.videos import write_clip
from minianyflow.wan.folders import decode_latents, encode_prompts, load_parts
from minianyflow.wan.sampler import guided_network, sample

MOST = 2**28  # numbers in the latents that are kept to be compared: 1 GB a step count, 128 clips of Wan's size
LONGEST = 240  # bytes of a file's name without its ending


class Samples:
    """The clips of one source in `folder`. settings: {name: value}, of which JSON can be made; prompts are among them.

    Raises InputError where the folder holds clips of other settings.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = Path(folder), settings
        self.prompts, self.videos, self.seed = (settings[name] for name in ("prompts", "videos", "seed"))
        beside = self.folder / "settings.json"
        before = _read_json(beside)
        for name in settings if before else ():
            if before.get(name) != settings[name]:
                what = f"{folder} holds clips that were sampled with another setting ({name})"
                raise InputError(f"{what}; name another --output, or remove it")
        if not before and PartialState().is_main_process:
            self._put(beside, lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))

    @property
    def count(self):
        """Clips a step count."""
        return len(self.prompts) * self.videos

    def latents(self, steps, number):
        """Where the latents of a clip are; with another ending, what is known of it."""
        return self.folder / "latents" / f"{steps}_steps" / f"{number:05}.safetensors"

    def video(self, steps, number):
        """Where its video is."""
        index, prompt = divmod(number, len(self.prompts))
        return self.folder / "videos" / f"{steps}_steps" / f"{file_stem(self.prompts[prompt])}-{index}.mp4"

    def titles(self):
        """{name of a video: its prompt}."""
        return {self.video(1, number).name: self.prompts[number % len(self.prompts)] for number in range(self.count)}

    def kept(self, shape):
        """How many of the first clips keep their latents, to be compared."""
        return min(self.count, max(2, MOST // torch.Size(shape).numel()))

    def decoded(self, steps, number):
        """Whether a clip is finished."""
        return self.latents(steps, number).with_suffix(".json").exists() and self.video(steps, number).exists()

    def read(self, steps, count):
        """Latents (count, F, C, h, w), float32, of the first clips."""
        return torch.stack([self._read(self.latents(steps, number)) for number in range(count)])

    def known(self, steps):
        """What is known of every clip at a step count: {name: [one a clip]}."""
        each = [_read_json(self.latents(steps, number).with_suffix(".json")) for number in range(self.count)]
        return {name: [clip[name] for clip in each] for name in each[0]}

    def sample(self, source, embedded, steps, batch=1, guidance=1.0, null=None, shape=None):
        """Sample what is not there yet. embedded (P, L, D), of the prompts. guidance: of a teacher, with `null`."""
        todo = {each: [n for n in range(self.count) if not self._sampled(each, n)] for each in dict.fromkeys(steps)}
        pieces = [(each, todo[each][k : k + batch]) for each in todo for k in range(0, len(todo[each]), batch)]
        device, network = embedded.device, EvaluationCounter(source.network)
        u = guided_network(network, source.config, null, guidance) if guidance != 1 else network
        with _bar("sampling", self.folder.name, sum(each * len(part) for each, part in _mine(pieces)), "step") as bar:
            for each, numbers in _mine(pieces):
                noise = [torch.randn(shape, generator=generator(self.seed, number)) for number in numbers]
                prompt = embedded[[number % len(self.prompts) for number in numbers]]
                before, start = network.rows, _now(device)
                made = sample(source.config, u, torch.stack(noise).to(device), prompt, each).float().cpu()
                seconds, rows = (_now(device) - start) / len(numbers), (network.rows - before) / len(numbers)
                if not bool(made.isfinite().all()):
                    raise InputError(f"{self.folder.name} at {each} steps is not finite; use fp32, or train it longer")
                cost = {"seconds": str(seconds), "evaluations": str(rows)}
                for number, latents in zip(numbers, made, strict=True):
                    tensors = {"latents": latents.contiguous()}
                    self._put(self.latents(each, number), partial(_save, tensors, cost))
                bar.update(each * len(numbers))
        PartialState().wait_for_everyone()

    def decode(self, vae, steps, batch=1):
        """Decode and write what is not there yet, and note how its frames move."""
        todo = [(each, n) for each in dict.fromkeys(steps) for n in range(self.count) if not self.decoded(each, n)]
        pieces = [todo[k : k + batch] for k in range(0, len(todo), batch)]
        with _bar("decoding", self.folder.name, sum(map(len, _mine(pieces))), "clip") as bar:
            for piece in _mine(pieces):
                latents = torch.stack([self._read(self.latents(*place)) for place in piece])
                videos = decode_latents(vae, latents.to(vae.device), batch).cpu()
                for (each, number), video in zip(piece, videos, strict=True):
                    path = self.latents(each, number)
                    known = {name: float(value) for name, value in _metadata(path).items()} | motion(video)
                    self._put(self.video(each, number), partial(write_clip, clip=video))
                    self._put(path.with_suffix(".json"), partial(_write_json, known))
                    if number >= self.kept(latents.shape[1:]):
                        path.unlink()
                    bar.update()
        PartialState().wait_for_everyone()

    def _sampled(self, steps, number):
        return self.latents(steps, number).exists() or self.decoded(steps, number)

    def _read(self, path):
        try:
            return load_file(path)["latents"]
        except (OSError, SafetensorError, KeyError):
            raise InputError(f"{path} cannot be read; remove it, and the same command samples it again") from None

    def _put(self, path, write):
        """write(path), so that the file is there whole or not at all; never a second one beside it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=self.folder) as inside:
                write(Path(inside) / path.name)
                os.replace(Path(inside) / path.name, path)
        except OSError as problem:
            why = f"cannot write {path} ({problem.strerror or problem})"
            raise InputError(f"{why}; make room, or name another folder with --output") from None


def sample_all(samples, source, shape, steps, dtype, device, batch=1, guidance=1.0, negative="", length=512):
    """Text encoder, then transformer, then codec, each alone on the device, and only where there is something to do."""
    wanted = [(each, number) for each in steps for number in range(samples.count)]
    if not all(samples._sampled(*each) for each in wanted):
        tokenizer, text_encoder = load_parts(source.config.base, "tokenizer", "text_encoder", dtype=dtype)
        texts = [*samples.prompts, negative]
        *prompts, null = encode_prompts(tokenizer, text_encoder.to(device), texts, length).split(1)
        del tokenizer, text_encoder  # UMT5 is larger than the 1.3B model
        source.network.to(device)
        samples.sample(source, torch.cat(prompts), steps, batch, guidance, null, shape)
    source.network = None
    gc.collect()
    if not all(samples.decoded(*each) for each in wanted):
        (vae,) = load_parts(source.config.base, "vae")
        samples.decode(vae.to(device), steps, batch)


def motion(video):
    """How the frames (T, 3, H, W) of a clip change: mean squares of first and second differences in time."""
    first, second = video.diff(dim=0), video.diff(n=2, dim=0)
    return {
        "change": float(first.square().mean()) if len(first) else 0.0,
        "second_change": float(second.square().mean()) if len(second) else 0.0,
    }


def roughness(known):
    """Second differences over first, {"change": [...], "second_change": [...]} of all clips; NaN where nothing moves.

    0: every change goes on as the last one did; 2: no change knows of the last one; 3: no frame knows of another.
    """
    change = sum(known["change"])
    return sum(known["second_change"]) / change if change else float("nan")


def file_stem(prompt):
    """A prompt as the start of a file's name: itself wherever it can be one, as VBench asks."""
    name = re.sub(r"[/\\\0\n]", "_", prompt).lstrip(".")
    if name != prompt or len(name.encode()) > LONGEST:  # shortened, and told apart from others like it
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        name = f"{name.encode()[: LONGEST - 9].decode(errors='ignore')}_{digest}"
    return name


def fingerprint(name):
    """What tells the weights of a source: sizes and times of its files; of one on the hub, its name."""
    if not Path(name).is_dir():
        return name
    files = sorted(path for kind in ("safetensors", "json", "yaml") for path in Path(name).rglob(f"*.{kind}"))
    told = [(str(path.relative_to(name)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def costs(known):
    """Of one clip: network evaluations and seconds, the median over clips."""
    return {name: statistics.median(known[name]) for name in ("evaluations", "seconds")}


def _mine(items):
    """The share of this process."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def _bar(what, name, total, unit):
    return tqdm(total=total, unit=unit, desc=f"{what} {name}", disable=None if total else True)


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _save(tensors, metadata, path):
    save_file(tensors, path, metadata)


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _write_json(value, path):
    path.write_text(json.dumps(value) + "\n")


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read; remove it, or name another --output") from None
