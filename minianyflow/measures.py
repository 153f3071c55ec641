"""How far samples are from the truth: in data units, repeatable at a given seed, reported beside a floor.

With a few thousand random samples, sliced W2 is mostly sampling noise. So noises are scrambled Sobol points,
references are stratified over components, and directions are evenly spaced.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minianyflow.mixtures import GaussianMixture
from minianyflow.notation import Samples, State
from minianyflow.support.checks import check_finite
from minianyflow.support.errors import InputError


def sobol_noise(count: int, shape: Sequence[int], seed: int = 0) -> Samples:
    """Standard normal noise (count, *shape) that fills space evenly: the normal quantiles of scrambled Sobol points."""
    size = torch.Size(shape).numel()
    points = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9)).float().reshape(count, *shape)


def even_noise(x: State, seed: int = 0) -> State:
    """Fresh standard normal noise for states x (n, *shape), even over all of them and over any that are neighbours.

    Every noise has its law, and says nothing of x; only all together scatter less than independent ones. Sobol points
    of one more number are dealt out, by that number, along a curve through the states (Morton's, of their ranks in the
    first four numbers): array-RQMC (L'Ecuyer, Lecot and Tuffin 2008, section 2).
    """
    size, ranks = x[0].numel(), x.flatten(1)[:, :4].argsort(0).argsort(0)
    bits = range((len(x) - 1).bit_length())
    along = sum((ranks[:, k] >> bit & 1) << bit * ranks.shape[1] + k for bit in bits for k in range(ranks.shape[1]))
    points = torch.quasirandom.SobolEngine(1 + size, scramble=True, seed=seed).draw(len(x), dtype=torch.float64)
    dealt = torch.empty_like(points[:, 1:])
    dealt[torch.as_tensor(along).argsort()] = points[points[:, 0].argsort(), 1:]
    return torch.special.ndtri(dealt.clamp(1e-9, 1 - 1e-9)).to(x).reshape(x.shape)


def directions(dimensions: int, count: int = 128, seed: int = 0) -> Tensor:
    """Unit directions (count, dimensions): evenly spaced over a half circle in the plane, else random but fixed."""
    if dimensions == 2:
        angle = torch.arange(count) * (torch.pi / count)
        return torch.stack([angle.cos(), angle.sin()], 1)
    random = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
    return random / random.norm(dim=1, keepdim=True)


def sliced_w2(a: Tensor, b: Tensor, count: int = 128) -> float:
    """Sliced Wasserstein-2 distance of samples `a` from a reference `b` (n, *shape), in data units.

    Root of the mean, over directions, of the squared W2 distance between the two projections. `a` may pool K draws,
    (K n, *shape): their quantiles are averaged in groups of K. A sampler that draws fresh noise needs this or
    `even_noise`, or its sampling noise (.011 to .022 on the spiral; a map of even noises has .004) counts as error.
    Raises InputError for sizes that do not fit, and for samples that are not finite.
    """
    a, b = _flat(a, b)
    if len(a) % len(b):
        raise InputError(f"samples {tuple(a.shape)} and reference {tuple(b.shape)}; expected (K n, D) and (n, D)")
    along = directions(a.shape[1], count).to(a)
    quantiles_a, quantiles_b = (np.sort((along @ points.T).cpu().numpy()) for points in (a, b))  # faster than torch
    return float(np.sqrt(np.square(quantiles_a.reshape(count, len(b), -1).mean(2) - quantiles_b).mean()))


def path_error(end: Samples, exact_end: Samples) -> float:
    """Mean distance between the ends of samples and the ends of the exact flow from the same noises, in data units."""
    end, exact_end = _flat(end, exact_end)
    if len(end) != len(exact_end):
        raise InputError(f"ends {tuple(end.shape)} and exact ends {tuple(exact_end.shape)}; expected the same shape")
    return float((end - exact_end).norm(dim=1).mean())


def frechet_distance(a: Tensor, b: Tensor, least: int = 2048) -> float:
    """Frechet distance of the Gaussians fitted to samples a, b (n, *shape), n at least `least`; in squared data units.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017, equation 6).
    Small samples read too much, even between equal laws (blob latents, 320 numbers: data against data 2.2 at 2048, .6
    at 8192): compare at one count, beside data against data. If a sample has more numbers than there are samples, the
    distance is computed from products of samples. Raises InputError for fewer than `least` samples, and for shapes
    that do not fit.
    """
    a, b = _flat(a.cpu(), b.cpu(), max(least, 2), torch.float64)
    mean_a, mean_b = a.mean(0), b.mean(0)
    if a.shape[1] > min(len(a), len(b)):  # with S = X'X the trace of (S_a S_b)^(1/2) is the sum of the singular values
        a, b = ((x - mean) / (len(x) - 1) ** 0.5 for x, mean in ((a, mean_a), (b, mean_b)))  # of X_a X_b'
        shared = torch.linalg.svdvals(a @ b.T).sum()
        return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * shared)
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], -1) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared)


def off_share(samples: Samples, mixture: GaussianMixture, rare: float = 3.35e-4) -> float:
    """The share of samples that are off all components of the mixture.

    A sample is off a component if only the share `rare` of the component's own samples is farther from its mean: 4
    sigmas in the plane, more in higher dimensions.
    """
    from scipy.special import gammainccinv

    radius = (2 * gammainccinv(mixture.means.shape[1] / 2, rare)) ** 0.5  # chi-square, D degrees of freedom
    samples, _ = _flat(samples, mixture.means, dtype=mixture.means.dtype)
    distance = torch.cdist(samples, mixture.means)
    return float((distance > radius * mixture.sigma).all(1).float().mean())


def _flat(a, b, least=1, dtype=torch.float32):
    """Two sets of samples as (n, D)."""
    for samples in (a, b):
        if samples.ndim < 2 or len(samples) < least:
            more = ": small samples read too much, draw more" if least > 2 else ""
            raise InputError(f"samples of shape {tuple(samples.shape)}; expected (n, *shape), n at least {least}{more}")
        check_finite("a set of samples", samples)
    a, b = a.flatten(1).to(dtype), b.flatten(1).to(dtype)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"samples of {a.shape[1]} and {b.shape[1]} numbers; expected equal numbers: reshape one")
    return a, b
