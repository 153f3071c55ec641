"""Bouncing blobs: small grey videos of one or two balls between four walls, with exact positions.

Balls move straight, are reflected by the walls, and never come within APART of each other. So the light of a frame is
that of its balls, and away from the walls nothing accelerates.
"""

from dataclasses import dataclass

import torch

from minianyflow.support.errors import InputError

SIZE, SIGMA = 16, 1.1  # pixels
WALLS = (3.0, 12.0)  # of the centres: no light is lost beyond the edge
SPEED = (0.4, 0.9)  # pixels per frame
APART = 3 * SIGMA
PROMPTS = ("one ball", "two balls")
LIGHT = 2 * torch.pi * SIGMA**2  # of one ball: the sum of its pixels


@dataclass
class Clips:
    """video (B, T, 16, 16) in [0, 1]; balls (B,) 1 or 2, also the prompt's number plus one; positions (B, T, 2, 2).

    A position is (x, y) in pixels, NaN for a ball that does not exist.
    """

    video: torch.Tensor
    balls: torch.Tensor
    positions: torch.Tensor


def render(positions: torch.Tensor) -> torch.Tensor:
    """The frames of balls at `positions` (..., K, 2), NaN for none: (..., 16, 16)."""
    pixel = torch.arange(SIZE, dtype=torch.float32)
    bump = torch.exp(-0.5 * ((positions[..., None] - pixel) / SIGMA) ** 2).nan_to_num(0.0)  # (..., K, 2, 16)
    return torch.einsum("...kx,...ky->...yx", bump[..., 0, :], bump[..., 1, :])


def sample(count: int, generator: torch.Generator | None = None, frames: int = 17, redraw: int | None = None) -> Clips:
    """`count` clips of `frames` frames, one and two balls in turn; the same for the same generator.

    redraw: a frame at which every ball gets a new velocity of the same law. Such clips are wrong where only motion is.
    """
    if frames % 4 != 1 or frames < 1:
        raise InputError(f"{frames} frames; expected 4 n + 1, such as 17: the codec takes one frame, then fours")
    balls = torch.arange(count) % 2 + 1
    positions = torch.full((count, frames, 2, 2), torch.nan)
    wanted = (balls == 2).nonzero().squeeze(1)
    while len(wanted):  # rejection: pairs that come too close are drawn again
        pairs = _fly(len(wanted), frames, generator, redraw)
        fits = (pairs[:, :, 0] - pairs[:, :, 1]).norm(dim=2).min(1).values > APART
        positions[wanted[fits]] = pairs[fits]
        wanted = wanted[~fits]
    single = balls == 1
    positions[single, :, :1] = _fly(int(single.sum()), frames, generator, redraw)[:, :, :1]
    return Clips(render(positions), balls, positions)


def _fly(count, frames, generator, redraw=None):
    """Two balls each: (count, frames, 2, 2), reflected between the walls."""
    low, high = WALLS
    start, velocity = torch.rand(count, 2, 2, generator=generator), _velocities(count, generator)
    time = torch.arange(frames, dtype=torch.float32)[:, None, None]
    unfolded = (start * (high - low))[:, None] + velocity[:, None] * time
    if redraw is not None:
        unfolded += (_velocities(count, generator) - velocity)[:, None] * (time - redraw).clamp(min=0)
    return low + (high - low) - (unfolded.remainder(2 * (high - low)) - (high - low)).abs()


def _velocities(count, generator):
    """(count, 2, 2), of any direction and of a speed between the two of SPEED."""
    speed, turn = torch.rand(2, count, 2, generator=generator)
    speed, turn = SPEED[0] + (SPEED[1] - SPEED[0]) * speed, 2 * torch.pi * turn
    return speed[..., None] * torch.stack([turn.cos(), turn.sin()], -1)
