"""Image to video: clips that go on from a first latent frame that is known (AnyFlow's `i2v_prob`).

A known frame is clean and stays so: in a batch it stands in the place of its own noise. Then every state of it is the
frame itself, and its velocity is zero. A network gets the mask `known` in its condition: it takes these frames at time
0 and returns zero for them. So difference quotients, guidance, jumps, rollouts and both scores leave them as they are
without a line of their own, and they have no part in a loss (its mean still counts their zeros).
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from minianyflow.batch import Batch
from minianyflow.networks.video import Latents, Timesteps

Known = Bool[Tensor, "batch frames"]
NOISES = ("eps", "noise", "score_eps")  # of a batch


def known_times(known: Known | None, t: Timesteps, r: Timesteps) -> tuple[Timesteps, Timesteps]:
    """t and r of a step, but for known frames t = 0. Their r stays, as in diffusers; where r = t, it follows t."""
    if known is None:
        return t, r
    return t.masked_fill(known, 0), r.masked_fill(known & (r == t), 0)


def keep_known(known: Known | None, u: Latents) -> Latents:
    """The average velocity u, zero for known frames."""
    return u if known is None else u.masked_fill(known[:, :, None, None, None], 0)


def know_first_frames(batch: Batch) -> Batch:
    """A batch of whole clips in which its rows `known`, if it has that key, know their first frame."""
    if "known" not in batch:
        return batch
    x = batch["x"]
    known = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    known[:, 0] = batch["known"]
    kept = {name: torch.where(known[:, :, None, None, None], x, batch[name]) for name in NOISES if name in batch}
    conditions = [name for name in ("condition", "rollout_condition") if name in batch]
    return batch | kept | {name: batch[name] | {"known": known} for name in conditions}
