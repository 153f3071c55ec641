"""Measures of how balls move from one frame to the next: what counts, light and sliced W2 do not see.

A ball of the data keeps its speed and flies straight between the walls. So one straight flight, reflected by the walls,
is fitted to the places where each ball was found. Report each measure beside codec data and beside redrawn flights
(`blobs.sample(redraw=8)`): true flights whose velocity is drawn anew once. Deterministic. Shapes beside measures.py's:
    places  (..., T)    one coordinate of a ball, in pixels
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minianyflow.measures import sliced_w2
from minianyflow.support.errors import InputError
from minianyflow.video.measures import FOUND, check_balls, find_balls, track
from toy_data.blobs import PROMPTS, WALLS

WINDOW = 8  # frames of a chunk of two latent frames: the first frame stands alone
QUANTILE = 0.99  # of codec data's residuals: what is below it is straight
NEIGHBOURS = 5  # of a point of the data, that say how far around it a flight covers it
FASTEST, TRIES, ROUNDS = 1.2, 25, 4  # velocities that a fit starts from, in pixels per frame; refinements of each


@dataclass
class Flights:
    """The straight flights fitted to clips of one number of balls K.

    right (B,): whether all frames show K balls. start, velocity (B, K, 2): of the fit, in pixels and per frame.
    residual (B,): root mean square distance of a coordinate from the fit. speed (B, K, W): of a fit to each window of
    eight frames.
    """

    right: Tensor
    start: Tensor
    velocity: Tensor
    residual: Tensor
    speed: Tensor


def fit_flights(places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reflected straight flight nearest to places (..., T): start, velocity and mean square residual, (...) flight.

    Least squares on places unfolded as the last fit has them, from 25 velocities; exact for exact flights.
    """
    (low, high), frames = WALLS, places.shape[-1]
    time = torch.arange(frames) - (frames - 1) / 2
    velocity = torch.linspace(-FASTEST, FASTEST, TRIES).expand(*places.shape[:-1], TRIES)
    place, first = places[..., None, :] - low, places[..., None, :1] - low  # (..., 1, T), (..., 1, 1)
    line = first + velocity[..., None] * (time - time[0])
    for _ in range(ROUNDS):
        period = (line / (2 * (high - low))).floor() * 2 * (high - low)
        unfolded = torch.where(line - period < high - low, period + place, period + 2 * (high - low) - place)
        velocity = (unfolded * time).mean(-1) / time.square().mean()
        line = unfolded.mean(-1, keepdim=True) + velocity[..., None] * time
    square, best = (_fold(line) - place).square().mean(-1).min(-1)
    velocity, start = (part.take_along_dim(best[..., None], -1)[..., 0] for part in (velocity, line[..., 0]))
    forward = torch.where(start.remainder(2 * (high - low)) < high - low, 1, -1)  # before the first reflection
    return low + _fold(start), forward * velocity, square


def _fold(line):
    """A line on which walls do nothing, reflected by them."""
    wide = WALLS[1] - WALLS[0]
    return wide - (line.remainder(2 * wide) - wide).abs()


def flights(video: Tensor, balls: int) -> Flights:
    """The flights of `balls` balls in each clip of a video (B, T, 16, 16), T = 8 W + 1."""
    check_balls([balls] * len(video), len(video))
    if video.shape[1] % WINDOW != 1 or video.shape[1] == 1:
        raise InputError(f"{video.shape[1]} frames; expected 8 n + 1, such as 17: windows of eight after the first")
    positions, amplitudes, _ = find_balls(video)
    places = track(positions[:, :, : len(PROMPTS)])[:, :, :balls] if balls > 1 else positions[:, :, :1]
    places = places.permute(0, 2, 3, 1)  # (B, K, 2, T)
    start, velocity, square = fit_flights(places)
    _, windows, _ = fit_flights(places[..., 1:].unflatten(-1, (-1, WINDOW)))  # (B, K, 2, W)
    right = ((amplitudes > FOUND).sum(2) == balls).all(1)
    return Flights(right, start, velocity, square.mean((1, 2)).sqrt(), windows.norm(dim=2))


def motion(found: Flights, reference: Flights) -> dict[str, float]:
    """How the balls of `found` move, against those of `reference`, codec data of as many balls. A dict of floats:

    straight     share of clips whose count is right and whose residual is below the 99% quantile of the reference
    residual     mean, in pixels; this and all below of the clips whose count is right, NaN if there are none
    kept         correlation of a ball's speeds in windows of eight frames that follow each other
    speed        mean; speed_w1: Wasserstein-1 distance of its law, pixels per frame
    velocity_w2  sliced W2 of the law of velocities, so of speeds and directions, pixels per frame
    coverage     share of the reference's flights (start and velocity) that have one of `found` nearer than their fifth
                 neighbour in the reference (Naeem et al. 2020, equation 4)
    """
    right = found.right
    points, known = (
        torch.cat([flight.start[flight.right] / (WALLS[1] - WALLS[0]), flight.velocity[flight.right]], 2).flatten(0, 1)
        for flight in (found, reference)
    )
    straight = right & (found.residual <= reference.residual[reference.right].quantile(QUANTILE))
    figures = {"right": float(right.float().mean()), "straight": float(straight.float().mean())}
    if right.sum() < 2:
        names = "residual", "kept", "speed", "speed_w1", "velocity_w2", "coverage"
        return figures | dict.fromkeys(names, torch.nan)
    speeds, truth = points[:, 2:].norm(dim=1), known[:, 2:].norm(dim=1)
    least, fine = min(len(points), len(known)), torch.linspace(0, 1, 513)
    radius = torch.cdist(known, known).kthvalue(NEIGHBOURS + 1, 1).values  # the nearest is the point itself
    return figures | {
        "residual": float(found.residual[right].mean()),
        "kept": float(kept_speed(found).nanmean()),
        "speed": float(speeds.mean()),
        "speed_w1": float((speeds.quantile(fine) - truth.quantile(fine)).abs().mean()),
        "velocity_w2": sliced_w2(points[:least, 2:], known[:least, 2:]),
        "coverage": float((torch.cdist(known, points).min(1).values <= radius).float().mean()),
    }


def kept_speed(found: Flights) -> Tensor:
    """The correlations (W - 1,) of a ball's speed in a window of eight frames with that in the next."""
    speed = found.speed[found.right].flatten(0, 1)
    return torch.stack([torch.corrcoef(pair.T)[0, 1] for pair in speed.unfold(1, 2, 1).unbind(1)])


def spread(latents: Tensor) -> dict[str, float]:
    """How far latents (n, ...) lie apart: the sum of their variances, the mean distance of a pair."""
    flat = latents.flatten(1).cpu()
    pairs = torch.pdist(flat).mean()
    return {"latent_variance": float(flat.var(0).sum()), "pair_distance": float(pairs)}
