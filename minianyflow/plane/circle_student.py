"""A causal student of the circle process, and how its clips are made frame by frame.

A causal student u(z, t, r, past, frame) is the average velocity of one frame, given the frames before it.
Shapes: B clips, F frames; z and x of one frame (B, 2), clips and their noise (B, F, 2), frame (B,) counted from 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minianyflow.networks.mlp import MLP
from minianyflow.objectives import InnerState
from minianyflow.on_policy import backward_simulation
from minianyflow.samplers import sample_flow_map
from minianyflow.support.errors import InputError
from minianyflow.times import time_grid
from toy_data.circle import CircleProcess

WINDOW = 4  # frames: enough to tell the speed (4.5 sigma); exact conditionals on a window keep every window's law


class CausalMLP(nn.Module):
    """u(z, t, r, past, frame): an MLP that sees the last WINDOW frames before `frame`, and which of them exist.

    turned: it sees everything turned so that the last frame lies on the first axis, and its answer is turned back. Then
    u(Rz, t, r, R past) = R u(z, t, r, past) for every rotation R about the origin, as of the process itself.
    """

    def __init__(self, width: int = 64, depth: int = 4, seeds=(0,), turned: bool = False):
        super().__init__()
        self.turned, self.mlp = turned, MLP((2 + 3 * WINDOW,), width, depth, seeds)

    def forward(self, z: Tensor, t: Tensor, r: Tensor, past: Tensor, frame: Tensor, copy: Tensor | None = None):
        """z (B, 2), past (B, n, 2) with n >= frame (B,); later frames have no effect. Returns (B, 2)."""
        last = int(frame.max())
        if past.ndim != 3 or len(past) != len(z) or past.shape[1] < last:
            raise InputError(f"past {tuple(past.shape)} at frame {last}; expected ({len(z)}, n, 2), n no less than it")
        place = frame[:, None] + torch.arange(WINDOW)  # in a past that WINDOW empty frames precede
        window = nn.functional.pad(past, (0, 0, WINDOW, 0)).take_along_dim(place[..., None], 1)
        exists = (place >= WINDOW).to(z)
        if not self.turned:
            return self.mlp(torch.cat([z, window.flatten(1), exists], 1), t, r, copy)[:, :2]
        points = torch.view_as_complex(torch.cat([z[:, None], window], 1).contiguous())  # (B, 1 + WINDOW)
        last, size = points[:, -1:], points[:, -1:].abs()
        turn = torch.where(size > 1e-3, last / size, 1.0)
        seen = torch.view_as_real(points * turn.conj()).flatten(1)
        out = self.mlp(torch.cat([seen, exists], 1), t, r, copy)[:, None, :2]
        return torch.view_as_real(torch.view_as_complex(out.contiguous()) * turn)[:, 0]


def conditional_velocity(process: CircleProcess) -> Callable[..., Tensor]:
    """The exact velocity(z, t, past, frame) of the next frame, given all frames before it."""

    def velocity(z, t, past, frame, copy=None):
        out = torch.empty_like(z)
        for index in frame.unique().tolist():
            rows = (frame == index).nonzero().squeeze(1)
            weights = process.log_weights(past[rows, :index])
            out[rows] = process.frame(index).velocity(z[rows], t[rows], weights)
        return out

    return velocity


class ClipScore(nn.Module):
    """A fake score u(z, t, r) of clips: it starts as the teacher (DMD2), the exact velocity, plus an MLP.

    context: how many numbers the MLP sees besides z: the frames `past` and the rollout's length, of a window of a clip.
    """

    def __init__(self, exact: Callable, shape: tuple[int, ...], width=128, depth=4, seeds=(0,), context: int = 0):
        super().__init__()
        self.exact, self.mlp = exact, MLP((math.prod(shape) + context,), width, depth, seeds)
        nn.init.zeros_(getattr(self.mlp, f"weight{depth}"))

    def forward(self, z: Tensor, t: Tensor, r: Tensor, copy: Tensor | None = None, **context: Tensor):
        """z (B, F, 2); context: `past` (B, n, 2) and `length` (B,), or nothing. Returns the shape of z."""
        more = [context["past"].flatten(1), context["length"].log2()[:, None]] if context else []
        seen = torch.cat([z.flatten(1), *more], 1)
        return self.exact(z, t, **context) + self.mlp(seen, t, r, copy)[:, : z[0].numel()].view_as(z)


def frame_by_frame(
    make_frame: Callable, z: Tensor, truth: Tensor | None = None, detach=False, past: Tensor | None = None, **condition
) -> Tensor:
    """Frames (B, F, 2) from noise `z` (B, F, 2), each by make_frame(z_k, past=, frame=, **condition).

    The past consists of the frames made so far, without gradient if `detach`; or of the frames of the clips `truth`.
    past: frames (B, n, 2) that the first one made comes after.
    """
    frames, past = [], z[:, :0] if past is None else past
    for index in range(z.shape[1]):
        x = make_frame(z[:, index], past=past, frame=torch.full((len(z),), past.shape[1]), **condition)
        frames.append(x)
        seen = x.detach() if detach else x
        past = torch.cat([past, (seen if truth is None else truth[:, index])[:, None]], 1)
    return torch.stack(frames, 1)


def simulate(detach: bool) -> Callable[..., Tensor]:
    """Backward simulation of clips, frame by frame, for `OnPolicyLoss`: (1, B, F, 2), all at t = 0."""

    def clips(u, z, *rollout, **condition):
        def make_frame(z, **past):
            return backward_simulation(u, z, *rollout, **past)[-1]

        return frame_by_frame(make_frame, z, detach=detach, **condition)[None]

    return clips


def sample_clips(u: Callable, z: Tensor, nfe: int, truth: Tensor | None = None, **condition) -> Tensor:
    """Clips (B, F, 2) by any-step sampling, `nfe` evaluations per frame; the clips `truth` as context, if given."""
    times = time_grid(nfe)
    return frame_by_frame(lambda z, **past: sample_flow_map(u, z, times, **past)[-1], z, truth, **condition)


@dataclass
class FrameLoss(InnerState):
    """Teacher forcing: the forward loss on one frame of every clip, with its true past as the condition."""

    forward: Callable

    def __call__(self, u, batch):
        """As FlowMapLoss. The batch has `x`, `eps` (B, F, 2) and `frame` (B,), besides the pairs of times."""
        rows, frame = torch.arange(len(batch["x"])), batch["frame"]
        condition = {**batch.get("condition", {}), "past": batch["x"], "frame": frame}
        of_frame = {name: batch[name][rows, frame] for name in ("x", "eps")}
        return self.forward(u, batch | of_frame | {"condition": condition})
