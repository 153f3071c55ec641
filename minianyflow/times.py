"""Times: where a sampler steps, and which pairs (t, r) training draws. t = 1 is noise, t = 0 is data.

Pairs are random for every sample and stratified over the batch, so a batch may have any size. Published mix (AnyFlow):
half of the rows on the diagonal r = t, a quarter on the bottom edge r = 0, a quarter free.
"""

import hashlib

import torch
from torch import Tensor

from minianyflow.notation import Grid, Times
from minianyflow.support.errors import InputError, choose


def time_shift(s: Tensor, shift: float = 1.0) -> Tensor:
    """Move times towards the noise: s -> shift s / (1 + (shift - 1) s). AnyFlow uses 5 for Wan2.1; 1 is no shift."""
    if not 1e-3 <= shift <= 1e3:
        raise InputError(
            f"time shift {shift}; expected a positive number from a thousandth to a thousand: 1 for none, 5 for Wan2.1"
        )
    if s.dtype.itemsize < 4:
        return time_shift(s.float(), shift).to(s.dtype)  # a large shift would overflow
    return torch.where(s == 1, 1, shift * s / (1 + (shift - 1) * s)).clamp(max=1)  # rounding may miss the end


def time_grid(steps: int, shift: float = 1.0, device: torch.device | str | None = None) -> Grid:
    """The times of a sampler that takes `steps` steps: (steps + 1,), from 1 down to 0, float32."""
    if int(steps) != steps or steps < 1:
        raise InputError(f"{steps} steps; a sampler takes a whole number of steps, at least 1")
    return time_shift(torch.linspace(1, 0, int(steps) + 1, device=device), shift)


def generator(*key: int) -> torch.Generator:
    """A torch generator that depends on the whole numbers `key` alone, for example (seed, step).

    torch keeps only 32 bits of a seed, so `seed << 32 | step` would repeat itself: the key is hashed first.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def stratified_uniform(count: int, generator: torch.Generator | None = None) -> Times:
    """(count,) numbers in [0, 1), one in each of `count` equal cells, in random order; one number is plain uniform.

    Shares of [0, 1) then get their exact counts of rows, rounded at random. This is right on average even for a batch
    of one; a share may be empty.
    """
    if count < 0:
        raise InputError(f"{count} numbers; expected at least 0")
    jitter = torch.rand(count, generator=generator)
    return ((torch.randperm(count, generator=generator) + jitter) / count).clamp(max=1 - 2**-24)


DIAGONAL_TIMES = {  # laws of t on the diagonal, before the shift, from two uniforms
    "uniform": lambda first, second: first,
    "larger": torch.maximum,  # AnyFlow's flow maps: r is set to t after both were drawn
    "logit_normal": lambda first, second: torch.special.ndtri(first).sigmoid(),  # AnyFlow's teacher and fake score
}


def draw_pairs(
    count: int,
    generator: torch.Generator | None = None,
    diagonal: float = 0.5,
    end: float = 0.25,
    shift: float = 1.0,
    drop: float = 0.0,
    diagonal_time: str = "uniform",
    known: float = 0.0,
) -> dict[str, Tensor]:
    """Pairs of times for `count` samples, and the random numbers that objectives use.

    diagonal_time: a law in DIAGONAL_TIMES. Returns a dict of (count,) tensors, float32:
        t, r            the larger and the smaller of two uniforms, shifted; r = 0 for a share `end` of the rows, and
                        r = t, of the law `diagonal_time`, shifted, for a share `diagonal`
        split           uniform: where a semigroup target cuts the jump
        objective_draw  uniform, stratified inside each of the three kinds: which objective a row r < t learns from
        dropped         bool, if `drop` > 0: which rows are trained without their condition; AnyFlow drops a tenth
        known           bool, if `known` > 0: which rows know their first frame (networks/known_frames.py)
    """
    if not (diagonal >= 0 and end >= 0 and diagonal + end <= 1):
        raise InputError(f"shares diagonal={diagonal}, end={end}; expected shares >= 0 that add up to at most 1")
    if not (0 <= drop <= 1 and 0 <= known <= 1):
        raise InputError(f"shares drop={drop}, known={known}; expected shares from 0 to 1")
    place = stratified_uniform(count, generator)
    uniforms = torch.rand(2, count, generator=generator)
    smaller, larger = time_shift(uniforms.sort(0).values, shift)
    on_diagonal = time_shift(choose("diagonal_time", diagonal_time, DIAGONAL_TIMES)(*uniforms), shift)
    edges = torch.tensor([0.0, diagonal, diagonal + end, 1.0])
    kind = torch.bucketize(place, edges[1:3], right=True)  # 0: diagonal, 1: end, 2: free
    objective_draw = (place - edges[kind]) / (edges[kind + 1] - edges[kind])
    pairs = {
        "t": torch.where(kind == 0, on_diagonal, larger),
        "r": torch.where(kind == 0, on_diagonal, torch.where(kind == 1, 0.0, smaller)),
        "split": torch.rand(count, generator=generator),
        "objective_draw": objective_draw,
    }
    shares = {"dropped": drop, "known": known}
    return pairs | {name: torch.rand(count, generator=generator) < share for name, share in shares.items() if share}
