"""What AnyFlow published of the forward stage besides its targets: the weight of a row, and rebalancing."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minianyflow.batch import Batch
from minianyflow.notation import Errors, Loss, Losses, Network, Weight
from minianyflow.objectives import sqrt_weight
from minianyflow.support.errors import InputError
from minianyflow.times import time_grid


def anyflow_weight(shift: float = 1.0) -> Weight:
    """AnyFlow's weight of a row, a function of t: t sqrt(1 - t), of mean 1 over the shifted grid of 1000 times."""
    grid = time_grid(1000, shift)[:-1]
    mean = float((grid * sqrt_weight(grid)).mean())
    return lambda t: t * sqrt_weight(t) / mean


@dataclass
class Rebalanced:
    """A forward loss; the loss of each row r < t is scaled to the mean loss of the rows r = t of the whole step.

    The mean is over all processes, and over the micro-batches so far. A step without rows r = t takes the mean of the
    step before, or leaves losses as they are. Rebalancing cancels the time weight of the rows r < t, and the scaled
    loss no longer shows the error of the flow map: log the error without weights.
    wait: is called before processes exchange these means: `RunNetworks.wait`.
    totals: of the step so far, the sum of the losses of rows r = t, their number, that of the other rows.
    """

    forward: Loss
    wait: Callable[[], None] = lambda: None
    totals: Tensor | None = field(default=None, init=False)

    def __call__(self, u: Network, batch: Batch) -> tuple[Losses, Errors]:
        """As the inner loss. Raises InputError if a row r = t comes after others of its step were scaled."""
        loss, errors = self.forward(u, batch)
        diagonal, before = batch["t"] == batch["r"], self.totals
        goes_on = "part" in batch and bool(batch["part"][0])  # a later micro-batch of the same step
        known = torch.stack([loss[diagonal].sum(), diagonal.sum(), (~diagonal).sum()]).detach()
        if torch.distributed.is_initialized():
            self.wait()
            torch.distributed.all_reduce(known)
        if goes_on and known[1] and before[2]:
            raise InputError("rows r = t after rows r < t of the same step; expected them first, as batch.deal does it")
        if before is not None and (goes_on or not known[1]):
            known = known + before
        self.totals = known
        if known[1]:
            loss = torch.where(diagonal, loss, loss * (known[0] / known[1]) / loss.detach().clamp(min=1e-12))
        return loss, errors

    def state_dict(self) -> dict[str, Tensor]:
        """The totals of the last step."""
        return {} if self.totals is None else {"totals": self.totals}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`."""
        self.totals = state.get("totals")
