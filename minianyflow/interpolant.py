"""The straight line between data and noise, and the direction of time.

**t = 1 is noise, t = 0 is data**, here and everywhere (as in Wan, diffusers and AnyFlow).

Shapes, here and in every module:
    B  samples        F  frames        *shape  the shape of one sample, whatever it is
    x, eps, z, v, u   (B, *shape)      data, noise, state, velocity, average velocity
    t, r              (B,); r <= t, both in [0, 1]. A time for every frame, (B, F), is taken here, and by a jump
"""

import torch

from minianyflow.support.errors import InputError


def broadcast_time(t, z):
    """View times `t` (B,) or (B, F) so that they multiply `z` (B, *shape) row by row (frame by frame)."""
    if t.ndim > z.ndim or t.shape != z.shape[: t.ndim]:
        raise InputError(
            f"times of shape {tuple(t.shape)} do not fit a state of shape {tuple(z.shape)}; "
            f"expected ({z.shape[0]},), one time a sample, or one a frame: use torch.full((len(z),), t)"
        )
    return t.reshape(t.shape + (1,) * (z.ndim - t.ndim))


def check_same_shape(name, value, z):
    """Raise InputError unless `value` has the shape of the state `z`: torch would broadcast it without a word."""
    if value.shape != z.shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected that of the state, {tuple(z.shape)}")


def check_times(t, r):
    """Raise InputError unless 0 <= r <= t <= 1 everywhere (NaN fails too)."""
    if not (isinstance(t, torch.Tensor) and isinstance(r, torch.Tensor)):
        raise InputError(f"times {t!r} and {r!r}; expected tensors, one time a sample: use torch.full((len(z),), t)")
    if t.shape != r.shape:
        raise InputError(f"t has shape {tuple(t.shape)}, r has {tuple(r.shape)}; expected the same shape")
    if not bool(((r >= 0) & (t <= 1)).all()):
        raise InputError(
            f"times run from {float(r.min()):.4g} to {float(t.max()):.4g}; expected times in [0, 1] "
            "(1 is noise, 0 is data)"
        )
    if not bool((r <= t).all()):
        raise InputError("found r > t; a jump goes from t down to r <= t (1 is noise, 0 is data): swap them")


def interpolate(x, eps, t):
    """z_t = (1 - t) x + t eps: data at t = 0, noise at t = 1. All (B, *shape), t (B,) or (B, F)."""
    check_same_shape("the noise", eps, x)
    t = broadcast_time(t, x)
    return (1 - t) * x + t * eps


def data_velocity(x, eps):
    """d z_t / dt along one line, eps - x: right on average, noisy for each sample."""
    return eps - x


def clean_from_velocity(v, z, t):
    """E[x | z_t = z] = z - t v: where the tangent at (z, t) points at time 0."""
    return z - broadcast_time(t, z) * v


def score_from_velocity(v, z, t):
    """grad log p_t(z) = -(z + (1 - t) v) / t, for t > 0; (B, *shape)."""
    t = broadcast_time(t, z)
    return -(z + (1 - t) * v) / t


def check_finite(name, value):
    """Raise InputError if the tensor `value` holds NaN or infinity."""
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"{name} holds NaN or infinite values; expected finite numbers: look for a division by zero")
