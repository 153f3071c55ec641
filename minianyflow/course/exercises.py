"""Exercises: the check that shows a student's answer beside the expected one. docs/course.py writes their files."""

import base64
import json
from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import torch

torch.set_num_threads(1)  # fastest for small networks and solves
_solved = {}  # {exercise: whether it is solved}; an exercise that is checked again counts once


def check(
    exercise: str, yours: Callable, expected, hint: str, tolerance: float = 1e-4, rows: Sequence[str] = ()
) -> bool:
    """Compare `yours()` with `expected`: print both side by side, of arrays the rows that differ, and the hint.

    yours: a function without arguments, so that an error in it can be explained. expected: a number, a text, a list or
    a tensor; it is shown once there is an answer. tolerance: relative to the largest expected number. rows: what the
    axes of the answer count, all but the last, e.g. ("time", "noise"). Returns whether it is solved; `finish` counts.
    """
    solved, value, problem = _judge(yours, expected, tolerance)
    print(f"{exercise}: {'solved' if solved else problem}")
    table = [] if value is None else _table(value, expected, tolerance, rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print(("    " + "   ".join(map(str.ljust, line, widths))).rstrip())
    if not solved:
        print(f"    hint: {hint}")
    _solved[exercise] = solved
    return solved


def sealed(text: str):
    """An expected answer, JSON in base64: whoever opens the file to solve it does not read it first."""
    return json.loads(base64.b64decode(text))


def finish() -> None:
    """The last line of an exercise file: prints how many are solved; exit status 1 unless all are."""
    print(f"\n{sum(_solved.values())} of {len(_solved)} solved")
    if not all(_solved.values()):
        raise SystemExit(1)


def _numbers(value):
    """A value as an array of floats, or None if it does not consist of numbers."""
    try:
        return np.asarray(torch.as_tensor(value).detach(), dtype=float)
    except (TypeError, ValueError, RuntimeError):
        return None


def _judge(yours, expected, tolerance):
    """(whether it is solved, the answer or None, the problem)."""
    try:
        value = yours()
    except Exception as problem:
        return False, None, f"your lines raise an error, {type(problem).__name__}: {problem}"
    if value is None or value is ...:
        return False, None, "not solved yet"
    if isinstance(expected, str):
        return str(value).strip().lower() == expected.strip().lower(), value, "not the answer expected"
    answer, truth = _numbers(value), _numbers(expected)
    if answer is None:
        return False, value, f"a {type(value).__name__}, where numbers were expected"
    if answer.shape != truth.shape:
        return False, value, f"shape {answer.shape}, where {truth.shape} was expected"
    if np.isnan(answer).any():
        return False, value, "NaN in your answer"
    gap = np.abs(answer - truth).max(initial=0)
    return bool(gap <= tolerance * max(1.0, np.abs(truth).max(initial=0))), value, f"off by {gap:.3g} at most"


def _table(yours, expected, tolerance, names, most=6):
    """A head and lines (yours, expected), before them the place, if arrays have one shape: then those that differ."""
    answer, truth = _numbers(yours), _numbers(expected)
    if isinstance(expected, str) or answer is None or answer.shape != truth.shape or truth.ndim == 0:
        lines = zip_longest(_lines(yours), _lines(expected), fillvalue="")
        return [("yours", "expected"), *lines]
    answer, truth = (array[:, None] if array.ndim == 1 else array for array in (answer, truth))
    allowed = tolerance * max(1.0, np.abs(truth).max(initial=0))
    differ = ~(np.abs(answer - truth) <= allowed).all(-1)
    places = np.argwhere(differ if differ.any() else ~differ)
    names = names or ["row", *[""] * (differ.ndim - 1)]
    table = [(f"{differ.sum()} of {differ.size} differ" if differ.any() else "", "yours", "expected")]
    for place in map(tuple, places[:most]):
        words = ", ".join(f"{name} {index}".strip() for name, index in zip(names, place, strict=True))
        table.append((words, _shown(answer[place]), _shown(truth[place])))
    return table


def _shown(row):
    """A row of numbers as a short text."""
    return np.array2string(row, precision=4, suppress_small=True, threshold=8).replace("\n", "")


def _lines(value, most=6):
    """A value as a few short lines."""
    numbers = _numbers(value) if isinstance(value, torch.Tensor | np.ndarray | list | tuple) else None
    if numbers is not None:
        rows = numbers.reshape(-1, numbers.shape[-1]) if numbers.ndim > 1 else np.atleast_1d(numbers)
        return [_shown(row) for row in rows[:most]]
    return str(f"{value:.6g}" if isinstance(value, float) else value).splitlines()[:most] or [""]
