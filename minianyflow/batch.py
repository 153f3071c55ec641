"""The batch of a training step, which depends on the step alone, and its parts: a process each, and micro-batches."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from minianyflow.flow_map import pick_rows
from minianyflow.notation import Condition, Counts, Mask, State, Times
from minianyflow.support.checks import check_finite
from minianyflow.support.errors import InputError
from minianyflow.times import draw_pairs, generator


class Batch(TypedDict, total=False):
    """The tensors of one step, all with B rows. A loss documents the keys that it reads."""

    x: State  # data
    eps: State  # noise
    t: Times  # with r <= t: times.draw_pairs
    r: Times
    split: Times  # uniform: where a semigroup target cuts the jump
    objective_draw: Times  # uniform: which objective a row r < t learns from
    dropped: Mask  # rows trained without their condition
    known: Mask  # rows that know their first frame: networks/known_frames.py
    condition: dict[str, Condition]  # the network's arguments besides z, t, r
    rollout_condition: dict[str, Condition]  # that of rollouts and scores, where it is another: on_policy.OnPolicyLoss
    context: dict[str, Tensor]  # clean earlier frames: networks/teacher_forcing.py
    whole: dict[str, Tensor]  # x, eps, t and r of whole clips, for a loss that is added: networks/teacher_forcing.py
    frame: Counts  # the frame that learns: plane/circle_student.py
    noise: State  # where a rollout starts: on_policy.draw_on_policy
    lengths: Counts  # number of steps N of the simulated rollout
    step: Counts  # the step g of the rollout that is taken as it is
    score_t: Times  # the times of the scores in distribution matching
    score_eps: State  # the noise of distribution matching
    fake_t: Times  # the times at which the fake score learns
    row: Counts  # row numbers in the data set
    place: Counts  # where a row was before rows were dealt out: deal
    part: Counts  # the number of the micro-batch in its step: part_of


def batches(
    sample: Callable[..., State], rows: int, seeds: Sequence[int] = (0,), **pairs: float
) -> Callable[[int], Batch]:
    """`draw(step)` for `train`: the batch of that step, the same in all processes.

    sample(count, generator): returns data (count, *shape). Each of `seeds` has `rows` rows with its own data and noise;
    all seeds share the times. With several seeds, the condition `copy` (B,) is the seed's index of each row
    (networks/mlp.py). pairs: arguments of `draw_pairs`. Raises InputError for data that is not finite.
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


def deal(batch: Batch, index: int = 0, processes: int = 1) -> Batch:
    """The rows of process `index`: those of the batch by kind, r = t first, then by objective, dealt out like cards.

    So every process gets the same mix, and no row r < t is in an earlier micro-batch (`part_of`) than a row r = t,
    whichever processes have them: `wan.published.Rebalanced` needs that. Raises InputError for unequal parts.
    """
    size = _rows(batch)
    if size % processes or not 0 <= index < processes:
        expected = "equal parts (processes x accumulation), counted from 0"
        raise InputError(f"part {index} of {processes} of a batch of {size} rows; expected {expected}")
    kind = place = torch.arange(size)
    if "objective_draw" in batch:
        kind = torch.where(batch["t"] == batch["r"], -1.0, batch["objective_draw"]).cpu()
    return pick_rows({"place": place} | batch, kind.argsort(stable=True)[index::processes])


def part_of(batch: Batch, index: int, parts: int, device: torch.device | str | None = None) -> Batch:
    """Micro-batch `index`: rows [index B / parts, (index + 1) B / parts) of all tensors of a batch.

    Raises InputError if B is not a multiple of `parts`.
    """
    size = _rows(batch)
    if size % parts:
        raise InputError(f"a batch of {size} rows does not divide into {parts} equal parts (processes x accumulation)")
    rows = slice(index * size // parts, (index + 1) * size // parts)
    return tree_map(lambda value: value[rows].to(device), batch | {"part": torch.full((size,), index)})


def _rows(batch):
    return len(next(iter(batch.values())))
