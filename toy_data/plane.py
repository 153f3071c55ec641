"""Targets on the plane: Gaussian mixtures, so that everything about them is exact.

A new target is a function that returns a GaussianMixture, and an entry in DATASETS; `demo --dataset NAME` races it.
"""

import math

import torch

from minianyflow.mixtures import GaussianMixture
from minianyflow.support.errors import choose


def ring8():
    """Eight blobs on a circle of radius 1.5, sigma .08."""
    angle = torch.arange(8) * (math.pi / 4)
    return GaussianMixture(1.5 * torch.stack([angle.cos(), angle.sin()], 1), 0.08)


def spiral():
    """Two arms, each the other's mirror image through the origin; 100 components, sigma .05, spread about 1."""
    angle = 2.5 * math.pi * torch.linspace(0.15, 1, 50).sqrt()
    arm = (angle / (1.25 * math.pi))[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(torch.cat([arm, -arm]), 0.05)


def checkerboard():
    """The cells of [-2, 2]^2 whose coordinates add up to an even number, 5 x 5 components in each; sigma .06."""
    inside = (torch.arange(5) + 0.5) / 5
    cells = [(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
    means = [torch.stack([i + a, j + b]) for i, j in cells for a in inside for b in inside]
    return GaussianMixture(torch.stack(means), 0.06)


DATASETS = {"spiral": spiral, "ring8": ring8, "checkerboard": checkerboard}


def load(name: str) -> GaussianMixture:
    """The mixture of that name; InputError with the nearest names otherwise."""
    return choose("dataset", name, DATASETS)()
