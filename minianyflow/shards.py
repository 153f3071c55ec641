"""Captioned latents on disk, and the batches that training draws from them.

A folder of shards holds, written by `write_shards`:
    00000.safetensors, ...    `latents` (n, F, C, H, W), `prompts` (n, L, D): normalised latents, prompt embeddings
    00000.jsonl, ...          {"caption": ...} a line, one line a row
    null.safetensors          `prompt` (1, L, D): the null prompt; its text in the metadata
Rows are read where they lie: a big set is never in memory.
"""

import json
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minianyflow.errors import InputError
from minianyflow.interpolant import check_finite
from minianyflow.pairs import draw_pairs, generator
from minianyflow.running import staged

NULL = "null.safetensors"
ORDER, NOISE, TIMES = range(3)  # what a key (seed, which, number) of random numbers is for


class LatentShards:
    """The rows of all shards in `folder`, in the order of their names.

    shape: (F, C, H, W) of a row. null: (1, L, D), float32.
    Raises InputError for an empty folder, a file cut short, shards that do not fit together, no null prompt.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.paths = sorted(path for path in self.folder.glob("*.safetensors") if path.name != NULL)
        if not self.paths:
            raise InputError(f"no shards in {folder}; expected *.safetensors that write_shards or prepare wrote")
        if not (self.folder / NULL).is_file():
            raise InputError(f"no {NULL} in {folder}; expected the null prompt there, which dropped rows get")
        files = [_open(path, "latents", "prompts") for path in self.paths]
        shapes = [[tuple(file.get_slice(name).get_shape()) for name in ("latents", "prompts")] for file in files]
        for path, (latents, prompts) in zip(self.paths, shapes, strict=True):
            self._check(path, latents, prompts, *shapes[0])
        self.shape, self.starts = shapes[0][0][1:], (0, *accumulate(len_ for (len_, *_), _ in shapes))
        self.null = _open(self.folder / NULL, "prompt").get_tensor("prompt").float()
        if self.null.shape != (1, *shapes[0][1][1:]):
            expected = f"{(1, *shapes[0][1][1:])}, as the prompts have"
            raise InputError(f"the null prompt in {folder} has shape {tuple(self.null.shape)}; expected {expected}")

    def _check(self, path, latents, prompts, first_latents, first_prompts):
        if len(latents) != 5 or len(prompts) != 3 or latents[0] != prompts[0] or not latents[0]:
            expected = "(n, F, C, H, W) and (n, L, D) with the same n > 0"
            raise InputError(f"{path} holds latents {latents} and prompts {prompts}; expected {expected}")
        if (latents[1:], prompts[1:]) != (first_latents[1:], first_prompts[1:]):
            what = f"rows of {latents[1:]} and {prompts[1:]}"
            expected = f"{first_latents[1:]} and {first_prompts[1:]}, as {self.paths[0].name} has"
            raise InputError(f"{path} holds {what}; expected {expected}: a folder holds clips of one size")

    def __len__(self):
        return self.starts[-1]

    def _place(self, index):
        """The path of a row's shard, and its number there."""
        if not 0 <= index < len(self):
            raise InputError(f"row {index} asked for; {self.folder} has rows 0 to {len(self) - 1}")
        shard = bisect_right(self.starts, index) - 1
        return self.paths[shard], index - self.starts[shard]

    def rows(self, indices):
        """Latents (B, F, C, H, W) and prompts (B, L, D) of these rows, both float32 whatever they are kept in."""
        latents, prompts = [], []
        for path, row in (self._place(int(index)) for index in indices):
            file = _open(path, "latents", "prompts")
            latents.append(file.get_slice("latents")[row : row + 1].float())
            prompts.append(file.get_slice("prompts")[row : row + 1].float())
            check_finite(f"row {row} of {path}", latents[-1])
            check_finite(f"the prompt of row {row} of {path}", prompts[-1])
        return torch.cat(latents), torch.cat(prompts)

    def captions(self, indices):
        """The captions of these rows, a list."""
        return [_captions(path)[row] for path, row in (self._place(int(index)) for index in indices)]

    def draw(self, step, rows, seed=0, **pairs):
        """The batch of `step`, for `objectives.FlowMapLoss`: it depends on nothing but the arguments.

        Samples are numbered through the whole run: the batch has `rows` of them from step * rows on. Every row of the
        set comes once an epoch, each epoch in an order of its own, whatever the size of a batch; the noise of a sample
        depends on its number, the times on the step. `pairs` goes to `pairs.draw_pairs`; rows that it lets drop their
        prompt get the null prompt.
        """
        numbers = range(step * rows, (step + 1) * rows)
        orders = {epoch: self._order(seed, epoch) for epoch in {number // len(self) for number in numbers}}
        x, prompt = self.rows(orders[number // len(self)][number % len(self)] for number in numbers)
        eps = torch.stack([torch.randn(self.shape, generator=generator(seed, NOISE, number)) for number in numbers])
        times = draw_pairs(rows, generator(seed, TIMES, step), **pairs)
        if "dropped" in times:
            prompt = torch.where(times["dropped"][:, None, None], self.null, prompt)
        return {"x": x, "eps": eps, "condition": {"prompt": prompt}} | times

    @lru_cache(maxsize=4)  # noqa: B019 (a handful of sets a process, kept as long as it lives)
    def _order(self, seed, epoch):
        return torch.randperm(len(self), generator=generator(seed, ORDER, epoch))


def write_shards(folder, latents, prompts, null, captions, size=64, null_text=""):
    """Write rows to `folder`, `size` of them a shard, kept in the dtype they have; all files whole, or none.

    latents (N, F, C, H, W), normalised; prompts (N, L, D); null (1, L, D), and its text; captions: N texts.
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
    with staged(folder) as unfinished:
        save_file({"prompt": null.contiguous()}, unfinished / NULL, {"text": null_text})
        for number, start in enumerate(range(0, len(latents), size)):
            part, path = slice(start, start + size), unfinished / f"{number:05d}.safetensors"
            save_file({"latents": latents[part].contiguous(), "prompts": prompts[part].contiguous()}, path)
            lines = [json.dumps({"caption": caption}, ensure_ascii=False) for caption in captions[part]]
            path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@lru_cache(maxsize=256)
def _reader(path, changed):
    return safe_open(path, "pt")


def _open(path, *names):
    """The safetensors file, opened once; `names` must be in it."""
    try:
        file = _reader(path, path.stat().st_mtime_ns)
    except (SafetensorError, OSError):
        raise InputError(f"{path} is cut short or not a safetensors file; fetch or make it again") from None
    missing = [name for name in names if name not in file.keys()]  # noqa: SIM118
    if missing:
        raise InputError(f"{path} lacks {' and '.join(missing)}; expected what write_shards writes")
    return file


@lru_cache(maxsize=16)
def _captions(path):
    beside = path.with_suffix(".jsonl")
    try:
        lines = [json.loads(line)["caption"] for line in beside.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f'no captions in {beside}; expected a line {{"caption": ...}} for every row') from None
    rows = _open(path, "latents").get_slice("latents").get_shape()[0]
    if len(lines) != rows:
        raise InputError(f"{beside} has {len(lines)} captions; expected {rows}, one for every row of its shard")
    return lines
