"""Exact truth: Gaussian mixtures, whose density, score and velocity are formulas and whose flow is known to 1e-7.

A mixture of K isotropic Gaussians N(mean_k, sigma_k^2) with weights pi_k, in any number of dimensions D. The law of
z_t is again a mixture, of N((1-t) mean_k, s_k^2) with s_k^2 = (1-t)^2 sigma_k^2 + t^2.
For a conditional law, in which each row has weights of its own, pass `log_weights` (B, K).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minianyflow.interpolant import broadcast_time
from minianyflow.notation import Samples, State, Times
from minianyflow.support.checks import check_finite, check_times
from minianyflow.support.errors import InputError

LogWeights = Float[Tensor, "batch components"] | None
Numbers = Tensor | Sequence


class GaussianMixture:
    """means (K, *shape); sigma: a number, or one per component (K,); weights (K,), equal if None."""

    def __init__(self, means: Numbers, sigma: float | Numbers, weights: Numbers | None = None):
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
            found = f"{len(means)} means, {len(self.sigma)} sigmas, {len(weights)} weights"
            raise InputError(f"{found}; expected one per component")
        if bool((self.sigma <= 0).any()) or bool((weights < 0).any()) or not bool(weights.sum() > 0):
            raise InputError("a mixture needs positive sigma and weights that are not negative and not all zero")
        self.weights = (weights / weights.sum()).to(means.dtype)  # (K,)

    def to(self, target: torch.device | torch.dtype | str) -> "GaussianMixture":
        """The same mixture on another device or in another dtype."""
        parts = [value.to(target) for value in (self.means, self.sigma, self.weights)]
        return GaussianMixture(parts[0].reshape(-1, *self.shape), *parts[1:])

    def _components(self, z, t, log_weights):
        """log pi_k N(z; (1-t) mean_k, s_k^2) as (B, K), with s_k^2 as (B, 1 or K) and 1 - t as (B, 1)."""
        if z.shape[1:] != self.shape or t.shape != z.shape[:1]:
            wanted = f"expected {(len(z), *self.shape)} and ({len(z)},)"
            raise InputError(f"a state {tuple(z.shape)} and times {tuple(t.shape)}; {wanted}")
        z, t = z.flatten(1), t[:, None]
        keep = 1 - t  # (B, 1)
        variance = (keep * self.sigma) ** 2 + t**2  # (B, 1) or (B, K)
        distance = (z**2).sum(1, keepdim=True) - 2 * keep * (z @ self.means.T) + keep**2 * (self.means**2).sum(1)
        log_norm = 0.5 * z.shape[1] * torch.log(2 * torch.pi * variance)
        log_weights = self.weights.log() if log_weights is None else log_weights
        return log_weights - 0.5 * distance / variance - log_norm, variance, keep

    def log_density(self, z: State, t: Times, log_weights: LogWeights = None) -> Float[Tensor, " batch"]:
        """log p_t(z)."""
        return torch.logsumexp(self._components(z, t, log_weights)[0], 1)

    def posterior(self, z: State, t: Times, log_weights: LogWeights = None) -> Float[Tensor, "batch components"]:
        """The probability that z at time t came from component k."""
        return self._components(z, t, log_weights)[0].softmax(1)

    def velocity(self, z: State, t: Times, log_weights: LogWeights = None) -> State:
        """v(z, t) = E[eps - x | z_t = z], exact at all t in [0, 1]."""
        log_parts, variance, keep = self._components(z, t, log_weights)
        posterior = log_parts.softmax(1)  # (B, K)
        slope = (t[:, None] - keep * self.sigma**2) / variance  # (B, 1 or K): cov(eps - x, z) / var(z)
        towards = (posterior * (keep * slope + 1)) @ self.means  # (B, D)
        away = (posterior * slope).sum(1, keepdim=True) * z.flatten(1)  # (B, D)
        return (away - towards).reshape(z.shape)

    def score(self, z: State, t: Times, log_weights: LogWeights = None) -> State:
        """grad_z log p_t(z)."""
        log_parts, variance, keep = self._components(z, t, log_weights)
        posterior = log_parts.softmax(1) / variance  # (B, K)
        return (keep * (posterior @ self.means) - posterior.sum(1, keepdim=True) * z.flatten(1)).reshape(z.shape)

    @torch.no_grad()
    def flow(self, z: State, t: Times, r: Times, log_weights: LogWeights = None, tolerance: float = 1e-10) -> State:
        """Phi(z; t -> r): the ODE solved in float64, right to 1e-7. Each row has its own t and r.

        Raises InputError for times outside 0 <= r <= t <= 1 and for states that are not finite.
        """
        check_times(t, r)
        check_finite("the state", z)
        exact, start, stop = self.to(torch.float64), t.double(), r.double()
        log_weights = None if log_weights is None else log_weights.double()
        length = broadcast_time(stop - start, z)

        from torchdiffeq import odeint  # imports much of scipy

        def velocity(fraction, state):  # fraction of the way from t to r
            return length * exact.velocity(state, start + fraction * (stop - start), log_weights)

        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=z.device)
        worst = {"norm": lambda error: error.abs().max()}  # of all rows, not their mean
        end = odeint(velocity, z.double(), ends, method="dopri8", rtol=tolerance, atol=tolerance, options=worst)[-1]
        return end.to(z.dtype)

    def average_velocity(
        self, z: State, t: Times, r: Times, log_weights: LogWeights = None, tolerance: float = 1e-10
    ) -> State:
        """The exact `u(z, t, r)`, in place of a network: (z - Phi(z; t -> r)) / (t - r), and v where r = t."""
        u = self.velocity(z, t, log_weights)
        rows = (t > r).nonzero().squeeze(1)
        if len(rows):
            start, t, r = z[rows].double(), t[rows].double(), r[rows].double()
            log_weights = None if log_weights is None else log_weights[rows]
            end = self.flow(start, t, r, log_weights, tolerance)
            u[rows] = ((start - end) / broadcast_time(t - r, start)).to(z.dtype)
        return u

    def sample(self, count: int, generator: torch.Generator | None = None) -> Samples:
        """`count` independent samples."""
        return self._around(torch.multinomial(self.weights, count, replacement=True, generator=generator), generator)

    def sample_stratified(self, count: int, generator: torch.Generator | None = None) -> Samples:
        """`count` samples in order of component; each component has its exact share, rounded at random."""
        edges = self.weights.double().cumsum(0)
        places = (torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)) / count
        return self._around(torch.searchsorted(edges, places).clamp(max=len(edges) - 1), generator)

    def _around(self, component, generator):
        eps = torch.randn(len(component), self.means.shape[1], generator=generator, dtype=self.means.dtype)
        sigma = self.sigma.expand(len(self.means))[component, None]
        return (self.means[component] + sigma * eps).reshape(-1, *self.shape)
