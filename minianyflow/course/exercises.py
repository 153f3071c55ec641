"""Exercises: the check that shows yours beside what was expected, and the student's files made from the solutions.

A solution is a short script in `notebooks/solutions/`. Lines between `# SOLUTION` and `# END` are left out of the
student's copy in `notebooks/exercises/`. `python -m minianyflow exercises` writes the copies.
"""

import numpy as np
import torch

from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT

SOLUTIONS, EXERCISES = ROOT / "notebooks/solutions", ROOT / "notebooks/exercises"
torch.set_num_threads(1)  # small networks and solves are fastest so
GAP = "...  # your lines here"
_solved = {}


def check(exercise, yours, expected, hint, tolerance=1e-4):
    """Compare `yours()` with what was expected, print both side by side, and give the hint if they differ.

    yours: a function without arguments, so that an error in it can be explained. expected: a number, a text, a list or
    a tensor. Returns whether it is solved; `finish` counts.
    """
    solved, shown, why = _judge(yours, expected, tolerance)
    print(f"{exercise}: {'solved' if solved else why}")
    left, right = _lines(shown), _lines(expected)
    width = max(map(len, left), default=0)
    print(f"    {'yours'.ljust(width)}   expected")
    for index in range(max(len(left), len(right))):
        one = left[index] if index < len(left) else ""
        print(f"    {one.ljust(max(width, 5))}   {right[index] if index < len(right) else ''}")
    if not solved:
        print(f"    hint: {hint}")
    _solved[exercise] = solved  # asked again, it counts once
    return solved


def finish():
    """The last line of an exercise file: says how many are solved; exit status 1 unless all are."""
    print(f"\n{sum(_solved.values())} of {len(_solved)} solved")
    if not all(_solved.values()):
        raise SystemExit(1)


def _judge(yours, expected, tolerance):
    """(whether solved, what to show, why not)."""
    try:
        value = yours()
    except Exception as problem:
        return False, f"{type(problem).__name__}: {problem}", "your lines raise an error"
    if value is None or value is ...:
        return False, "nothing", "not solved yet"
    if isinstance(expected, str):
        same = str(value).strip().lower() == expected.strip().lower()
        return same, value, "not the answer expected"
    try:
        mine, theirs = (np.asarray(torch.as_tensor(each).detach(), dtype=float) for each in (value, expected))
    except (TypeError, ValueError, RuntimeError):
        return False, value, f"a {type(value).__name__}, where numbers were expected"
    if mine.shape != theirs.shape:
        return False, value, f"shape {mine.shape}, where {theirs.shape} was expected"
    if np.isnan(mine).any():
        return False, value, "NaN in your answer"
    gap = float(np.abs(mine - theirs).max(initial=0))
    return gap <= tolerance * max(1.0, float(np.abs(theirs).max(initial=0))), value, f"off by {gap:.3g} at most"


def _lines(value, most=6):
    """A value as a few short lines."""
    if isinstance(value, torch.Tensor | np.ndarray | list | tuple):
        try:
            numbers = np.asarray(torch.as_tensor(value).detach(), dtype=float)
            rows = numbers.reshape(-1, numbers.shape[-1]) if numbers.ndim > 1 else np.atleast_1d(numbers)
            return [np.array2string(row, precision=4, suppress_small=True, threshold=8) for row in rows[:most]]
        except (TypeError, ValueError, RuntimeError):
            pass
    if isinstance(value, float):
        return [f"{value:.6g}"]
    return str(value).splitlines()[:most] or [""]


def student_copy(solution):
    """The text of a student's file: what stands between the marks is replaced by a gap."""
    lines, inside = [], False
    for number, line in enumerate(solution.splitlines(), 1):
        mark = line.strip()
        if mark in ("# SOLUTION", "# END"):
            if inside == (mark == "# SOLUTION"):
                raise InputError(f"line {number}: {mark} out of place; expected # SOLUTION, lines, # END in turn")
            inside = mark == "# SOLUTION"
            if inside:
                lines.append(line.replace("# SOLUTION", GAP))
        elif not inside:
            lines.append(line)
    if inside:
        raise InputError("# SOLUTION without # END")
    return "\n".join(lines) + "\n"


def write_exercises():
    """Write every student's file; returns their paths. A file that a student has begun is not touched."""
    EXERCISES.mkdir(exist_ok=True)
    written = []
    for solution in sorted(SOLUTIONS.glob("[0-9]*.py")):
        target, text = EXERCISES / solution.name, student_copy(solution.read_text())
        if target.exists() and target.read_text() != text:
            raise InputError(f"{target.name} has been changed; move it away first, then run this again")
        target.write_text(text)
        written.append(target)
    return written
