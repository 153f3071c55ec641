"""Flow maps: what can be done with one function `u(z, t, r, **condition)`.

The probability-flow ODE dz/dt = v(z, t) carries a state z at time t to Phi(z; t -> r) at time r <= t.
`u` is the average velocity on the way:  Phi(z; t -> r) = z - (t - r) u(z, t, r)  (AnyFlow, section 3).
A small MLP on the plane is such a `u`, and so is a Wan2.1 transformer. Letters and types: notation.py.
"""

from functools import partial
from itertools import pairwise

import torch
from torch.utils._pytree import tree_map

from minianyflow.interpolant import broadcast_time
from minianyflow.notation import Condition, FrameTimes, Grid, Network, Rows, State, Trajectory
from minianyflow.support.checks import check_grid, check_same_shape, check_times
from minianyflow.support.errors import InputError
from minianyflow.support.recompute import recompute


def displace(z: State, u: State, t: FrameTimes, r: FrameTimes) -> State:
    """Follow the average velocity `u` (a tensor) from t to r: z - (t - r) u, in the dtype of z."""
    check_same_shape("the average velocity", u, z)
    return (z - broadcast_time(t - r, z) * u).to(z.dtype)


def velocity(u: Network, z: State, t: FrameTimes, **condition: Condition) -> State:
    """The diagonal of the map: u(z, t, t) is the velocity v(z, t) of the ODE."""
    return u(z, t, t, **condition)


def tangent(u: Network) -> Network:
    """`u` with its velocity in place of the average velocity: a rollout of it is Euler's method."""
    return lambda z, t, r, **condition: u(z, t, t, **condition)


def jump(u: Network, z: State, t: FrameTimes, r: FrameTimes, **condition: Condition) -> State:
    """Phi(z; t -> r), one evaluation. Raises InputError for r > t or times outside [0, 1]."""
    check_times(t, r)
    return displace(z, u(z, t, r, **condition), t, r)


def end_point(u: Network, z: State, t: FrameTimes, **condition: Condition) -> State:
    """The consistency map f(z, t) = Phi(z; t -> 0): the bottom edge of the triangle of times."""
    return jump(u, z, t, torch.zeros_like(t), **condition)


def rollout(u: Network, z: State, times: Grid, recomputed: bool = False, **condition: Condition) -> Trajectory:
    """Jump along `times` and return the whole trajectory.

    times: falling, (N + 1,) for all samples, or (N + 1, B), one column per sample. A jump of length zero is not
    evaluated, so its rows cost nothing. Returns (N + 1, B, *shape): the state at each time, `z` itself first.
    Gradients flow through all jumps; wrap in torch.no_grad() to sample. recomputed: of each jump but the last only the
    state is kept, see `recompute`. Raises InputError for a grid that rises, or columns that are not one per sample.
    """
    check_grid(times)
    times = times.to(z.device)
    if times.ndim == 1:
        times = times[:, None].expand(-1, len(z))
    if times.shape[1] != len(z):
        raise InputError(f"times {tuple(times.shape)} for {len(z)} states; expected a column per state")
    trajectory, jumps = [z], (times[:-1] > times[1:]).any(1)
    for index, (t, r) in enumerate(pairwise(times)):
        z, rows = trajectory[-1], (t > r).nonzero().squeeze(1)
        average = partial(recompute, u) if recomputed and bool(jumps[index + 1 :].any()) else u
        if len(rows) == len(z):
            z = displace(z, average(z, t, r, **condition), t, r)
        elif len(rows):
            u_rows = average(z[rows], t[rows], r[rows], **pick_rows(condition, rows))
            z = z.index_copy(0, rows, displace(z[rows], u_rows, t[rows], r[rows]))
        trajectory.append(z)
    return torch.stack(trajectory)


def pick_rows(condition: dict[str, Condition], rows: Rows) -> dict[str, Condition]:
    """Some rows of a condition, or of a whole batch."""
    return tree_map(lambda value: value[rows], condition)
