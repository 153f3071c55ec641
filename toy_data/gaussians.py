"""One-dimensional Gaussians, whose flow maps are formulas, with guidance too: exact truth for objectives."""

import numpy as np
import torch


def _column(t, z):
    """Times (B,) or (1,) in a shape that multiplies states (B, *shape) row by row."""
    return t.reshape(-1, *[1] * (z.ndim - 1))


class Gaussian:
    """Data N(mean, sigma^2) on the line; states z (B, *shape) of more numbers have them independent. t and r (B,)."""

    def __init__(self, mean, sigma):
        self.mean, self.sigma = mean, sigma

    def spread(self, t):
        """Standard deviation of z_t: sqrt((1-t)^2 sigma^2 + t^2)."""
        return ((1 - t) ** 2 * self.sigma**2 + t**2).sqrt()

    def slope(self, t):
        """The velocity is affine in z; this is its slope, d/dt log spread(t)."""
        return (t - (1 - t) * self.sigma**2) / self.spread(t) ** 2

    def velocity(self, z, t):
        """slope (z - (1-t) mean) - mean."""
        t = _column(t, z)
        return self.slope(t) * (z - (1 - t) * self.mean) - self.mean

    def flow(self, z, t, r):
        """Phi(z; t -> r) = (1-r) mean + spread(r) / spread(t) (z - (1-t) mean)."""
        t, r = _column(t, z), _column(r, z)
        return (1 - r) * self.mean + self.spread(r) / self.spread(t) * (z - (1 - t) * self.mean)

    def average_velocity(self, z, t, r):
        """The exact u(z, t, r), free of cancellation near r = t, so that it can be differentiated."""
        t, r = _column(t, z), _column(r, z)
        early, late = self.spread(r), self.spread(t)
        # (spread(t) - spread(r)) / (t - r), from the difference of the squares
        change = ((1 + self.sigma**2) * (t + r) - 2 * self.sigma**2) / (early + late)
        return change / late * (z - (1 - t) * self.mean) - self.mean


class GuidedGaussian:
    """The ODE of velocity v_null + g (v - v_null): affine in z, so its flow map is a factor and an offset.

    factor(t -> r) = (spread ratio of `conditional`)^g (that of `unconditional`)^(1-g); the offset is one smooth
    integral, by Gauss-Legendre quadrature to rounding. Float64 throughout.
    """

    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(48))

    def __init__(self, conditional, unconditional, scale):
        self.conditional, self.unconditional, self.scale = conditional, unconditional, scale

    def velocity(self, z, t):
        """v_null + g (v - v_null): (B, 1)."""
        v_null = self.unconditional.velocity(z, t)
        return v_null + self.scale * (self.conditional.velocity(z, t) - v_null)

    def flow(self, z, t, r):
        """Phi(z; t -> r) of the guided ODE: (B, 1)."""
        t, r = t.double()[:, None], r.double()[:, None]
        half = (t - r) / 2
        times = r + half * (1 + self.nodes)  # (B, nodes)
        offsets = self.velocity(torch.zeros_like(times).reshape(-1, 1), times.flatten()).reshape(times.shape)
        pushed = (self._factor(times, r) * offsets * self.weights).sum(1, keepdim=True) * half
        return self._factor(t, r) * z - pushed

    def average_velocity(self, z, t, r):
        """The exact guided u(z, t, r); v on the diagonal: (B, 1)."""
        gap = (t - r)[:, None]
        mean = (z - self.flow(z, t, r)) / torch.where(gap == 0, 1.0, gap)
        return torch.where(gap == 0, self.velocity(z, t), mean)

    def _factor(self, t, r):
        ratio = self.conditional.spread(r) / self.conditional.spread(t)
        ratio_null = self.unconditional.spread(r) / self.unconditional.spread(t)
        return ratio**self.scale * ratio_null ** (1 - self.scale)
