"""How far samples are from the truth. Deterministic at a given seed, in data units, quoted beside a floor.

The measure decides what can be seen: with a few thousand random samples sliced W2 is mostly sampling noise. So the
noises are scrambled Sobol points, the reference is stratified over components, the directions are evenly spaced.
"""

import numpy as np
import torch

from minianyflow.interpolant import check_finite
from minianyflow.support.errors import InputError

ENOUGH = 2048  # samples below which a Frechet distance says little


def sobol_noise(count, shape, seed=0):
    """Standard normal noise (count, *shape) that fills space evenly: scrambled Sobol points, inverse normal."""
    size = torch.Size(shape).numel()
    points = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9)).float().reshape(count, *shape)


def directions(dimensions, count=128, seed=0):
    """Unit directions (count, dimensions): evenly spaced over the half circle in the plane, fixed random ones above."""
    if dimensions == 2:
        angle = torch.arange(count) * (torch.pi / count)
        return torch.stack([angle.cos(), angle.sin()], 1)
    random = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
    return random / random.norm(dim=1, keepdim=True)


def sliced_w2(a, b, count=128):
    """Sliced Wasserstein-2 distance of samples `a` from a reference `b` (n, *shape); a float in data units.

    Root of the mean, over directions, of the squared W2 distance between the two projections. `a` may pool K draws,
    (K n, *shape): their quantiles are averaged in groups of K. A sampler that draws fresh noise needs that, or its
    sampling noise (.011 to .022 on the spiral, where a map of even noises has .004) is taken for an error.
    """
    a, b = _flat(a), _flat(b)
    if a.shape[1] != b.shape[1] or len(a) % len(b):
        raise InputError(f"samples {tuple(a.shape)} and reference {tuple(b.shape)}; expected (K n, D) and (n, D)")
    along = directions(a.shape[1], count).to(a)
    of_a, of_b = (np.sort((along @ each.T).cpu().numpy()) for each in (a, b))  # several times faster than torch's sort
    return float(np.sqrt(np.square(of_a.reshape(count, len(b), -1).mean(2) - of_b).mean()))


def path_error(end, exact_end):
    """Mean distance between where samples ended and where the exact flow carries the same noises; in data units."""
    end, exact_end = _flat(end), _flat(exact_end)
    if end.shape != exact_end.shape:
        raise InputError(f"ends {tuple(end.shape)} and exact ends {tuple(exact_end.shape)}; expected the same shape")
    return float((end - exact_end).norm(dim=1).mean())


def frechet_distance(a, b, least=ENOUGH):
    """Frechet distance of the Gaussians fitted to samples a, b (n, *shape), n at least `least`; in squared data units.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017, equation 6).
    Small samples read too much, even between equal laws (blob latents, 320 numbers: data against data 2.2 at 2048, .6
    at 8192), and a floor that high hides differences: compare at one count, beside data against data. With fewer
    samples than numbers in each it is worked out from their products, whatever the size of a clip.
    """
    a, b = _many(a, least), _many(b, least)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"samples of {a.shape[1]} and {b.shape[1]} numbers each; expected the same: reshape one")
    mean_a, mean_b = a.mean(0), b.mean(0)
    if a.shape[1] > min(len(a), len(b)):  # with S = X'X the trace of (S_a S_b)^(1/2) is the sum of the singular values
        a, b = ((each - mean) / (len(each) - 1) ** 0.5 for each, mean in ((a, mean_a), (b, mean_b)))  # of X_a X_b'
        shared = torch.linalg.svdvals(a @ b.T).sum()
        return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * shared)
    cov_a, cov_b = (torch.cov(each.T).reshape(each.shape[1], -1) for each in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared)


def energy_distance(a, b):
    """2 E|A - B| - E|A - A'| - E|B - B'| (Szekely and Rizzo), over all pairs; zero only for equal laws."""
    a, b = _flat(a), _flat(b)
    within = [torch.cdist(s, s).sum() / (len(s) * (len(s) - 1)) for s in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])


def off_share(samples, mixture, rare=3.35e-4):
    """The share of samples that are off every component of the mixture.

    Off: farther away than all but the share `rare` of a component's own samples, which is 4 sigmas in the plane and
    more in more dimensions.
    """
    from scipy.special import gammainccinv

    radius = (2 * gammainccinv(mixture.means.shape[1] / 2, rare)) ** 0.5  # chi-square, D degrees of freedom
    distance = torch.cdist(samples.flatten(1), mixture.means)
    return float((distance > radius * mixture.sigma).all(1).float().mean())


def component_mass(samples, mixture):
    """The share of samples that belongs to each component (the most probable one): (K,), to set beside its weight."""
    nearest = mixture.posterior(samples, torch.zeros(len(samples))).argmax(1)
    return torch.bincount(nearest, minlength=len(mixture.means)) / len(samples)


def _flat(samples):
    if samples.ndim < 2 or len(samples) < 1:
        raise InputError(f"samples of shape {tuple(samples.shape)}; expected (n, *shape), n at least 1")
    check_finite("a set of samples", samples)
    return samples.flatten(1).float()


def _many(samples, least):
    if samples.ndim < 2 or len(samples) < max(least, 2):
        raise InputError(
            f"samples of shape {tuple(samples.shape)}; expected (n, *shape) with n at least {max(least, 2)}: "
            "small samples flatter it against its floor, draw more"
        )
    check_finite("a set of samples", samples)
    return samples.flatten(1).double().cpu()
