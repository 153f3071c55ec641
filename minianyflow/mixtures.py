"""Exact truth: Gaussian mixtures, whose density, score and velocity are formulas and whose flow is known to 1e-7.

A mixture of K isotropic Gaussians N(mean_k, sigma_k^2) with weights pi_k, in any number of dimensions. Seen through
the interpolant, z_t is again a mixture: N((1-t) mean_k, s_k^2) with s_k^2 = (1-t)^2 sigma_k^2 + t^2.
Where every row has weights of its own (a conditional law: given the frames so far, say), pass `log_weights` (B, K).
"""

import torch

from minianyflow.interpolant import broadcast_time, check_finite, check_times
from minianyflow.support.errors import InputError


class GaussianMixture:
    """means (K, *shape); sigma and weights: a number, or one each component (K,)."""

    def __init__(self, means, sigma, weights=None):
        means = torch.as_tensor(means)
        if means.ndim < 2 or len(means) == 0:
            raise InputError(f"means of shape {tuple(means.shape)}; a mixture needs (components, *shape), one at least")
        self.shape = means.shape[1:]
        self.means = means.flatten(1)  # (K, D)
        self.sigma = torch.as_tensor(sigma, dtype=means.dtype).reshape(-1)  # (1,) or (K,)
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        for name, value in [("means", means), ("sigma", self.sigma), ("weights", weights)]:
            check_finite(name, value)
        if len(weights) != len(means) or len(self.sigma) not in (1, len(means)):
            raise InputError(f"{len(means)} means, {len(self.sigma)} sigmas, {len(weights)} weights; expected one each")
        if bool((self.sigma <= 0).any()) or bool((weights < 0).any()) or not bool(weights.sum() > 0):
            raise InputError("a mixture needs positive sigma and weights that are not negative and not all zero")
        self.weights = (weights / weights.sum()).to(means.dtype)  # (K,)

    def to(self, *args, **kwargs):
        """The same mixture on another device or in another dtype."""
        parts = [value.to(*args, **kwargs) for value in (self.means, self.sigma, self.weights)]
        return GaussianMixture(parts[0].reshape(-1, *self.shape), *parts[1:])

    def _components(self, z, t, log_weights):
        """log pi_k N(z; (1-t) mean_k, s_k^2) as (B, K), with s_k^2 as (B, 1 or K) and 1 - t as (B, 1)."""
        if z.shape[1:] != self.shape or t.shape != z.shape[:1]:
            raise InputError(
                f"state {tuple(z.shape)} and time {tuple(t.shape)}; this mixture expects (B, "
                f"{', '.join(map(str, self.shape))}) and (B,)"
            )
        z, t = z.flatten(1), t[:, None]
        keep = 1 - t  # (B, 1)
        variance = (keep * self.sigma) ** 2 + t**2  # (B, 1) or (B, K)
        distance = (z**2).sum(1, keepdim=True) - 2 * keep * (z @ self.means.T) + keep**2 * (self.means**2).sum(1)
        log_norm = 0.5 * z.shape[1] * torch.log(2 * torch.pi * variance)
        log_weights = self.weights.log() if log_weights is None else log_weights
        return log_weights - 0.5 * distance / variance - log_norm, variance, keep

    def log_density(self, z, t, log_weights=None):
        """log p_t(z): (B,)."""
        return torch.logsumexp(self._components(z, t, log_weights)[0], 1)

    def posterior(self, z, t, log_weights=None):
        """The probability that z at time t came from component k: (B, K)."""
        return self._components(z, t, log_weights)[0].softmax(1)

    def velocity(self, z, t, log_weights=None):
        """v(z, t) = E[eps - x | z_t = z], exact at every t in [0, 1]: (B, *shape)."""
        log_parts, variance, keep = self._components(z, t, log_weights)
        posterior = log_parts.softmax(1)  # (B, K)
        slope = (t[:, None] - keep * self.sigma**2) / variance  # (B, 1 or K): cov(eps - x, z) / var(z)
        towards = (posterior * (keep * slope + 1)) @ self.means  # (B, D)
        away = (posterior * slope).sum(1, keepdim=True) * z.flatten(1)  # (B, D)
        return (away - towards).reshape(z.shape)

    def score(self, z, t, log_weights=None):
        """grad_z log p_t(z): (B, *shape)."""
        log_parts, variance, keep = self._components(z, t, log_weights)
        posterior = log_parts.softmax(1) / variance  # (B, K)
        return (keep * (posterior @ self.means) - posterior.sum(1, keepdim=True) * z.flatten(1)).reshape(z.shape)

    @torch.no_grad()
    def flow(self, z, t, r, log_weights=None, tolerance=1e-10):
        """Phi(z; t -> r), every row with its own t and r: the ODE solved in float64, good to 1e-7; (B, *shape)."""
        check_times(t, r)
        check_finite("the state", z)
        exact, start, stop = self.to(torch.float64), t.double(), r.double()
        log_weights = None if log_weights is None else log_weights.double()
        length = broadcast_time(stop - start, z)

        from torchdiffeq import odeint  # loads a good part of scipy

        def velocity(fraction, state):  # fraction of the way from t to r
            return length * exact.velocity(state, start + fraction * (stop - start), log_weights)

        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=z.device)
        worst = {"norm": lambda error: error.abs().max()}  # every row, not their mean
        end = odeint(velocity, z.double(), ends, method="dopri8", rtol=tolerance, atol=tolerance, options=worst)[-1]
        return end.to(z.dtype)

    def average_velocity(self, z, t, r, log_weights=None, tolerance=1e-10):
        """The exact `u(z, t, r)`, usable wherever a network is: (z - Phi(z; t -> r)) / (t - r), and v where r = t."""
        u = self.velocity(z, t, log_weights)
        rows = (t > r).nonzero().squeeze(1)
        if len(rows):
            start, t, r = z[rows].double(), t[rows].double(), r[rows].double()
            log_weights = None if log_weights is None else log_weights[rows]
            end = self.flow(start, t, r, log_weights, tolerance)
            u[rows] = ((start - end) / broadcast_time(t - r, start)).to(z.dtype)
        return u

    def sample(self, count, generator=None):
        """`count` independent samples: (count, *shape)."""
        return self._around(torch.multinomial(self.weights, count, replacement=True, generator=generator), generator)

    def sample_stratified(self, count, generator=None):
        """`count` samples, in order of component, each with its exact share (rounded at random): quieter."""
        edges = self.weights.double().cumsum(0)
        places = (torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)) / count
        return self._around(torch.searchsorted(edges, places).clamp(max=len(edges) - 1), generator)

    def _around(self, component, generator):
        eps = torch.randn(len(component), self.means.shape[1], generator=generator, dtype=self.means.dtype)
        sigma = self.sigma.expand(len(self.means))[component, None]
        return (self.means[component] + sigma * eps).reshape(-1, *self.shape)
