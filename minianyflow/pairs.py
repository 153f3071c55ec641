"""Which (t, r) to train on. Random for every sample, stratified over the batch: a batch of any size is safe.

Published mix (AnyFlow): half of the rows on the diagonal r = t, a quarter on the bottom edge r = 0, a quarter free.
"""

import hashlib

import torch

from minianyflow.schedules import time_shift
from minianyflow.support.errors import InputError


def generator(*key):
    """A torch generator that depends on the whole numbers `key` alone, say (seed, step).

    torch keeps only 32 bits of a seed, so `seed << 32 | step` would repeat itself: the key is hashed first.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def stratified_uniform(count, generator=None):
    """(count,) numbers in [0, 1), one in each of `count` equal cells, in random order; one number is plain uniform.

    Cutting [0, 1) into shares thus gives every share its exact count, rounded at random: right on average for a
    batch of one, and a share may be empty.
    """
    jitter = torch.rand(count, generator=generator)
    return ((torch.randperm(count, generator=generator) + jitter) / count).clamp(max=1 - 2**-24)


def draw_pairs(count, generator=None, diagonal=0.5, end=0.25, shift=1.0, drop=0.0):
    """Pairs of times for `count` samples, and the random numbers that objectives spend on them.

    Returns a dict of (count,) float32: `t`, `r` (the larger and the smaller of two uniforms, shifted; a share `end` has
    r = 0; a share `diagonal` has r = t, one uniform), `split` (uniform: where a semigroup target cuts the jump) and
    `lot` (uniform, stratified inside each of the three kinds: which objective a row draws). With `drop` > 0 also
    `dropped` (bool): which rows are to be trained without their condition; AnyFlow drops a tenth.
    """
    if min(diagonal, end) < 0 or diagonal + end > 1:
        raise InputError(f"shares diagonal={diagonal}, end={end}; expected shares >= 0 that add up to at most 1")
    place = stratified_uniform(count, generator)
    first, second = time_shift(torch.rand(2, count, generator=generator), shift)
    edges = torch.tensor([0.0, diagonal, diagonal + end, 1.0])
    kind = torch.bucketize(place, edges[1:3], right=True)  # 0: diagonal, 1: end, 2: free
    lot = (place - edges[kind]) / (edges[kind + 1] - edges[kind])
    pairs = {
        "t": torch.where(kind == 0, first, torch.maximum(first, second)),
        "r": torch.where(kind == 0, first, torch.where(kind == 1, 0.0, torch.minimum(first, second))),
        "split": torch.rand(count, generator=generator),
        "lot": lot,
    }
    return pairs | {"dropped": torch.rand(count, generator=generator) < drop} if drop else pairs
