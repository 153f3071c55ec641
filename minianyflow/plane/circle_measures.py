"""What a free-running clip of the circle keeps: is it lawful, at one speed, and are all speeds still there.

A radius or a sliced W2 of windows reads well on clips that all run at one speed, and on clips that forget theirs.
Three figures do not: `whole`, `kept` and `tv`. Shapes: C clips, F frames.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minianyflow.measures import sliced_w2
from minianyflow.times import generator
from toy_data.circle import SPEEDS, CircleProcess

LOST = 0.3  # the radius error of a lost clip: six sigmas off
FAR = 10.0  # where a clip that has left altogether is taken to be


def radius_error(clips: Tensor) -> Tensor:
    """| |x| - 1 | of every frame: (..., 2) to (...)."""
    return (clips.norm(dim=-1) - 1).abs()


def fit_speed(clips: Tensor) -> tuple[Tensor, Tensor]:
    """The speed (C,), an index of SPEEDS, whose uniform motion is nearest to clips (C, F, 2), and what is left over.

    The best phase is that of the clip's Fourier coefficient S at the speed; the squared distance (C,) that is left is
    sum |x|^2 + F - 2 |S|, for data sigma^2 times a chi-square of 2 F - 1 degrees of freedom.
    """
    points = torch.view_as_complex(clips.contiguous().double())  # (C, F)
    turns = -1j * torch.outer(torch.arange(clips.shape[1], dtype=torch.double), torch.tensor(SPEEDS).double())
    size, speed = (points @ turns.exp()).abs().max(1)
    return speed, points.abs().square().sum(1) + clips.shape[1] - 2 * size


def lawful_distance(process: CircleProcess) -> float:
    """The 99% quantile of what `fit_speed` leaves over of data."""
    return float(fit_speed(process.clips.sample(4096, generator(1)))[1].quantile(0.99))


def measure_clips(clips: Tensor, process: CircleProcess, frames: Sequence[int]) -> dict[str, list[float]]:
    """Figures of windows of `process.frames` frames that end with each of `frames`, counted from 1, of clips (C, F, 2).

    sliced_w2: of the window, against data. tv: total variation between the law of speeds and the uniform one (all at
    one speed: .83). kept: share of clips whose speed is that of their first window (chance: .17). whole: share whose
    distance to a uniform motion is below the 99% quantile of data. radius: mean error; lost: share above LOST; both at
    the last frame.
    """
    reference = process.clips.sample_stratified(len(clips), generator(0))
    lawful, first, figures = lawful_distance(process), fit_speed(clips[:, : process.frames])[0], []
    for frame in frames:
        window = clips[:, frame - process.frames : frame].nan_to_num(FAR).clamp(-FAR, FAR)
        (speed, left), error = fit_speed(window), radius_error(window[:, -1])
        law = speed.bincount(minlength=len(SPEEDS)) / len(speed)
        figures.append(
            {
                "sliced_w2": sliced_w2(window, reference),
                "tv": 0.5 * (law - 1 / len(SPEEDS)).abs().sum(),
                "kept": (speed == first).double().mean(),
                "whole": (left <= lawful).double().mean(),
                "radius": error.mean(),
                "lost": (error > LOST).double().mean(),
            }
        )
    return {name: [round(float(one[name]), 4) for one in figures] for name in figures[0]}


def exact_clips(process: CircleProcess, count: int, frames: int, past: int, seed: int = 0) -> Tensor:
    """Clips (count, frames, 2), each frame drawn from its exact law given the `past` frames before it: the floor."""
    draw, clips = generator(seed, 5), torch.zeros(count, 0, 2)
    for _ in range(frames):
        seen = clips[:, -past:]
        component = torch.multinomial(process.log_weights(seen).exp(), 1, generator=draw).squeeze(1)
        mean = process.frame(seen.shape[1]).means[component]
        clips = torch.cat([clips, (mean + process.clips.sigma * torch.randn(count, 2, generator=draw))[:, None]], 1)
    return clips
