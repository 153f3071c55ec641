"""A point that runs round a circle, frame by frame: a causal process of which everything is exact.

The phase is random, the speed is one of six (three, in both directions), noise of sigma = .05 is added to every frame.
So a clip is a Gaussian mixture in (frames, 2) with one component per phase and speed, and so is the law of the next
frame given the frames before it.
"""

import math

import torch

from minianyflow.mixtures import GaussianMixture
from minianyflow.support.errors import InputError

SPEEDS = (-0.6, -0.4, -0.2, 0.2, 0.4, 0.6)  # radians per frame


class CircleProcess:
    """clips: the mixture of whole clips (frames, 2). 64 phases are two sigma apart, so the circle has no gaps."""

    def __init__(self, frames: int = 16, phases: int = 64, sigma: float = 0.05):
        phase = torch.arange(phases) * (2 * math.pi / phases)
        angle = phase[:, None, None] + torch.tensor(SPEEDS)[:, None] * torch.arange(frames)  # (phases, speeds, frames)
        means = torch.stack([angle.cos(), angle.sin()], -1).flatten(0, 1)  # (K, frames, 2)
        self.frames, self.clips = frames, GaussianMixture(means, sigma)

    def frame(self, index: int) -> GaussianMixture:
        """The mixture of frame `index` alone, (2,): give its methods `log_weights(past)` for the conditional law."""
        return GaussianMixture(self.clips.means.reshape(-1, self.frames, 2)[:, index], self.clips.sigma)

    def after(self, index: int) -> GaussianMixture:
        """The mixture of the frames from `index` on, (frames - index, 2); with `log_weights(past)` the conditional."""
        return GaussianMixture(self.clips.means.reshape(-1, self.frames, 2)[:, index:], self.clips.sigma)

    def log_weights(self, past: torch.Tensor) -> torch.Tensor:
        """log p(component | past), past (B, n, 2) with n from 0 to frames - 1: (B, K)."""
        if past.ndim != 3 or past.shape[2] != 2 or past.shape[1] >= self.frames:
            raise InputError(f"past frames of shape {tuple(past.shape)}; expected (B, 0 to {self.frames - 1}, 2)")
        seen = self.clips.means.reshape(-1, self.frames, 2)[:, : past.shape[1]].flatten(1)
        distance = torch.cdist(past.flatten(1), seen).square()  # (B, K)
        return (-0.5 * distance / self.clips.sigma**2).log_softmax(1)
