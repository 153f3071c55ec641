"""What a step of training draws: a batch that depends on the step alone, and the parts it is cut into."""

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from minianyflow.interpolant import check_finite
from minianyflow.support.errors import InputError
from minianyflow.times import draw_pairs, generator


class Batch(TypedDict, total=False):
    """The tensors of one step, all with B rows. A loss names the keys that it reads."""

    x: Tensor  # data (B, *shape)
    eps: Tensor  # noise (B, *shape)
    t: Tensor  # (B,), with r <= t: times.draw_pairs
    r: Tensor  # (B,)
    split: Tensor  # (B,) uniform: where a semigroup target cuts the jump
    objective_draw: Tensor  # (B,) uniform: which objective a row r < t draws
    dropped: Tensor  # (B,) bool: rows trained without their condition
    condition: dict[str, Tensor]  # what the network takes beside z, t, r: tensors (B, ...)
    context: dict[str, Tensor]  # clean earlier frames (networks/teacher_forcing.py)
    frame: Tensor  # (B,) whole numbers: the frame that learns (plane/exposure.py)
    noise: Tensor  # (B, *shape) where a rollout starts: on_policy.draw_on_policy
    lengths: Tensor  # (B,) steps N of the simulated rollout
    step: Tensor  # (B,) the step g of the rollout that is taken as it is
    score_t: Tensor  # (B,) times at which the scores are compared
    score_eps: Tensor  # (B, *shape) noise of that comparison
    fake_t: Tensor  # (B,) times at which the fake score learns
    row: Tensor  # (B,) rows of the data set


def batches(sample: Callable, rows: int, seeds=(0,), **pairs) -> Callable[[int], Batch]:
    """`draw(step)` for `train`: the batch of that step, the same for every process.

    sample(count, generator) gives data (count, *shape). Each of `seeds` has `rows` rows, with its own data and noise;
    all seeds share the times, so that rows of one kind are evaluated together. With several seeds the condition
    `copy` (B,) names the seed of each row (networks/mlp.py). `pairs` goes to `draw_pairs`.
    """

    def draw(step):
        sources = [generator(seed, step) for seed in seeds]
        x = torch.stack([sample(rows, source) for source in sources], 1).flatten(0, 1)
        eps = torch.stack([torch.randn(x[:rows].shape, generator=source) for source in sources], 1).flatten(0, 1)
        times = draw_pairs(rows, generator(step), **pairs)
        batch = {"x": x, "eps": eps} | {name: value.repeat_interleave(len(seeds)) for name, value in times.items()}
        return batch if len(seeds) == 1 else batch | {"condition": {"copy": copies}}

    copies = torch.arange(len(seeds)).repeat(rows)
    check_finite("the data", sample(rows, generator(*seeds)))
    return draw


def part_of(batch: Batch, index: int, parts: int, device=None) -> Batch:
    """Rows [index B / parts, (index + 1) B / parts) of every tensor of a batch, conditions included."""
    size = len(next(iter(batch.values())))
    if size % parts:
        raise InputError(f"a batch of {size} rows does not divide into {parts} equal parts (processes x accumulation)")
    rows = slice(index * size // parts, (index + 1) * size // parts)
    return {
        name: {key: item[rows].to(device) for key, item in value.items()}
        if isinstance(value, dict)
        else value[rows].to(device)
        for name, value in batch.items()
    }
