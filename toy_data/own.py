"""Targets of your own: a table of points, a picture, or a function that samples. `plane.target` tells them apart.

Points and pictures become Gaussian mixtures, whose flow is exact: it is the truth of the mixture, not of whatever made
the points. A function stays what it is, samples alone: its truth is a long ODE of a velocity that is learnt
(minianyflow/plane/learnt.py). All are standardised: mean 0 and deviation 1, of each column, or of a picture as a whole.
"""

import csv
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from minianyflow.mixtures import GaussianMixture
from minianyflow.support.checks import check_finite
from minianyflow.support.errors import InputError
from minianyflow.support.files import open_picture

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp")
FEWEST, LARGEST = 8, 32  # points; numbers a point: in more dimensions neither a fit nor a small network says much
KERNELS = 1024  # of more points, so many at random: each costs time in every exact velocity
WIDTHS = 0.03 * 1.2 ** torch.arange(20, dtype=torch.float64)  # of the kernels; the narrowest that small networks learn
CELLS = 48  # a picture's longer side is reduced to so many
DRAWN = 2**18  # samples taken of a function, once


@dataclass(frozen=True)
class Target:
    """What `law` is called, which truth it has, and in which units it is told.

    law: `shape`, `sample`, `sample_stratified`, and unless truth is "learnt" `velocity` and `flow`: a GaussianMixture.
    truth: "exact", "fitted" or "learnt"; flow: what the truth is, in words. standardised: mean and scale, if it is.
    """

    name: str
    law: "GaussianMixture | Sampled"
    truth: str
    flow: str
    standardised: dict[str, list[float]] | None = None

    def in_report(self) -> dict:
        """What the JSON says of it."""
        units = {"units": "standardised: (x - mean) / scale"} | self.standardised if self.standardised else {}
        return {"dataset": self.name, "truth": self.truth, "flow": self.flow} | (units or {"units": "its own"})


class Sampled:
    """A law of which nothing is known but samples, `rows` (n, D): no density, no velocity."""

    def __init__(self, rows: Tensor):
        self.rows, self.shape = rows, rows.shape[1:]

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` of the rows at random, (count, D)."""
        return self.rows[torch.randint(len(self.rows), (count,), generator=generator)]

    def sample_stratified(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` rows that are spread evenly: one from each cell of a k-d tree; a power of two, at most n / 2."""
        levels = count.bit_length() - 1
        if count != 2**levels or count > len(self.rows) // 2:
            raise InputError(f"{count} even samples of {len(self.rows)}; expected a power of two, at most half of them")
        cells = self.sample(len(self.rows) // count * count, generator)[None]  # (cells, rows of one, D)
        for level in range(levels):  # halve each cell along one axis in turn
            order = cells[..., level % cells.shape[2]].argsort(1)
            cells = cells.take_along_dim(order[..., None], 1).reshape(2 * len(cells), -1, cells.shape[2])
        return cells[torch.arange(count), torch.randint(cells.shape[1], (count,), generator=generator)]

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Raises InputError: samples have none."""
        raise InputError("samples alone have no velocity; learn one: plane.load of minianyflow.plane.learnt.learn(...)")


def of_points(points: Tensor, name: str) -> Target:
    """A mixture fitted to points (n, D): a Gaussian around each, as wide as makes each likeliest given all others."""
    points, standardised = standardise(points, name)
    kept = points
    if len(points) > KERNELS:
        kept = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:KERNELS]]
    width = max(WIDTHS.tolist(), key=lambda width: left_out_likelihood(kept, width))
    number = f"{len(kept)} of {len(points)}" if len(kept) < len(points) else f"{len(points)}"
    flow = f"the exact flow of a mixture fitted to {number} points, each blurred by {width:.2g}"
    return Target(name, GaussianMixture(kept.float(), width), "fitted", flow, standardised)


def left_out_likelihood(points: Tensor, width: float) -> float:
    """The mean log density of each of the points (n, D) under Gaussians of that width around the others."""
    distance = torch.cdist(points, points).square().fill_diagonal_(math.inf)
    log_norm = points.shape[1] * math.log(width) + 0.5 * points.shape[1] * math.log(2 * math.pi)
    return float(torch.logsumexp(-0.5 * distance / width**2, 1).mean()) - math.log(len(points) - 1) - log_norm


def of_picture(path: Path) -> Target:
    """A mixture with a Gaussian for each pixel, as heavy as the pixel differs from the shade of the picture's edge."""
    try:
        image = open_picture(path)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise InputError(f"{path} is no picture ({problem}); expected a PNG or JPEG file") from None
    if image is None:
        raise InputError(f"{path} is an animation; expected one picture")
    paper, size = Image.new("RGBA", image.size, "white"), np.array(image.size)
    image = Image.alpha_composite(paper, image).convert("L")
    image.thumbnail((CELLS, CELLS), Image.Resampling.BOX)
    shades = np.asarray(image, dtype=float)
    edge = np.concatenate([shades[0], shades[-1], shades[:, 0], shades[:, -1]])
    ink = np.abs(shades - np.median(edge))
    rows, columns = np.nonzero(ink > 0.1 * 255)  # less is the grain of paper
    if len(rows) < 2:
        raise InputError(f"{path} has one colour; expected a drawing, dark on bright or bright on dark")
    cell = size / shades.shape[::-1]  # pixels
    points = torch.from_numpy(np.stack([columns + 0.5, -rows - 0.5], 1) * cell)
    weights = torch.from_numpy(ink[rows, columns] / ink[rows, columns].sum())
    mean = weights @ points
    scale = float((weights @ (points - mean).square()).mean().sqrt())
    flow = f"the exact flow of a mixture fitted to {len(points)} cells of the picture"
    mixture = GaussianMixture(((points - mean) / scale).float(), float(cell.mean()) / 2 / scale, weights)
    return Target(path.name, mixture, "fitted", flow, {"mean": mean.tolist(), "scale": [scale, scale]})


def of_function(sample: Callable, name: str) -> Target:
    """The samples of `sample(count, generator)`, which returns (count, D), a tensor or an array; drawn once."""
    try:
        inspect.signature(sample).bind(DRAWN, None)
    except (TypeError, ValueError) as problem:
        raise InputError(f"the function {name} ({problem}); expected sample(count, generator)") from None
    for count in (128, DRAWN):  # a few first, for their shape
        points = torch.as_tensor(sample(count, torch.Generator().manual_seed(0)))
        if points.ndim != 2 or len(points) != count:
            raise InputError(f"{name}({count}, generator) has shape {tuple(points.shape)}; expected ({count}, D)")
        points, standardised = standardise(points, name)
    flow = f"a long ODE of a velocity learnt from {DRAWN} samples"
    return Target(name, Sampled(points.float()), "learnt", flow, standardised)


def standardise(points: Tensor, name: str) -> tuple[Tensor, dict[str, list[float]]]:
    """Points (n, D) in float64 with mean 0 and deviation 1 in each column, and both as lists; InputError if unfit."""
    points = points.double()
    count, numbers = points.shape
    if count < FEWEST:
        raise InputError(f"{name} has {count} point{'s' * (count != 1)}; expected at least {FEWEST}, one a line")
    if not 1 <= numbers <= LARGEST:
        wanted = f"expected 1 to {LARGEST}: choose some columns, or the first principal components"
        raise InputError(f"{name} has points of {numbers} numbers; {wanted}")
    check_finite(name, points)
    mean, scale = points.mean(0), points.std(0)
    constant = ~(scale > 1e-9 * points.abs().amax(0)) | ~scale.isfinite()
    if bool(constant.any()):
        column = int(constant.nonzero()[0]) + 1
        raise InputError(f"{name}: column {column} has no spread; expected different numbers: leave it out")
    return (points - mean) / scale, {"mean": mean.tolist(), "scale": scale.tolist()}


def read_points(path: Path) -> Tensor:
    """The points (n, D) of a text file: a point a line, its numbers apart by commas, semicolons, tabs or blanks.

    A first line of names alone is left out. Beside semicolons a comma is a decimal point. InputError names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} cannot be read ({problem}); expected a CSV file of points, or a picture") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty; expected a point a line, its numbers apart by commas")
    mark = next((mark for mark in ";\t," if mark in lines[-1][1]), None)
    decimal = "," if mark == ";" else "."
    try:
        rows = [(number, [cell.strip().replace(decimal, ".") for cell in _cells(line, mark)]) for number, line in lines]
    except csv.Error as problem:
        raise InputError(f"{path} cannot be read ({problem}); expected a point a line") from None
    if not any(map(_is_number, rows[0][1])):  # names
        names, *rows = rows
        if not names[1][0] and [row[:1] for _, row in rows] == [[str(k)] for k in range(len(rows))]:
            raise InputError(f"{path}: the first column has no name and counts the lines; save it without its index")
    for number, cells in rows:
        if len(cells) != len(rows[0][1]):
            wanted = f"line {rows[0][0]} has {len(rows[0][1])}; expected as many on every line"
            raise InputError(f"{path}: line {number} has {len(cells)} numbers, {wanted}")
        for cell in cells:
            if not _is_number(cell):
                wanted = "expected finite numbers below a line of names at most: correct or delete that line"
                raise InputError(f"{path}: {cell!r} on line {number} is no number; {wanted}")
    values = [[float(cell) for cell in cells] for _, cells in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(rows[0][1]) if rows else 0)


def _cells(line, mark):
    """The fields of a line; quotation marks may stand round one."""
    return next(csv.reader([line], delimiter=mark, skipinitialspace=True)) if mark else line.split()


def _is_number(text):
    try:
        return "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False
