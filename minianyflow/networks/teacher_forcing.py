"""Teacher forcing: every chunk of a clip learns at once, each seeing clean earlier ones (FAR, arXiv 2503.19325).

Chunks older than the last full_chunk_limit are only seen, compressed. So a clip is cut off after one chunk or another,
that all lengths of context are trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minianyflow.objectives import InnerState


def in_chunks(batch, partition, full_chunk_limit):
    """The part of a batch of whole clips that teacher forcing trains on, cut off after the chunks in `partition`.

    The frames that a network sees at full resolution are x, and, as clean `context`, `clean`; older ones are `past`.
    """
    old, end = sum(partition[:-full_chunk_limit]), sum(partition)
    clean, past = batch["x"][:, old:end], batch["x"][:, :old]
    context = {"clean": clean} | ({"past": past} if old else {})
    return batch | {"x": clean, "eps": batch["eps"][:, old:end], "context": context}


def in_turn(batch, step, network):
    """`in_chunks` for a CausalNetwork: at each step one chunk fewer, down to those seen in full, then all again."""
    partition, full = network.partition(batch["x"].shape[1]), network.transformer.config.full_chunk_limit
    spare = max(len(partition) - full, 0)
    return in_chunks(batch, partition[: len(partition) - step % (spare + 1)], full)  # step 0 trains every weight


def as_whole(batch):
    """A batch of whole clips for a CausalNetwork to take as one chunk each, as the bidirectional model does."""
    return batch | {"context": {"whole": torch.zeros(len(batch["x"]))}}


@dataclass
class TeacherForced(InnerState):
    """A loss whose network sees clean earlier chunks: the batch's `context` joins its condition."""

    forward: Callable

    def __call__(self, u, batch):
        """As the loss."""
        return self.forward(u, batch | {"condition": batch["condition"] | batch["context"]})
