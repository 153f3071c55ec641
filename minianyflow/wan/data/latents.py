"""Captioned latents on disk, one file per clip, and the batches that training draws from them.

`write_latents` and the command prepare-latents (prepare.py) write a folder of latents:
    00000/00000123.safetensors   clip 123: `latents` (F, C, H, W), normalised, and `prompt` (L', D) without its padding;
                                 the metadata holds its caption, a SHA-256 of the tensors and the caption, and what
                                 was changed: frames repeated, caption cut, colours converted
    null.safetensors             `prompt` (1, L, D): the null prompt with its padding; the metadata holds its text
    manifest.json                the number of clips, which of them were skipped, their shape, how they were made, and
                                 a report of what was changed or skipped, {what: how many}
Clips are numbered as in the captions file, 1000 in a folder. A file takes its place when it is whole, the manifest
last. Rows are read when a batch needs them: a large set is never in memory.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NotRequired

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from minianyflow.batch import Batch, deal
from minianyflow.support.checks import check_finite
from minianyflow.support.errors import InputError
from minianyflow.support.files import check_json, read_json, regular, staging_folder
from minianyflow.times import draw_pairs, generator

Count = Annotated[int, Field(ge=1, le=10**8)]


class Manifest(TypedDict):
    """The fields of an unfinished folder's manifest."""

    format: int
    finished: bool
    clips: Count
    made: NotRequired[dict]


class Metadata(TypedDict):
    """What a clip's file says beside its tensors."""

    sha256: NotRequired[str]
    text: NotRequired[str]
    changes: NotRequired[dict]


class FinishedManifest(Manifest):
    """The fields that are read of a finished folder's manifest."""

    skipped: list[Annotated[int, Field(ge=0)]]
    shape: Annotated[list[Count], Field(min_length=4, max_length=4)]


NULL, MANIFEST, FORMAT = "null.safetensors", "manifest.json", 2
ORDER, NOISE, TIMES = range(3)  # the second number of a key (seed, purpose, number) of random numbers
AGAIN = "fetch or make it again"


class LatentSet:
    """The clips in `folder`, in the order of their numbers: row k is the k-th clip that was not skipped.

    shape: (F, C, H, W) of a row. null: the null prompt (1, L, D), float32. null_text: its text, None if it is unknown.
    skip: how many broken files may be left out, with a line on stderr per file. The next row stands in for a broken
    one, so the other rows keep their numbers and every process draws the same. broken: the paths that this process met.
    identity: a text that tells this set from others.
    Raises InputError for a folder without latents, an unfinished one, or one without a null prompt.
    """

    def __init__(self, folder: str | Path, skip: int = 0):
        self.folder, self.skip, self.broken = Path(folder), skip, []
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise InputError(f"no latents in {folder}; expected a folder that prepare-latents or write_latents wrote")
        self.identity = f"manifest {hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()[:12]}"
        skipped = {*manifest["skipped"]}
        self.numbers = [number for number in range(manifest["clips"]) if number not in skipped]
        self.shape = tuple(manifest["shape"])
        null, metadata = read_file(self.folder / NULL, "prompt")
        self.null, self.null_text = null["prompt"].float(), metadata.get("text")

    def __len__(self) -> int:
        return len(self.numbers)

    def path(self, index: int) -> Path:
        """The file of a row."""
        return self.folder / clip_name(self.numbers[index])

    def files(self, indices: Iterable[int]) -> list[str]:
        """The names of the files of these rows, inside the folder."""
        return [str(self.path(index).relative_to(self.folder)) for index in indices]

    def captions(self, indices: Iterable[int]) -> list[str]:
        """The captions of these rows."""
        return [read_file(self.path(index))[1].get("text", "") for index in indices]

    def rows(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, F, C, H, W) and prompts (B, L, D) of these rows, float32 whatever they are stored in."""
        indices = [int(index) for index in indices]
        latents, prompts = torch.empty(len(indices), *self.shape), torch.zeros(len(indices), *self.null.shape[1:])
        for place, index in enumerate(indices):
            clip = self._read_row(index)
            latents[place], prompts[place, : len(clip["prompt"])] = clip["latents"], clip["prompt"]
        return latents, prompts

    def _read_row(self, index):
        """The tensors of a row, or of the next one that can be read; that depends only on the files."""
        for place in range(index, index + len(self)):
            path = self.path(place % len(self))
            try:
                return self.read_clip(path)[0]
            except InputError as problem:
                self._skip_broken(path, problem)
        raise InputError(f"all {len(self)} clips in {self.folder} are broken; {AGAIN}")

    def _skip_broken(self, path, problem):
        """Count a broken file and name it once; raise `problem` if it is one too many."""
        if path in self.broken:
            return
        if len(self.broken) >= self.skip:
            others = f" ({len(self.broken)} other broken clips were skipped)" if self.broken else ""
            raise InputError(f"{problem}{others}") from None
        self.broken.append(path)
        tqdm.write(f"warning: {problem}; skipped, {len(self.broken)} of at most {self.skip}", file=sys.stderr)

    def read_clip(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata of a clip. Raises InputError where they do not fit the set or are not finite."""
        clip, metadata = read_file(path, "latents", "prompt")
        latents, prompt = clip["latents"], clip["prompt"]
        _, length, width = self.null.shape
        if latents.shape != self.shape or len(prompt) > length or prompt.shape[1:] != (width,):
            shapes = f"latents {tuple(latents.shape)} and a prompt {tuple(prompt.shape)}"
            raise InputError(f"{path} holds {shapes}; expected {self.shape} and at most {(length, width)}")
        for name, tensor in clip.items():
            check_finite(f"{name} in {path}", tensor, AGAIN)
        return clip, metadata

    def draw(self, step: int, rows: int, seed: int = 0, part: tuple[int, int] = (0, 1), **pairs) -> Batch:
        """The batch of `step`, for `objectives.FlowMapLoss`. It depends on the arguments alone.

        Samples are numbered through the whole run: the batch has the `rows` samples from step * rows on. Every row of
        the set comes once per epoch, in another order per epoch, whatever the size of a batch. The noise of a sample
        depends on its number, the times depend on the step. `pairs` are arguments of `times.draw_pairs`; a row
        that is to be trained without its prompt still has it. `row` (B,) has the rows of the set.
        part: (index, processes), as `batch.deal` deals the rows out; only these are read. `place` (B,) has their places
        in the batch.
        """
        times = deal(draw_pairs(rows, generator(seed, TIMES, step), **pairs), *part)
        numbers = [step * rows + place for place in times["place"].tolist()]
        row = torch.stack([_order(len(self), seed, number // len(self))[number % len(self)] for number in numbers])
        x, prompt = self.rows(row)
        eps = torch.stack([torch.randn(self.shape, generator=generator(seed, NOISE, number)) for number in numbers])
        return {"x": x, "eps": eps, "condition": {"prompt": prompt}, "row": row} | times


@lru_cache(maxsize=4)
def _order(count, seed, epoch):
    """The order of all rows in an epoch."""
    return torch.randperm(count, generator=generator(seed, ORDER, epoch))


# Writing


def write_latents(
    folder: str | Path,
    latents: Tensor,
    prompts: Tensor,
    null: Tensor,
    captions: Sequence[str],
    null_text: str | None = None,
) -> None:
    """Write a set to `folder` in the dtype that it has; files take their places when all are whole.

    latents (N, F, C, H, W), normalised; prompts (N, L, D) and null (1, L, D), zero beyond their ends; null_text: the
    text of the null prompt.
    Raises InputError for counts that differ, shapes that do not fit, or a folder that holds latents already.
    """
    folder = Path(folder)
    count = len(captions) if len(latents) == len(prompts) == len(captions) else 0
    if not count or latents.ndim != 5 or prompts.ndim != 3 or prompts[:1].shape != null.shape:
        shapes = f"latents {tuple(latents.shape)}, prompts {tuple(prompts.shape)}, null {tuple(null.shape)}"
        expected = "(N, F, C, H, W), (N, L, D), (1, L, D) and N captions"
        raise InputError(f"{shapes}, {len(captions)} captions; expected {expected}")
    if read_manifest(folder, unfinished=True):
        raise InputError(f"{folder} holds latents already; expected a new folder: name another")
    digest = hashlib.sha256()
    with staging_folder(folder) as unfinished:
        for number, caption in enumerate(captions):
            path = unfinished / clip_name(number)
            path.parent.mkdir(exist_ok=True)
            data = file_bytes({"latents": latents[number], "prompt": without_padding(prompts[number])}, caption)
            path.write_bytes(data)
            digest.update(hashlib.sha256(data).digest())
        (unfinished / NULL).write_bytes(file_bytes({"prompt": null}, null_text))
        manifest = {"clips": count, "skipped": [], "shape": [*latents.shape[1:]], "sha256": digest.hexdigest()}
        (unfinished / MANIFEST).write_bytes(manifest_bytes(manifest, finished=True))


def clip_name(number: int) -> str:
    """The file of a clip inside its folder."""
    return f"{number // 1000:05d}/{number:08d}.safetensors"


def without_padding(prompt: Tensor) -> Tensor:
    """A prompt (L, D) up to its last token that is not zero, (L', D) with at least one."""
    tokens = prompt.abs().sum(1).nonzero()
    return prompt[: int(tokens[-1]) + 1 if len(tokens) else 1].clone()


def file_bytes(tensors: dict[str, Tensor], text: str | None, changes: dict | None = None) -> bytes:
    """A safetensors file; its metadata hold a text, if it is known, what was changed, if it was, and a SHA-256."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"sha256": _digest(tensors, text)} | ({} if text is None else {"text": text})
    metadata |= {"changes": changes} if changes else {}
    return save(tensors, {"minianyflow": json.dumps(metadata, ensure_ascii=False)})  # one entry: they have no order


def manifest_bytes(manifest: dict, finished: bool) -> bytes:
    """The file of a manifest."""
    manifest = {"format": FORMAT, "finished": finished} | manifest
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def _digest(tensors, text):
    digest = hashlib.sha256((text or "").encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# Reading and checking


def read_file(path: Path, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file by name, and its metadata. Raises InputError for a broken file."""
    path = regular(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = check_json(json.loads((file.metadata() or {}).get("minianyflow", "{}")), Metadata, path, AGAIN)
            return {name: file.get_tensor(name) for name in names}, metadata
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {AGAIN}") from None
    except (SafetensorError, OSError, ValueError) as problem:
        raise InputError(f"{path} cannot be read ({problem}); {AGAIN}") from None


def read_manifest(folder: str | Path, unfinished: bool = False) -> dict | None:
    """The manifest of a folder, or None if there is none. unfinished: also that of a folder not yet complete."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path, AGAIN) if path.exists() else None
    if manifest is None:
        return None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder} was written by an earlier version; prepare the latents again, in a new folder")
    check_json(manifest, FinishedManifest if manifest.get("finished") is True else Manifest, path, AGAIN)
    if not manifest["finished"] and not unfinished:
        raise InputError(f"{folder} is unfinished; expected all its clips: run prepare-latents again, it goes on")
    return manifest


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a finished set, one line per problem: every file is read, digests included."""
    data, problems = LatentSet(folder), []
    clips = [data.path(index) for index in range(len(data))]
    for path in tqdm([data.folder / NULL, *clips], desc="verifying", unit="file", disable=None):
        try:
            tensors, metadata = read_file(path, "prompt") if path.name == NULL else data.read_clip(path)
            if metadata.get("sha256") != _digest(tensors, metadata.get("text")):
                problems.append(f"{path} has another SHA-256 than when it was written")
        except InputError as problem:
            problems.append(str(problem))
    extra = {*data.folder.glob("[0-9]*/[!.]*.safetensors")} - {*clips}
    return problems + [f"{path} is not in {MANIFEST}" for path in sorted(extra)]
