"""Samplers: ways to go from noise (t = 1) to data (t = 0).

Each takes noise `z` (B, *shape) and falling `times` (N + 1,), and returns the whole trajectory (N + 1, B, *shape).
Each costs one evaluation of the network per step, except the ODE solver. Sampling takes no gradient.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from minianyflow.flow_map import end_point, rollout
from minianyflow.interpolant import interpolate
from minianyflow.notation import Condition, Grid, Network, State, Trajectory, Velocity
from minianyflow.support.checks import check_grid
from minianyflow.support.errors import InputError


@torch.no_grad()
def sample_flow_map(u: Network, z: State, times: Grid, **condition: Condition) -> Trajectory:
    """Any-step sampling: z_t -> z_r by one jump of the flow map (AnyFlow, algorithm 1)."""
    return rollout(u, z, times, **condition)


@torch.no_grad()
def sample_euler(velocity: Velocity, z: State, times: Grid, **condition: Condition) -> Trajectory:
    """Euler's method on dz/dt = velocity(z, t): a rollout with the velocity in place of the average velocity."""
    return rollout(lambda z, t, r, **c: velocity(z, t, **c), z, times, **condition)


@torch.no_grad()
def sample_consistency(
    u: Network,
    z: State,
    times: Grid,
    generator: torch.Generator | None = None,
    fresh: Callable[[State], State] | None = None,
    **condition: Condition,
) -> Trajectory:
    """Multistep consistency sampling (Consistency Models, algorithm 1): jump to the end, add fresh noise, repeat.

    fresh(x): the noise for the ends x (B, *shape) of a jump, in place of independent ones.
    """
    check_grid(times, columns=False)
    trajectory = [z]
    for t, r in pairwise(times.to(z.device)):
        x = end_point(u, trajectory[-1], t.expand(len(z)), **condition)
        if r > 0:
            where = generator.device if generator else z.device
            eps = fresh(x) if fresh else torch.randn(z.shape, generator=generator, dtype=z.dtype, device=where)
            x = interpolate(x, eps.to(z.device), r.expand(len(z)))
        trajectory.append(x)
    return torch.stack(trajectory)


@torch.no_grad()
def sample_consistency_deterministic(u: Network, z: State, times: Grid, **condition: Condition) -> Trajectory:
    """A consistency map used as if it were a flow map: each step goes along the line to its end point.

    This is wrong even when the map is exact, and more so with more steps: `u(z, t, 0)` is the average velocity of the
    whole way to 0, not of the part from t to r.
    """
    return rollout(lambda z, t, r, **c: u(z, t, torch.zeros_like(r), **c), z, times, **condition)


@torch.no_grad()
def sample_ode(
    velocity: Velocity, z: State, times: Grid, method: str = "dopri5", tolerance: float = 1e-5, **condition: Condition
) -> Trajectory:
    """Solve dz/dt = velocity(z, t) by any solver of torchdiffeq; returns the state at each of `times`."""
    from torchdiffeq import odeint  # imports much of scipy

    check_grid(times, columns=False)
    if z.dtype not in (torch.float32, torch.float64):
        raise InputError(f"a state of {z.dtype}; expected float32 or float64 for an ODE solver: z.float()")
    if bool((times[1:] == times[:-1]).any()):
        raise InputError("a time grid with two equal times; expected falling ones for an ODE solver")

    def slope(t, z):
        return velocity(z, t.expand(len(z)).to(z.dtype), **condition)

    return odeint(slope, z, times.to(z), method=method, rtol=tolerance, atol=tolerance)
