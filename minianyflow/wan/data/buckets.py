"""Clips of several sizes and lengths: a bucket per size, a batch of one bucket, so that no clip is thrown away.

prepare-latents --bucket 81x480x832 --bucket 33x832x480 writes OUT/81x480x832 and OUT/33x832x480, each a set as
latents.py has it. Training opens OUT. A bucket has its own tokens and, if causal, its own chunks.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from minianyflow.batch import Batch
from minianyflow.support.errors import InputError
from minianyflow.wan.data.captions import Clip
from minianyflow.wan.data.latents import MANIFEST, LatentSet
from minianyflow.wan.data.options import Options
from minianyflow.wan.data.read_video import measure_clip

GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 fill [0, 1) evenly, however many there are


class Buckets:
    """The buckets in `folder`, those of the longest clips first, as one set: what `LatentSet` has, but for `rows`.

    shape: (F, C, H, W) of the first bucket; skip: how many broken files may be left out per bucket.
    Raises InputError for buckets of other prompts.
    """

    def __init__(self, folder: str | Path, skip: int = 0):
        sets = [LatentSet(path.parent, skip) for path in Path(folder).glob(f"[!.]*/{MANIFEST}")]
        self.sets = sorted(sets, key=lambda one: (-one.shape[0], -math.prod(one.shape), one.folder.name))
        first = self.sets[0]
        for one in self.sets:
            if one.null.shape != first.null.shape or not torch.equal(one.null, first.null):
                raise InputError(
                    f"{one.folder} and {first.folder} have other null prompts; prepare both with one --null"
                )
        self.folder, self.shape, self.null, self.null_text = Path(folder), first.shape, first.null, first.null_text
        self.identity = ", ".join(f"{one.folder.name}: {one.identity}" for one in self.sets)
        self.ends = torch.tensor([len(one) for one in self.sets]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def files(self, indices: Iterable[int]) -> list[str]:
        """The names of the files of these rows, inside the folder."""
        return [f"{one.folder.name}/{one.files([row])[0]}" for one, row in map(self._place, indices)]

    def captions(self, indices: Iterable[int]) -> list[str]:
        """The captions of these rows."""
        return [one.captions([row])[0] for one, row in map(self._place, indices)]

    def _place(self, index):
        bucket = int(torch.searchsorted(self.ends, index, right=True))
        return self.sets[bucket], int(index) - (int(self.ends[bucket - 1]) if bucket else 0)

    def draw(self, step: int, rows: int, seed: int = 0, part: tuple[int, int] = (0, 1), **pairs) -> Batch:
        """The batch of `step`, as `LatentSet.draw` has it, of one bucket: that of step 0 is the first.

        A bucket is drawn as often as it has clips, as evenly as may be, and draws as a set of its own does: each of its
        clips comes once per epoch of the bucket. `row` (B,) has the rows of all buckets in turn.
        """
        places = torch.arange(step + 1, dtype=torch.float64) * GOLDEN % 1 * len(self)
        buckets = torch.searchsorted(self.ends, places.floor().long(), right=True)
        bucket = int(buckets[-1])
        turn = int((buckets[:-1] == bucket).sum())
        batch = self.sets[bucket].draw(turn, rows, seed, part, **pairs)
        return batch | {"row": batch["row"] + (self.ends[bucket] - len(self.sets[bucket]))}


def open_latents(folder: str | Path, skip: int = 0) -> LatentSet | Buckets:
    """What prepare-latents wrote to `folder`. Raises InputError as `LatentSet`."""
    found = not (Path(folder) / MANIFEST).exists() and any(Path(folder).glob(f"[!.]*/{MANIFEST}"))
    return (Buckets if found else LatentSet)(folder, skip)


def check_processes(data: LatentSet | Buckets, processes: int) -> None:
    """Raise InputError for a set, or a bucket, that has fewer clips than there are processes."""
    for one in getattr(data, "sets", [data]):
        if len(one) < processes:
            expected = "expected one per process: take fewer processes, or prepare it with more clips"
            raise InputError(f"{one.folder} has {len(one)} clips for {processes} processes; {expected}")


# Preparing


def read_bucket(text: str, options: Options) -> Options:
    """The options of a bucket named "FRAMESxHEIGHTxWIDTH". Raises InputError for another text or size."""
    try:
        frames, height, width = map(int, text.split("x"))
    except ValueError:
        raise InputError(f"bucket {text!r}; expected FRAMESxHEIGHTxWIDTH, like 81x480x832") from None
    return replace(options, frames=frames, height=height, width=width)


def sort_clips(clips: list[Clip], videos: Path, buckets: dict[str, Options]) -> dict[str, list[Clip]]:
    """{bucket: its clips}, without empty ones. buckets: {name: options}.

    A clip goes where its aspect ratio is nearest among the buckets that are not longer than it is; of equals to the one
    with most frames, then most pixels. Those that are too short for all, or cannot be read, come last in the shortest
    bucket that has clips: its skipped.jsonl will say why.
    """
    found, left = defaultdict(list), []
    longest, fps = max(bucket.frames for bucket in buckets.values()), next(iter(buckets.values())).fps
    for clip in clips:
        try:
            frames, aspect = measure_clip(Path(videos) / clip.file, longest, fps)
        except InputError:
            frames, aspect = 0, 1.0
        fits = [name for name, bucket in buckets.items() if bucket.frames <= frames]
        sizes = {name: (buckets[name].frames, buckets[name].height, buckets[name].width) for name in fits}
        rank = {name: (round(abs(math.log(w / h / aspect)), 3), -f, -h * w) for name, (f, h, w) in sizes.items()}
        (found[min(rank, key=rank.get)] if rank else left).append(clip)
    if left:
        found[min(found or buckets, key=lambda name: buckets[name].frames)] += left
    return dict(found)
