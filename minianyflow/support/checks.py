"""What a state, times and a time grid must be: checks at the boundary of public functions, one line per complaint."""

from torch import Tensor

from minianyflow.support.errors import InputError


def check_same_shape(name: str, value: Tensor, z: Tensor) -> None:
    """Raise InputError unless `value` has the shape of the state `z`: torch would broadcast it silently."""
    if value.shape != z.shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected that of the state, {tuple(z.shape)}")


def check_times(t: Tensor, r: Tensor) -> None:
    """Raise InputError unless 0 <= r <= t <= 1 everywhere (NaN fails too)."""
    if not (isinstance(t, Tensor) and isinstance(r, Tensor)):
        raise InputError(f"times {t!r} and {r!r}; expected tensors, one time per sample: use torch.full((len(z),), t)")
    if t.shape != r.shape:
        raise InputError(f"t has shape {tuple(t.shape)}, r has {tuple(r.shape)}; expected the same shape")
    if not bool(((r >= 0) & (t <= 1)).all()):
        run = f"times run from {float(r.min()):.4g} to {float(t.max()):.4g}"
        raise InputError(f"{run}; expected times in [0, 1] (1 is noise, 0 is data)")
    if not bool((r <= t).all()):
        raise InputError("found r > t; a jump goes from t down to r <= t (1 is noise, 0 is data): swap them")


def check_finite(name: str, value: Tensor, todo: str = "look for a division by zero") -> None:
    """Raise InputError, which says what is to do, if the tensor `value` has NaN or infinite entries."""
    if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):  # a sum is ten times quicker
        raise InputError(f"{name} holds NaN or infinite values; expected finite numbers: {todo}")


def check_grid(times: Tensor, columns: bool = True) -> None:
    """Raise InputError unless `times` (N + 1,), or (N + 1, B) if `columns`, never rises, is in [0, 1], and N >= 1."""
    if not isinstance(times, Tensor):
        raise InputError(f"times {times!r}; expected a tensor (steps + 1,), as time_grid(steps) makes")
    if times.ndim not in ((1, 2) if columns else (1,)) or len(times) < 2:
        raise InputError(f"a time grid of shape {tuple(times.shape)}; expected (steps + 1,), as time_grid(steps) makes")
    if not bool(((times >= 0) & (times <= 1)).all() and (times[1:] <= times[:-1]).all()):
        raise InputError("a time grid must fall from noise (1) towards data (0) inside [0, 1]; use time_grid(steps)")
