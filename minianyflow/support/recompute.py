"""A part of a rollout that is run again in the backward, so that its inside need not be kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable, *arguments: Any, **condition: Any) -> Any:
    """function(*arguments, **condition), of which autograd keeps the arguments alone: the backward runs it again."""
    if not torch.is_grad_enabled():
        return function(*arguments, **condition)
    unit = next(_UNITS)
    options = {"use_reentrant": False, "preserve_rng_state": False}  # no network draws random numbers
    options["context_fn"] = lambda: (_running(unit, False), _running(unit, True))
    return checkpoint(function, *arguments, **options, **condition)


def current_unit() -> tuple[int | None, bool]:
    """The number of the call of `recompute` that runs now, if one does; and whether it is a backward that runs it."""
    return _RUNNING.get()


@contextmanager
def _running(unit: int, again: bool) -> Iterator[None]:
    token = _RUNNING.set((unit, again))
    try:
        yield
    finally:
        _RUNNING.reset(token)


_RUNNING, _UNITS = ContextVar("unit", default=(None, False)), count()
