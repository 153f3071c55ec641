"""How far samples are from the truth. Deterministic at a given seed, in data units, quoted beside a floor.

The measure decides what can be seen: with a few thousand random samples sliced W2 is mostly sampling noise. So the
noises are scrambled Sobol points, the reference is stratified over components, the directions are evenly spaced.
"""

import numpy as np
import torch

from minianyflow.interpolant import check_finite
from minianyflow.support.errors import InputError


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
