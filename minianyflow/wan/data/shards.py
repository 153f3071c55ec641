"""Captioned latents on disk, and the batches that training draws from them.

A folder of shards holds, written by `write_shards` or by scripts/prepare_latents.py (prepare.py):
    00000.safetensors, ...    `latents` (n, F, C, H, W), normalised; `prompts` (n, L', D), zero from token L' <= L on
    00000.jsonl, ...          {"caption": ...} a line, one line a row
    null.safetensors          `prompt` (1, L, D): the null prompt; its text in the metadata
    manifest.json             of prepared folders: size, shapes and sha256 of each file, how and of what it was made
    skipped.jsonl             of prepared folders: the clips that are in no shard, and why
Rows are read where they lie: a big set is never in memory.
"""

import hashlib
import json
import sys
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minianyflow.interpolant import check_finite
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.times import draw_pairs, generator

NULL, MANIFEST, SKIPPED = "null.safetensors", "manifest.json", "skipped.jsonl"
ORDER, NOISE, TIMES = range(3)  # what a key (seed, which, number) of random numbers is for
AGAIN = "fetch or make it again"


class LatentShards:
    """The rows of all shards in `folder`, in the order of their names.

    shape: (F, C, H, W) of a row. null: (1, L, D), float32. skip: how many broken shards may be left out, each with a
    line on stderr, and so has one whose size changes while it is in use; `broken` has the paths of those that this
    process has met. A manifest tells what should be there; sizes are checked at once, digests by `verify`. With one,
    rows of broken shards keep their numbers and have stand-ins, whenever they were found out; without one, nobody
    knows how many there were, and those broken from the start have none.
    Raises InputError for an empty or unfinished folder, one more broken shard, shards that do not fit together, no
    null prompt.
    """

    def __init__(self, folder, skip=0):
        self.folder, self.skip, self.broken = Path(folder), skip, []
        manifest = read_manifest(self.folder)
        listed = manifest["shards"] if manifest else {}
        there = {path.stem for path in self.folder.glob("*.safetensors") if path.name != NULL}
        paths = [self.folder / f"{name}.safetensors" for name in sorted(there | listed.keys())]
        if not paths:
            raise InputError(f"no shards in {folder}; expected *.safetensors that write_shards or prepare wrote")
        if not (self.folder / NULL).is_file():
            raise InputError(f"no {NULL} in {folder}; expected the null prompt there, which dropped rows get")
        self.null = _open(self.folder / NULL, "prompt").get_tensor("prompt").float()
        shapes = {path: shape for path in paths if (shape := self._shapes(path, listed, bool(manifest)))}
        if len(self.broken) == len(paths):
            raise InputError(f"all {len(paths)} shards in {folder} are broken; {AGAIN}")
        self.paths = list(shapes)
        self.sizes = [listed[path.stem]["bytes"] if manifest else path.stat().st_size for path in self.paths]
        self.shape = shapes[self.paths[0]][0][1:]
        self.starts = (0, *accumulate(rows for (rows, *_), _ in shapes.values()))
        for path, shape in shapes.items():
            self._check(path, *shape)

    def _shapes(self, path, listed, complete):
        """Shapes of latents and prompts in a shard, or None for one that may be skipped and is in no manifest."""
        if complete and path.stem not in listed:
            raise InputError(f"{path} is not in {MANIFEST}; expected only what it lists: move the file elsewhere")
        try:
            if not complete:
                return [tuple(_open(path, *_ROW).get_slice(name).get_shape()) for name in _ROW]
            size, expected = path.stat().st_size if path.exists() else None, listed[path.stem]["bytes"]
            if size != expected:
                found = "is missing" if size is None else f"has {size} bytes"
                raise InputError(f"{path} {found}; expected {expected} bytes, as {MANIFEST} says: {AGAIN}")
        except InputError as problem:
            self._leave_out(path, problem)
        return [tuple(listed[path.stem][name]) for name in _ROW] if complete else None

    def _leave_out(self, path, problem):
        """Count a broken shard, and say so once; raise `problem` if it is one too many."""
        if path in self.broken:
            return
        if len(self.broken) >= self.skip:
            many = f" ({len(self.broken)} other broken shards were skipped)" if self.broken else ""
            raise InputError(f"{problem}{many}") from None
        self.broken.append(path)
        print(f"warning: {problem}; skipped, {len(self.broken)} of at most {self.skip}", file=sys.stderr)

    def _check(self, path, latents, prompts):
        if len(latents) != 5 or len(prompts) != 3 or latents[0] != prompts[0] or not latents[0]:
            expected = "(n, F, C, H, W) and (n, L, D) with the same n > 0"
            raise InputError(f"{path} holds latents {latents} and prompts {prompts}; expected {expected}")
        if latents[1:] != self.shape:
            expected = f"{self.shape}, as {self.paths[0].name} has: a folder holds clips of one size"
            raise InputError(f"{path} holds rows of {latents[1:]}; expected {expected}")
        if (
            self.null.ndim != 3
            or len(self.null) != 1
            or prompts[1] > self.null.shape[1]
            or prompts[2] != self.null.shape[2]
        ):
            expected = f"at least {(1, *prompts[1:])}, as the prompts in {path.name} need"
            raise InputError(
                f"the null prompt in {self.folder} has shape {tuple(self.null.shape)}; expected {expected}"
            )

    def __len__(self):
        return self.starts[-1]

    def _place(self, index):
        """A row's shard, and its number there."""
        if not 0 <= index < len(self):
            raise InputError(f"row {index} asked for; {self.folder} has rows 0 to {len(self) - 1}")
        shard = bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def rows(self, indices):
        """Latents (B, F, C, H, W) and prompts (B, L, D) of these rows, both float32 whatever they are kept in."""
        places = [self._place(int(index)) for index in indices]
        latents, prompts = self._stacked([self._row(*place) for place in places])
        if not torch.isfinite(latents.sum() + prompts.sum()):  # seldom: then each row is looked at
            latents, prompts = self._stacked([self._row(*place, careful=True) for place in places])
        return latents, prompts

    def _stacked(self, rows):
        prompts = torch.zeros(len(rows), *self.null.shape[1:])
        for number, (_, prompt) in enumerate(rows):
            prompts[number, : prompt.shape[1]] = prompt[0]
        return torch.cat([latents for latents, _ in rows]).float(), prompts

    def _row(self, shard, row, careful=False):
        """Latents (1, F, C, H, W) and prompt (1, L', D); of the next shard for one that cannot be read, if allowed.

        Which one depends on what is on disk alone, so that every process takes the same.
        """
        path = self.paths[shard]
        try:
            found = _read(path, row, careful)
            self._check_unchanged(shard)
            return found
        except InputError as problem:
            self._leave_out(path, problem)
        if {*self.paths} <= {*self.broken}:
            raise InputError(f"all shards in {self.folder} are broken; {AGAIN}")
        following = (shard + 1) % len(self.paths)
        return self._row(following, row % (self.starts[following + 1] - self.starts[following]), careful)

    def _check_unchanged(self, shard):
        """Rows move when a shard is made again, and nothing else would tell; after reading, or one may come between."""
        path, expected = self.paths[shard], self.sizes[shard]
        size = path.stat().st_size if path.exists() else 0
        if size != expected:
            why = f"{path} was changed while it was in use: it has {size} bytes; expected {expected}"
            raise InputError(f"{why}, as at the start: put it back, or begin another run")

    def files(self, indices):
        """The names of the shards that these rows are in, a list."""
        return [self.paths[shard].name for shard, _ in (self._place(int(index)) for index in indices)]

    def captions(self, indices):
        """The captions of these rows, a list."""
        places = [self._place(int(index)) for index in indices]
        return [_captions(self.paths[shard], _changed(self.paths[shard]))[row] for shard, row in places]

    def draw(self, step, rows, seed=0, part=(0, 1), **pairs):
        """The batch of `step`, for `objectives.FlowMapLoss`: it depends on nothing but the arguments.

        Samples are numbered through the whole run: the batch has `rows` of them from step * rows on. Every row of the
        set comes once an epoch, each epoch in an order of its own, whatever the size of a batch; the noise of a sample
        depends on its number, the times on the step. `pairs` goes to `times.draw_pairs`; rows that it lets drop their
        prompt get the null prompt. `row` says which rows of the set they are. part: (index, parts), one of so many
        equal parts of the batch; nothing else is read.
        """
        index, parts = part
        if rows % parts or not 0 <= index < parts:
            expected = "equal parts (processes x accumulation), counted from 0"
            raise InputError(f"part {index} of {parts} of a batch of {rows} rows; expected {expected}")
        mine = slice(index * rows // parts, (index + 1) * rows // parts)
        numbers = range(step * rows, (step + 1) * rows)[mine]
        orders = {epoch: self._order(seed, epoch) for epoch in {number // len(self) for number in numbers}}
        row = torch.stack([orders[number // len(self)][number % len(self)] for number in numbers])
        x, prompt = self.rows(row)
        eps = torch.stack([torch.randn(self.shape, generator=generator(seed, NOISE, number)) for number in numbers])
        times = draw_pairs(rows, generator(seed, TIMES, step), **pairs)
        times = {name: value[mine] for name, value in times.items()}
        if "dropped" in times:
            prompt = torch.where(times["dropped"][:, None, None], self.null, prompt)
        return {"x": x, "eps": eps, "condition": {"prompt": prompt}, "row": row} | times

    @lru_cache(maxsize=4)  # noqa: B019 (a handful of sets a process, kept as long as it lives)
    def _order(self, seed, epoch):
        return torch.randperm(len(self), generator=generator(seed, ORDER, epoch))


def write_shards(folder, latents, prompts, null, captions, size=64, null_text=None):
    """Write rows to `folder`, `size` of them a shard, kept in the dtype they have.

    Files take their place when all are whole, the null prompt last: killed before, they are no set.
    latents (N, F, C, H, W), normalised; prompts (N, L, D); null (1, L, D), and its text if that is known;
    captions: N texts.
    Raises InputError for counts that differ, or a folder that has shards already.
    """
    folder = Path(folder)
    if not len(latents) == len(prompts) == len(captions) or not len(latents):
        counts = f"{len(latents)} latents, {len(prompts)} prompts, {len(captions)} captions"
        raise InputError(f"{counts}; expected as many of each, and at least one")
    if size < 1:
        raise InputError(f"shards of {size} rows; expected at least 1")
    if any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds shards already; expected a new folder: name another")
    with staging_folder(folder) as unfinished:
        save_file({"prompt": null.contiguous()}, unfinished / NULL, None if null_text is None else {"text": null_text})
        for number, start in enumerate(range(0, len(latents), size)):
            part, path = slice(start, start + size), unfinished / f"{number:05d}.safetensors"
            save_file({"latents": latents[part].contiguous(), "prompts": prompts[part].contiguous()}, path)
            lines = [json.dumps({"caption": caption}, ensure_ascii=False) for caption in captions[part]]
            path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# Manifests


def data_identity(folder):
    """Which set a folder holds, a text: by its manifest or, without one, the names of its shards; broken ones count."""
    listed = Path(folder) / MANIFEST
    if listed.is_file():
        return f"manifest {hashlib.sha256(listed.read_bytes()).hexdigest()[:12]}"
    names = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    return f"{len(names)} files {hashlib.sha256(' '.join(names).encode()).hexdigest()[:12]}"


def read_manifest(folder, unfinished=False):
    """What manifest.json in `folder` says, or None if there is none; unfinished: also of a folder not yet complete."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        finished, _ = manifest["finished"], manifest["shards"].items()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is cut short or no manifest; {AGAIN}") from None
    if not finished and not unfinished:
        raise InputError(f"{folder} is unfinished; expected all its shards: run prepare_latents.py again, it goes on")
    return manifest


def verify(folder, watch=iter):
    """What is wrong with a prepared folder, a list of lines: every file against the manifest, digests included.

    watch: wraps the shards that are gone through, say a progress bar.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"no {MANIFEST} in {folder}; expected a folder that prepare_latents.py made")
    listed = manifest["shards"]
    files = {NULL: manifest["null"], SKIPPED: manifest["skipped"]}
    files |= {f"{name}.jsonl": entry["captions"] for name, entry in listed.items()}
    lines = [line for name, entry in files.items() for line in _differences(folder / name, entry)]
    for name, entry in watch(listed.items()):
        path = folder / f"{name}.safetensors"
        lines += _differences(path, entry) or _shape_differences(path, entry, manifest)
    extra = {path.stem for path in folder.glob("*.safetensors") if path.name != NULL} - listed.keys()
    lines += [f"{folder / name}.safetensors is not in {MANIFEST}" for name in sorted(extra)]
    rows = sum(entry["latents"][0] for entry in listed.values())
    if rows != manifest["rows"]:
        lines.append(f"{folder / MANIFEST} lists shards of {rows} rows; expected {manifest['rows']}, as it says")
    return lines


def _differences(path, entry):
    """[what is wrong with a file], by its size and sha256; empty if nothing is."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return [f"{path} has {size} bytes; expected {entry['bytes']}"]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        return [f"{path} cannot be read ({problem.strerror})"]
    return (
        [] if found == entry["sha256"] else [f"{path} has sha256 {found[:12]}...; expected {entry['sha256'][:12]}..."]
    )


def _shape_differences(path, entry, manifest):
    """[where a shard, whole as it is, does not hold what the manifest says]."""
    try:
        slices = {name: _open(path, *_ROW).get_slice(name) for name in _ROW}
    except InputError as problem:
        return [str(problem)]
    found = {name: [*each.get_shape()] for name, each in slices.items()}
    lines = [f"{path} holds {n} {found[n]}; expected {entry[n]}" for n in _ROW if found[n] != entry[n]]
    kinds = {each.get_dtype() for each in slices.values()}
    expected = {"bf16": "BF16", "fp32": "F32"}[manifest["options"]["dtype"]]
    return lines + ([] if kinds == {expected} else [f"{path} is kept in {', '.join(kinds)}; expected {expected}"])


# Files

_ROW = ("latents", "prompts")


def _read(path, row, careful=False):
    """Latents (1, F, C, H, W) and prompt (1, L', D) of a row; careful: raises InputError where they are not finite."""
    file = _open(path, *_ROW)
    try:
        latents, prompt = (file.get_slice(name)[row : row + 1] for name in _ROW)
    except (SafetensorError, IndexError, OSError):
        raise InputError(f"row {row} of {path} cannot be read; {AGAIN}") from None
    if careful:
        check_finite(f"row {row} of {path}", latents)
        check_finite(f"the prompt of row {row} of {path}", prompt)
    return latents, prompt


@lru_cache(maxsize=256)
def _reader(path, changed):
    return safe_open(path, "pt")


def _open(path, *names):
    """The safetensors file, opened once; `names` must be in it."""
    try:
        file = _reader(path, path.stat().st_mtime_ns)
    except (SafetensorError, OSError):
        raise InputError(f"{path} is cut short or not a safetensors file; {AGAIN}") from None
    missing = [name for name in names if name not in file.keys()]  # noqa: SIM118
    if missing:
        raise InputError(f"{path} lacks {' and '.join(missing)}; expected what write_shards writes")
    return file


def _changed(path):
    """When the captions beside a shard were written, or None."""
    beside = path.with_suffix(".jsonl")
    return beside.stat().st_mtime_ns if beside.exists() else None


@lru_cache(maxsize=16)
def _captions(path, changed):
    beside = path.with_suffix(".jsonl")
    try:  # not splitlines: captions may hold U+2028, which ends no line of JSON
        lines = [json.loads(line)["caption"] for line in beside.read_text(encoding="utf-8").strip().split("\n")]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f'no captions in {beside}; expected a line {{"caption": ...}} for every row') from None
    rows = _open(path, "latents").get_slice("latents").get_shape()[0]
    if len(lines) != rows:
        raise InputError(f"{beside} has {len(lines)} captions; expected {rows}, one for every row of its shard")
    return lines
