"""The straight line between data and noise. Letters and types: notation.py."""

from torch import Tensor

from minianyflow.notation import FrameTimes, State
from minianyflow.support.checks import check_same_shape
from minianyflow.support.errors import InputError


def broadcast_time(t: Tensor, z: Tensor) -> Tensor:
    """View times `t` so that they multiply `z` row by row (frame by frame).

    Raises InputError if they do not fit, and for a state that is no floating point.
    """
    if not z.is_floating_point():
        raise InputError(f"a state of {z.dtype}; expected floating point: z.float()")
    if t.ndim > z.ndim or t.shape != z.shape[: t.ndim]:
        wanted = f"expected ({len(z)},), one time per sample, or one per frame: use torch.full((len(z),), t)"
        raise InputError(f"times of shape {tuple(t.shape)} do not fit a state of shape {tuple(z.shape)}; {wanted}")
    return t.reshape(t.shape + (1,) * (z.ndim - t.ndim))


def interpolate(x: State, eps: State, t: FrameTimes) -> State:
    """z_t = (1 - t) x + t eps: data at t = 0, noise at t = 1; in the dtype of x, as all below in that of the state."""
    check_same_shape("the noise", eps, x)
    t = broadcast_time(t, x)
    return ((1 - t) * x + t * eps).to(x.dtype)


def data_velocity(x: State, eps: State) -> State:
    """d z_t / dt along one line, eps - x: right on average, noisy for a single sample."""
    return eps - x


def clean_from_velocity(v: State, z: State, t: FrameTimes) -> State:
    """E[x | z_t = z] = z - t v: where the tangent at (z, t) points at time 0."""
    return (z - broadcast_time(t, z) * v).to(z.dtype)


def score_from_velocity(v: State, z: State, t: FrameTimes) -> State:
    """grad log p_t(z) = -(z + (1 - t) v) / t, for t > 0."""
    t = broadcast_time(t, z)
    return (-(z + (1 - t) * v) / t).to(z.dtype)
