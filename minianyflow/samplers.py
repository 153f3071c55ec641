"""Samplers: ways to walk from noise (t = 1) to data (t = 0).

Each takes noise `z` (B, *shape) and falling `times` (N + 1,), and returns the whole trajectory (N + 1, B, *shape).
One evaluation of the network a step, except the exact ODE. Sampling takes no gradient.
"""

from itertools import pairwise

import torch

from minianyflow.flow_map import end_point, rollout
from minianyflow.interpolant import interpolate
from minianyflow.support.errors import InputError
from minianyflow.times import check_grid


@torch.no_grad()
def sample_flow_map(u, z, times, **condition):
    """Any-step sampling: z_t -> z_r by one jump of the flow map (AnyFlow, algorithm 1)."""
    return rollout(u, z, times, **condition)


@torch.no_grad()
def sample_euler(velocity, z, times, **condition):
    """Euler's method on dz/dt = velocity(z, t): a rollout that takes the tangent for the average velocity."""
    return rollout(lambda z, t, r, **c: velocity(z, t, **c), z, times, **condition)


@torch.no_grad()
def sample_consistency(u, z, times, generator=None, **condition):
    """Multistep consistency sampling (Consistency Models, algorithm 1): jump to the end, add fresh noise, repeat."""
    check_grid(times, columns=False)
    trajectory = [z]
    for t, r in pairwise(times.to(z.device)):
        x = end_point(u, trajectory[-1], t.expand(len(z)), **condition)
        if r > 0:
            where = generator.device if generator else z.device
            eps = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=where).to(z.device)
            x = interpolate(x, eps, r.expand(len(z)))
        trajectory.append(x)
    return torch.stack(trajectory)


@torch.no_grad()
def sample_consistency_deterministic(u, z, times, **condition):
    """A consistency map used as if it were a flow map: part of the way along the line to its end point.

    Wrong even when the map is exact, and more so with more steps: `u(z, t, 0)` is the average velocity of the whole
    journey to 0, not of the part from t to r.
    """
    return rollout(lambda z, t, r, **c: u(z, t, torch.zeros_like(r), **c), z, times, **condition)


@torch.no_grad()
def sample_ode(velocity, z, times, method="dopri5", rtol=1e-5, atol=1e-5, **condition):
    """dz/dt = velocity(z, t) by any torchdiffeq solver; the state at each of `times`."""
    from torchdiffeq import odeint  # loads a good part of scipy

    check_grid(times, columns=False)
    if bool((times[1:] == times[:-1]).any()):
        raise InputError("a time grid with two equal times; expected falling ones for an ODE solver")
    return odeint(
        lambda t, z: velocity(z, t.expand(len(z)).to(z.dtype), **condition),
        z,
        times.to(z),
        method=method,
        rtol=rtol,
        atol=atol,
    )
