"""Where to step: time grids and the time shift. t = 1 is noise, t = 0 is data."""

import torch

from minianyflow.support.errors import InputError


def time_shift(s, shift=1.0):
    """Move times towards the noise: s -> shift s / (1 + (shift - 1) s). AnyFlow uses 5 for Wan2.1; 1 is no shift."""
    if not shift > 0:
        raise InputError(f"time shift {shift} is not positive; use 1 for none, 5 for Wan2.1")
    return shift * s / (1 + (shift - 1) * s)


def time_grid(steps, shift=1.0, device=None):
    """The times of a sampler that takes `steps` steps: (steps + 1,), from 1 down to 0, float32."""
    if int(steps) != steps or steps < 1:
        raise InputError(f"{steps} steps asked for; a sampler takes a whole number of steps, at least 1")
    return time_shift(torch.linspace(1, 0, int(steps) + 1, device=device), shift).clamp(max=1)  # a shift may round up


def check_grid(times, columns=True):
    """Raise InputError unless `times` (N + 1,), or (N + 1, B) if `columns`, falls (or rests) inside [0, 1], N >= 1."""
    if not isinstance(times, torch.Tensor):
        raise InputError(f"times {times!r}; expected a tensor (steps + 1,), as time_grid(steps) makes")
    if times.ndim not in ((1, 2) if columns else (1,)) or len(times) < 2:
        raise InputError(f"a time grid of shape {tuple(times.shape)}; expected (steps + 1,), as time_grid(steps) makes")
    if not bool(((times >= 0) & (times <= 1)).all() and (times[1:] <= times[:-1]).all()):
        raise InputError("a time grid must fall from noise (1) towards data (0) inside [0, 1]; use time_grid(steps)")
