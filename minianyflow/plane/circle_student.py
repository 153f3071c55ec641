"""A causal student of the circle process, and how its clips are made frame by frame.

A causal student u(z, t, r, past, frame) is the average velocity of one frame, given the frames before it.
Shapes: B clips, F frames, S seeds; z, x of one frame (B, 2), clips and their noise (B, F, 2), frame (B,) from 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from minianyflow.networks.mlp import MLP
from minianyflow.objectives import InnerState
from minianyflow.on_policy import backward_simulation
from minianyflow.samplers import sample_flow_map
from minianyflow.support.errors import InputError
from minianyflow.times import time_grid

WINDOW = 4  # frames: enough to tell the speed (4.5 sigma); exact conditionals on a window keep every window's law


class CausalMLP(nn.Module):
    """u(z, t, r, past, frame): an MLP that sees the last WINDOW of `frame` past frames, and which of them exist."""

    def __init__(self, width=64, depth=4, seeds=(0,)):
        super().__init__()
        self.mlp = MLP((2 + 3 * WINDOW,), width, depth, seeds)

    def forward(self, z, t, r, past, frame, copy=None):
        """z (B, 2), past (B, n, 2) with n >= frame (B,): later frames are not looked at. Returns (B, 2)."""
        if past.ndim != 3 or len(past) != len(z) or past.shape[1] < int(frame.max()):
            raise InputError(
                f"past {tuple(past.shape)} of {len(z)} clips at frame {int(frame.max())}; expected (B, n, 2) and n no "
                "less than the frame's number, counted from 0"
            )
        place = frame[:, None] + torch.arange(WINDOW)  # in a past that WINDOW empty frames precede
        seen = nn.functional.pad(past, (0, 0, WINDOW, 0)).gather(1, place[..., None].expand(-1, -1, 2))
        inputs = torch.cat([z, seen.flatten(1), (place >= WINDOW).to(z)], 1)
        return self.mlp(inputs, t, r, copy)[:, :2]


def conditional_velocity(process):
    """The exact velocity(z, t, past, frame) of the next frame given all frames before it."""

    def velocity(z, t, past, frame, copy=None):
        out = torch.empty_like(z)
        for index in frame.unique().tolist():
            rows = (frame == index).nonzero().squeeze(1)
            weights = process.log_weights(past[rows, :index])
            out[rows] = process.frame(index).velocity(z[rows], t[rows], weights)
        return out

    return velocity


class ClipScore(nn.Module):
    """A fake score u(z, t, r) of whole clips: the exact joint velocity and what an MLP adds to it, at first nothing.

    Fake scores start as the teacher (DMD2; AnyFlow); here the teacher is a formula.
    """

    def __init__(self, exact, shape, width=128, depth=4, seeds=(0,)):
        super().__init__()
        self.exact, self.mlp = exact, MLP(shape, width, depth, seeds)
        nn.init.zeros_(getattr(self.mlp, f"weight{depth}"))

    def forward(self, z, t, r, copy=None):
        """z (B, F, 2); returns the same shape."""
        return self.exact(z, t) + self.mlp(z, t, r, copy)


def frame_by_frame(walk, z, truth=None, detach=False, **condition):
    """Clips (B, F, 2) from noise `z` (B, F, 2): x = walk(z_k, past=, frame=, **condition) for frame after frame.

    The past is what was made so far, with gradient or, if `detach`, without; or that of the clips `truth`.
    """
    made, past = [], z[:, :0]
    for index in range(z.shape[1]):
        x = walk(z[:, index], past=past, frame=torch.full((len(z),), index), **condition)
        made.append(x)
        seen = x.detach() if detach else x
        past = torch.cat([past, (seen if truth is None else truth[:, index])[:, None]], 1)
    return torch.stack(made, 1)


def simulate(detach):
    """Backward simulation of clips, frame by frame, for `OnPolicyLoss`: (1, B, F, 2), all at t = 0."""

    def backward_simulation_of_clips(u, z, lengths, step, shift=1.0, **condition):
        def walk(z, **condition):
            return backward_simulation(u, z, lengths, step, shift, **condition)[-1]

        return frame_by_frame(walk, z, detach=detach, **condition)[None]

    return backward_simulation_of_clips


def sample_clips(u, z, nfe, truth=None, **condition):
    """Clips (B, F, 2) by any-step sampling, `nfe` evaluations a frame: free-running, or every frame after true ones."""
    times = time_grid(nfe)
    return frame_by_frame(lambda z, **there: sample_flow_map(u, z, times, **there)[-1], z, truth, **condition)


@dataclass
class FrameLoss(InnerState):
    """Teacher forcing: the forward loss on one frame of every clip, the condition its true past."""

    forward: Callable

    def __call__(self, u, batch):
        """As FlowMapLoss; batch: `x`, `eps` (B, F, 2) and `frame` (B,), besides the pairs."""
        rows, frame = torch.arange(len(batch["x"])), batch["frame"]
        condition = {**batch.get("condition", {}), "past": batch["x"], "frame": frame}
        one = {name: batch[name][rows, frame] for name in ("x", "eps")}
        return self.forward(u, batch | one | {"condition": condition})
