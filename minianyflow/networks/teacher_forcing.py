"""Teacher forcing: all chunks of a clip are trained at once, each given clean earlier chunks (FAR, arXiv 2503.19325).

Chunks older than the last full_chunk_limit are compressed context and are not trained. So that every length of context
is trained, a clip is cut off after a number of chunks that changes from step to step.
"""

from dataclasses import dataclass

import torch
from torch import nn

from minianyflow.batch import Batch
from minianyflow.notation import Errors, Loss, Losses, Network, Times
from minianyflow.objectives import InnerState


def teacher_forcing_batch(batch: Batch, partition: tuple[int, ...], full_chunk_limit: int) -> Batch:
    """The part of a batch of clips that teacher forcing trains on, cut off after the chunks in `partition`.

    The frames at full resolution are x and, as the batch's `context`, `clean`; older ones are its `past`.
    """
    old, end = sum(partition[:-full_chunk_limit]), sum(partition)
    clean, past = batch["x"][:, old:end], batch["x"][:, :old]
    context = {"clean": clean} | ({"past": past} if old else {})
    if "known" in batch.get("condition", {}):
        context["known"] = batch["condition"]["known"][:, old:end]
    return batch | {"x": clean, "eps": batch["eps"][:, old:end], "context": context}


def cycle_context_lengths(batch: Batch, step: int, network: nn.Module) -> Batch:
    """`teacher_forcing_batch`, one chunk shorter at each step until all are at full resolution; then whole again."""
    partition, full = network.partition(batch["x"].shape[1]), network.transformer.config.full_chunk_limit
    spare = max(len(partition) - full, 0)
    end = len(partition) - step % (spare + 1)  # all chunks at step 0: it trains every weight
    return teacher_forcing_batch(batch, partition[:end], full)


def single_chunk_batch(batch: Batch) -> Batch:
    """A batch of clips that a CausalNetwork takes as one chunk each, as the bidirectional model does."""
    return batch | {"context": {"single_chunk": torch.zeros(len(batch["x"]))}}


def add_whole_clips(batch: Batch, clips: Batch, t: Times) -> Batch:
    """A batch for `TeacherForced` that also trains `clips`, whole, at r = t, with their own noise."""
    return batch | {"whole": {"x": clips["x"], "eps": clips["eps"], "t": t, "r": t}}


@dataclass
class TeacherForced(InnerState):
    """A loss that gives its network clean earlier chunks: the batch's `context` joins the condition.

    whole: the loss that a batch from `add_whole_clips` adds, of each clip as one chunk. AnyFlow adds that of the
    velocity (r = t), without weights, in a tenth of the steps.
    """

    forward: Loss
    whole: Loss | None = None

    def __call__(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """The losses (B,) of the inner loss, and its errors by name; and of whole clips, by the name "whole clip"."""
        loss, errors = self.forward(u, batch | {"condition": batch["condition"] | batch["context"]})
        if "whole" not in batch:
            return loss, errors
        clips = single_chunk_batch(batch | batch["whole"])
        added, error = self.whole(u, clips | {"condition": clips["condition"] | clips["context"]})
        return loss + added, errors | {"whole clip": error["tangent"]}
