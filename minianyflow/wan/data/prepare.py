"""From captioned videos to a folder of shards (shards.py), by scripts/prepare_latents.py.

Clip k of the captions file goes to shard k // shard_size, whoever encodes it: what is written depends neither on the
number of processes nor on interruptions. A shard appears whole, its record in .unfinished/ after it; prompts wait there
for their videos, as the text encoder and the codec are loaded in turn. At the end the records become manifest.json.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from tqdm import tqdm

from minianyflow.support.errors import InputError
from minianyflow.support.files import lock_folder
from minianyflow.wan.data.clips import DTYPES, read_clip
from minianyflow.wan.data.shards import AGAIN, MANIFEST, NULL, SKIPPED, read_manifest
from minianyflow.wan.folders import encode_prompts, encode_video, load_parts

WORK = ".unfinished"  # folder of records, of prompts without videos and of files being written
BATCH = 8  # prompts that are encoded at a time; fixed, as rounding depends on it
AHEAD = 2  # clips that are read while another is encoded
TIMED = 4  # clips that are encoded to say how long all will take
HEADER = 160  # bytes of a shard beside its numbers, about
SKIP, FEW, RECENT = 0.1, 20, 1000  # a share of the last clips may be skipped, or a few: else videos went away

# The model


def fetch(base):
    """The folder of a pipeline: `base` itself, or what the hub has under that name, without its transformer."""
    if Path(base).is_dir():
        return Path(base)
    if Path(base).exists() or str(base).count("/") != 1 or str(base)[0] in "./~":
        raise InputError(f"no folder {base}; expected a pipeline folder, or a name on the hub like owner/model")
    try:
        needed = ["model_index.json", "vae/*", "text_encoder/*", "tokenizer/*"]
        return Path(huggingface_hub.snapshot_download(str(base), allow_patterns=needed))
    except Exception as problem:
        why = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise InputError(
            f"{base} cannot be fetched ({why}); check the name and the network, or give a folder"
        ) from None


def identity(folder, name):
    """Which model it is: {"base": its name, "vae": digest, "text_encoder": digest, "tokenizer": digest}.

    Digests are of configurations and weights, whichever files these are spread over.
    """
    parts = {part: _weights_digest(Path(folder) / part) for part in ("vae", "text_encoder")}
    files = sorted((Path(folder) / "tokenizer").glob("*"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return {"base": str(name)} | parts | {"tokenizer": digest.hexdigest()}


def verify_model(folder, base):
    """[what of the pipeline `base` is not what made the shards in `folder`], a line each."""
    made, found = read_manifest(folder)["model"], identity(fetch(base), base)
    parts = [name for name in found if name != "base" and found[name] != made[name]]
    return [f"{folder} was made with another {name} than that of {base}" for name in parts]


def _weights_digest(folder):
    digest, weights = hashlib.sha256(json.dumps(_config(folder), sort_keys=True).encode()), {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            weights |= dict.fromkeys(file.keys(), file)
        for name, file in sorted(weights.items()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    except (SafetensorError, OSError) as problem:
        raise InputError(f"{folder} cannot be read ({problem}); {AGAIN}") from None
    if not weights:
        raise InputError(f"no *.safetensors in {folder}; expected the weights of a pipeline's {folder.name}")
    return digest.hexdigest()


def _config(folder):
    """A part's configuration, without what diffusers and transformers add on saving."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"no config.json in {folder}; expected a pipeline folder, with {folder.name} in it") from None
    return {name: value for name, value in config.items() if name[0] != "_" and name != "transformers_version"}


# The work


class Preparation:
    """Shards of `clips` in `output`, made by `encode` on each of several processes; `finish` writes the manifest.

    skip: the share of clips that may be skipped, of all and of the last that a process looked at; a few always may.
    Raises InputError for a folder that other clips, options or weights made.
    """

    def __init__(self, base, clips, videos, output, options, device="cpu", part=(0, 1), skip=SKIP):
        if not Path(videos).is_dir():
            raise InputError(f"no folder {videos}; expected the one that the videos are in")
        if not 0 <= skip <= 1:
            raise InputError(f"skip={skip}; expected a share of the clips, from 0 to 1")
        self.base, self.source = base, fetch(base)
        for name, key in (("vae", "z_dim"), ("text_encoder", "d_model")):
            if key not in _config(self.source / name):
                raise InputError(f"the {name} of {base} has no {key}; expected a pipeline of Wan's family")
        self.clips, self.videos, self.output, self.options = clips, Path(videos), Path(output), options
        self.device, (self.index, self.parts) = device, part
        self.work, self.shards = self.output / WORK, -(-len(clips) // options.shard_size)
        self.vae = self.text_parts = self.known_null = self.held = None  # loaded, encoded, held when needed
        self.known, self.known_prompts = {}, {}  # encoded before: to see how long it takes, or by an earlier run
        self.skip, self.recent = skip, deque(maxlen=RECENT)  # whether each of the last clips was skipped
        self.encoded = {"texts": 0, "videos": 0}

    # What is there

    def begin(self, write=True, retry=False):
        """See that the folder is of this work, or make it; on the main process. Returns whether it is finished.

        retry: clips that were skipped before are tried again, and shards that are missing or cut short made again.
        """
        lines = "\n".join(json.dumps(dataclasses.astuple(clip), ensure_ascii=False) for clip in self.clips)
        self.head = {
            "format": 1,
            "model": identity(self.source, self.base),
            "options": dataclasses.asdict(self.options),
            "clips": {"count": len(self.clips), "sha256": hashlib.sha256(lines.encode()).hexdigest()},
        }
        found = read_manifest(self.output, unfinished=True)
        retry = retry and bool(found) and not (found["finished"] and self._complete(found))
        if found:
            self._check_same(found, self.head)
        elif any(self.output.glob("*.safetensors")):
            raise InputError(f"{self.output} holds shards without a {MANIFEST}; expected a new folder: name another")
        if write and (retry or not self.finished()):
            self.held = lock_folder(self.work)
        if write and not found:
            self._write(self.output / MANIFEST, _json(self.head | {"finished": False, "shards": {}}))
        if write and retry:
            self._reopen()
        return self.finished()

    def finished(self):
        """Whether nothing is left to do."""
        found = read_manifest(self.output, unfinished=True)
        return bool(found and found["finished"])

    def _check_same(self, found, wanted):
        for name in ("options", "model", "clips"):
            for key, value in wanted[name].items():
                other = found.get(name, {}).get(key)
                if other == value or (name, key) == ("model", "base"):
                    continue
                shown = {"model": f"another {key}", "clips": f"other clips ({found['clips']['count']})"}
                what = shown.get(name, f"{key}={other!r}")
                now = {"model": f"that of {self.base}", "clips": f"{len(self.clips)} of --captions"}
                raise InputError(
                    f"{self.output} was made with {what}; asked for {now.get(name, f'{key}={value!r}')}: "
                    "name another --output"
                )

    def pending(self):
        """Numbers of the shards that are still to be made."""
        return [number for number in range(self.shards) if self._record(number) is None]

    def _reopen(self):
        """Mark the shards that clips were skipped of, to be made again; a finished folder is then unfinished."""
        found = read_manifest(self.output, unfinished=True)
        if found["finished"]:
            records = self._records_of(found)
        else:
            records = {number: self._record(number) for number in range(self.shards)}
        for number, record in records.items():
            if record and (record["skipped"] or found["finished"]):
                again = {"again": True} if record["skipped"] else {}
                self._note(number, record | again)
        if found["finished"]:
            self._write(self.output / MANIFEST, _json(self.head | {"finished": False, "shards": {}}))

    def _complete(self, manifest):
        """Whether a finished folder has every clip, and every shard in its size; digests are for `shards.verify`."""
        wanted = {f"{name}.safetensors": entry for name, entry in manifest["shards"].items()}
        wanted |= {f"{name}.jsonl": entry["captions"] for name, entry in manifest["shards"].items()}
        sizes = {path.name: path.stat().st_size for path in self.output.iterdir()}
        there = NULL in sizes and all(sizes.get(name) == wanted[name]["bytes"] for name in wanted)
        return there and not manifest["skipped"]["count"]

    def _records_of(self, manifest):
        """The records of a finished folder, {number: record}."""
        path = self.output / SKIPPED
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != manifest["skipped"]["sha256"]:
            raise InputError(f"{path} is not what {MANIFEST} lists; expected it as it was written: put it back")
        skipped = {each["file"]: each for each in map(json.loads, filter(None, data.split(b"\n")))}
        records = {}
        for number in range(self.shards):
            entry = manifest["shards"].get(f"{number:05d}", {"latents": [0]})
            those = [skipped[clip.file] for clip in self._in_shard(number) if clip.file in skipped]
            records[number] = entry | {"rows": entry["latents"][0], "skipped": those}
        return records

    def _record(self, number):
        """What is known of a shard that is made; None where it is not, or is to be made again."""
        record = self._noted(number)
        if record is None or "again" in record:
            return None
        files = [self.output / f"{number:05d}{suffix}" for suffix in (".safetensors", ".jsonl")]
        sizes = [path.stat().st_size if path.is_file() else None for path in files]
        return record if not record["rows"] or sizes == [record["bytes"], record["captions"]["bytes"]] else None

    def _noted(self, number):
        try:
            return json.loads((self.work / f"{number:05d}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _note(self, number, record):
        self._write(self.work / f"{number:05d}.json", _json(record))

    def clips_in(self, shards):
        """The clips of these shards."""
        return [clip for number in shards for clip in self._in_shard(number)]

    def clips_to_encode(self, shards):
        """Those of them that no shard has yet."""
        return [clip for number in shards for clip in self._lacking(number)]

    def _lacking(self, number):
        record = self._noted(number) or {}
        skipped = {each["file"] for each in record.get("skipped", ())}
        return [clip for clip in self._in_shard(number) if "again" not in record or clip.file in skipped]

    def _in_shard(self, number):
        return self.clips[number * self.options.shard_size : (number + 1) * self.options.shard_size]

    # What it will take

    def bytes_of(self, pending):
        """Bytes on disk that these shards will take if no clip is skipped, about: captions are counted in tokens."""
        cells = self.options.frames // 4 + 1
        cells *= (self.options.height // 8) * (self.options.width // 8) * _config(self.source / "vae")["z_dim"]
        width = _config(self.source / "text_encoder")["d_model"]
        (tokenizer,) = load_parts(self.source, "tokenizer")
        total = 0
        for number in pending:
            clips = self._lacking(number)
            if not clips:  # a run ended between the shard and its record
                continue
            longest = max(map(len, tokenizer([clip.caption for clip in clips]).input_ids))
            numbers = len(clips) * (cells + min(longest, self.options.length) * width)
            total += numbers * DTYPES[self.options.dtype].itemsize + sum(len(_line(clip)) for clip in clips) + HEADER
        return total

    def check_room(self, size):
        """The bytes that are free where the output is. Raises InputError if `size` is more."""
        place = self.output.absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if size > free:
            raise InputError(
                f"{size / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB free in {place}; make room, name another "
                "--output, or take fewer clips with --limit"
            )
        return free

    def time_of(self, pending):
        """Seconds that these shards will take one process; what is encoded to know it is kept for `encode`.

        Of the first shard that lacks clips all prompts are encoded, and a few videos.
        """
        pending = [number for number in pending if self._lacking(number)]
        if not pending:
            return 0.0
        clips, texts = self._lacking(pending[0]), self.encoded["texts"]
        times = [time.perf_counter()]
        for clip, latents in self._latents(clips[:TIMED]):
            self.known[clip.file] = latents
            times.append(time.perf_counter())
        times = times[1:] if len(times) > 2 else times  # the first is slower
        video = (times[-1] - times[0]) / (len(times) - 1)
        self._null()
        start = time.perf_counter()
        self._prompts(pending[0])
        text = (time.perf_counter() - start) / max(self.encoded["texts"] - texts - 1, 1)
        return (text + video) * len(self.clips_to_encode(pending))

    # Encoding

    def encode(self, pending):
        """Make this process's share of the shards `pending`: their prompts first, then their videos."""
        mine = pending[self.index :: self.parts]
        bars = {"disable": self.index > 0, "mininterval": 0.5}
        if self.index == 0 and not (self.output / NULL).exists():
            self._write(self.output / NULL, save({"prompt": self._null()}, {"text": self.options.null}))
        for number in tqdm(mine, desc="prompts", unit="shard", **bars):
            if not self._waiting(number).exists():
                self._write(self._waiting(number), save(self._prompts(number)))
        self.text_parts = None  # UMT5 is larger than all the rest
        self.known_prompts.clear()
        with tqdm(total=len(self.clips_in(mine)), desc="videos", unit="clip", **bars) as bar:
            for number in mine:
                self._make_shard(number, bar)

    def _waiting(self, number):
        """Where the prompts of a shard wait for its videos."""
        return self.work / f"{number:05d}.prompts"

    def _prompts(self, number):
        """{"0": (L', D), ...}, the prompts of the captions of a shard, each once, without the zeros beyond."""
        if number not in self.known_prompts:
            texts = self._captions(number)
            prompts = self._encode_texts(texts) if texts else []
            self.known_prompts = {number: {f"{k}": each[: _end(each)].clone() for k, each in enumerate(prompts)}}
        return self.known_prompts[number]

    def _captions(self, number):
        return list(dict.fromkeys(clip.caption for clip in self._in_shard(number) if clip.caption))

    def _null(self):
        if self.known_null is None:
            self.known_null = self._encode_texts([self.options.null])
        return self.known_null

    def _encode_texts(self, texts):
        """Prompts (B, L, D) on the CPU."""
        dtype, length = DTYPES[self.options.dtype], self.options.length
        if self.text_parts is None:
            tokenizer, text_encoder = load_parts(self.source, "tokenizer", "text_encoder", dtype=dtype)
            self.text_parts = tokenizer, text_encoder.to(self.device)
        self.encoded["texts"] += len(texts)
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return torch.cat([encode_prompts(*self.text_parts, batch, length).to(dtype).cpu() for batch in batches])

    def _make_shard(self, number, bar):
        kept, latents, skipped = [], [], []
        self.known |= self._made_before(number)
        for clip, found in self._latents(self._in_shard(number)):
            self.recent.append(isinstance(found, str))
            if isinstance(found, str):
                skipped.append({"file": clip.file, "reason": found})
                self._check_skipped(sum(self.recent), len(self.recent), skipped[-1])
            else:
                kept.append(clip)
                latents.append(found)
            bar.update()
        record = {"rows": len(kept), "skipped": skipped}
        if kept:
            prompts, captions = load_file(self._waiting(number)), self._captions(number)
            rows = [prompts[f"{captions.index(clip.caption)}"] for clip in kept]
            tensors = {"latents": torch.stack(latents), "prompts": torch.nn.utils.rnn.pad_sequence(rows, True)}
            files = {".jsonl": b"".join(map(_line, kept)), ".safetensors": save(tensors)}
            record |= {"captions": _entry(files[".jsonl"])} | _entry(files[".safetensors"])
            record |= {key: [*each.shape] for key, each in tensors.items()}
            before = self._noted(number)
            if before:  # what takes the place of the old shard must be known for whole, too
                self._note(number, before | {"next": record, "again": True})
            for suffix, data in files.items():
                self._write(self.output / f"{number:05d}{suffix}", data)
        self._note(number, record)
        self._waiting(number).unlink()

    def _made_before(self, number):
        """{file: latents} that a shard to be made again holds, if it is as it was written; their videos may be gone."""
        record, path = self._noted(number), self.output / f"{number:05d}.safetensors"
        if not record or not path.exists():
            return {}
        try:
            data = path.read_bytes()
        except OSError as problem:
            expected = "mend the disk, then run the same command again"
            raise InputError(f"{path} cannot be read ({problem.strerror}); {expected}") from None
        if record.get("next", {}).get("sha256") == _entry(data)["sha256"]:  # a process was killed just after writing it
            record = record["next"] | {"again": True}
            self._note(number, record)
        if record.get("sha256") != _entry(data)["sha256"]:
            return {}
        skipped = {each["file"] for each in record["skipped"]}
        files = [clip.file for clip in self._in_shard(number) if clip.file not in skipped]
        return dict(zip(files, load(data)["latents"], strict=True))

    def _check_skipped(self, count, of, last):
        most = int(max(FEW, self.skip * of)) if self.skip else 0
        if count > most:
            raise InputError(
                f"{count} of {of} clips had to be skipped, the last was {last['file']} ({last['reason']}); expected "
                f"at most {most} (--skip {self.skip:g}): see that the videos are there, then run the same with "
                "--retry, or allow more; finished shards are kept"
            )

    def _latents(self, clips):
        """(clip, latents (F, C, h, w) or why there are none) for each; the next are read while one is encoded."""
        with ThreadPoolExecutor(AHEAD) as pool:
            waiting = deque()
            for clip in clips:
                waiting.append((clip, pool.submit(self._read, clip)))
                if len(waiting) > AHEAD:
                    yield self._latent(*waiting.popleft())
            while waiting:
                yield self._latent(*waiting.popleft())

    def _read(self, clip):
        """Bytes (T, H, W, 3), or why there are none."""
        if clip.file in self.known:
            return None
        if not clip.caption:
            return "empty caption"
        path = self.videos / clip.file
        try:
            return read_clip(path, self.options)
        except InputError as problem:
            if not self.videos.is_dir():  # a disk that went away is no reason to skip what was on it
                expected = "put it back and run the same command again"
                raise InputError(f"the folder of videos {self.videos} is gone; {expected}") from None
            return str(problem).removeprefix(f"{path} ")

    def _latent(self, clip, job):
        if clip.file in self.known:
            return clip, self.known.pop(clip.file)
        video = job.result()
        if isinstance(video, str):
            return clip, video
        if self.vae is None:
            (vae,) = load_parts(self.source, "vae")
            self.vae = vae.to(self.device)
        self.encoded["videos"] += 1
        latents = encode_video(self.vae, video.to(self.device).permute(0, 3, 1, 2)[None].float() / 255)[0]
        latents = latents.to(DTYPES[self.options.dtype]).cpu()
        return clip, latents if torch.isfinite(latents).all() else "its latents are not finite"

    # The end

    def finish(self):
        """Write skipped.jsonl and the manifest, of shards all there; on the main process. Returns the latter."""
        records = {f"{number:05d}": self._record(number) for number in range(self.shards)}
        lost = [name for name, record in records.items() if record is None]
        if lost:
            raise InputError(f"shard {lost[0]} was not made ({len(lost)} in all); run the same command again")
        skipped = [each for record in records.values() for each in record["skipped"]]
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in skipped).encode()
        entry = self._write(self.output / SKIPPED, lines)
        rows = sum(record["rows"] for record in records.values())
        if not rows:
            raise InputError(f"none of {len(self.clips)} clips could be read; {self.output / SKIPPED} says why")
        if skipped:
            self._check_skipped(len(skipped), len(self.clips), skipped[-1])
        shards = {
            name: {key: value for key, value in record.items() if key not in ("rows", "skipped")}
            for name, record in records.items()
            if record["rows"]
        }
        null = (self.output / NULL).read_bytes()
        manifest = self.head | {
            "finished": True,
            "rows": rows,
            "skipped": entry | {"count": len(skipped)},
            "null": _entry(null),
            "shards": shards,
        }
        self._write(self.output / MANIFEST, _json(manifest))
        shutil.rmtree(self.work, ignore_errors=True)
        return manifest

    def _write(self, path, data):
        """A file, whole or not at all, and on the disk; returns its size and sha256."""
        part = self.work / f"{path.name}.part{self.index}"
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as problem:
            part.unlink(missing_ok=True)
            todo = "make room (finished shards are kept) and run the same command again"
            raise InputError(f"cannot write {path} ({problem.strerror}); {todo}") from None
        return _entry(data)


def _entry(data):
    """What the manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _end(prompt):
    """How many tokens of a prompt (L, D) there are: all beyond are zero."""
    used = prompt.abs().sum(1).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _line(clip):
    return (json.dumps({"caption": clip.caption, "file": clip.file}, ensure_ascii=False) + "\n").encode()


def _json(value):
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
