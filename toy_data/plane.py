"""Targets on the plane: Gaussian mixtures, so that everything about them is exact.

A new target is a function that returns a GaussianMixture, and an entry in DATASETS; `demo --dataset NAME` races it.
One of your own needs neither: `demo --data points.csv`, or what else `target` takes, in any number of dimensions.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from minianyflow.mixtures import GaussianMixture
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import regular
from toy_data.own import PICTURES, Sampled, Target, of_function, of_picture, of_points, read_points


def ring8():
    """Eight blobs on a circle of radius 1.5, sigma .08."""
    angle = torch.arange(8) * (math.pi / 4)
    return GaussianMixture(1.5 * torch.stack([angle.cos(), angle.sin()], 1), 0.08)


def skewed_ring():
    """The same eight blobs with shares of 1/36 to 8/36."""
    ring = ring8()
    return GaussianMixture(ring.means, ring.sigma, torch.arange(1.0, 9.0))


def rings():
    """Three circles of radius .6, 1.2 and 1.8, 14, 28 and 42 components on them; sigma .06."""
    angles = {
        radius: torch.arange(count) * (2 * math.pi / count) for radius, count in ((0.6, 14), (1.2, 28), (1.8, 42))
    }
    circles = [radius * torch.stack([angle.cos(), angle.sin()], 1) for radius, angle in angles.items()]
    return GaussianMixture(torch.cat(circles), 0.06)


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


DATASETS = {target.__name__: target for target in (spiral, ring8, checkerboard, rings, skewed_ring)}


What = str | Path | Callable | GaussianMixture | Sampled  # a target, or what one is made of


def load(what: What) -> GaussianMixture | Sampled:
    """The law of a target: `target(what).law`; InputError with the nearest names for a name that there is not."""
    return target(what).law


def target(what: What) -> Target:
    """A target by its name in DATASETS, or one of your own.

    what: a name; a GaussianMixture of states (D,), best with a spread of about 1; the path of a picture, or of a CSV
    file of points; a function sample(count, generator) that returns (count, D); or samples that `load` made of one.
    """
    if isinstance(what, Sampled):
        return Target("samples", what, "learnt", "a long ODE of a learnt velocity")
    if isinstance(what, Path) or (isinstance(what, str) and Path(what).suffix):
        path = regular(what)
        return of_picture(path) if path.suffix.lower() in PICTURES else of_points(read_points(path), path.name)
    if callable(what):
        return of_function(what, getattr(what, "__name__", "sample"))
    mixture = what if isinstance(what, GaussianMixture) else choose("dataset", what, DATASETS)()
    if len(mixture.shape) != 1:
        raise InputError(f"a mixture of states {tuple(mixture.shape)}; expected states of one axis: flatten its means")
    flow = f"the exact flow of a mixture of {len(mixture.means)} Gaussians"
    return Target("mixture" if what is mixture else what, mixture, "exact", flow)
