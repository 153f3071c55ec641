"""The frame of the notebooks: first cell, claims, small figures. docs/course.py runs and compares them."""

import builtins
import itertools
import json
import math
import os
import re
import symtable
import sys
from pathlib import Path

import nbformat
import numpy as np
import torch

from minianyflow.support.install import ROOT

NOTEBOOKS = ROOT / "notebooks"
FIGURES = "MINIANYFLOW_FIGURES"  # environment variable: a folder where figures are written as well, for slides


def start(name: str, minutes: float, needs: str = "nothing but the library") -> None:
    """The first cell of notebook `name`: prints what it takes, makes figures small and missing names clear."""
    from IPython import get_ipython

    torch.set_num_threads(1)
    os.chdir(NOTEBOOKS)  # of the notebook alone, the library that it fetched
    if colab := sys.modules.get("google.colab"):
        colab.output.enable_custom_widget_manager()
    if shell := get_ipython():
        _small_figures(shell, name)
        shell.set_custom_exc((NameError, ModuleNotFoundError), lambda *args, **kwargs: _explain(name, *args))
    print(f"about {minutes:g} minute{'s' if minutes > 1 else ''} on two cores, top to bottom; needs {needs}")


def claim(what: str, figures, at_most: float = math.inf, at_least: float = -math.inf) -> None:
    """Print figures, one or one per seed, beside their bound; AssertionError unless every one holds."""
    values = np.asarray([float(value) for value in np.ravel(figures)] or [math.nan])
    holds = bool((np.isfinite(values) & (values >= at_least) & (values <= at_most)).all())
    seeds = f" ({values.min():.3g} to {values.max():.3g}, {len(values)} runs)" if len(values) > 1 else ""
    bounds = ("at least", at_least), ("at most", at_most)
    bound = " and ".join(f"{word} {number:.4g}" for word, number in bounds if math.isfinite(number))
    line = f"{'holds' if holds else 'FAILS'}  {what}: {values.mean():.3g}{seeds}, {bound}"
    print(line)
    if not holds:
        raise AssertionError(line)


def report(name: str) -> dict:
    """A committed report, docs/NAME, say "plane/any_step.json"."""
    return json.loads((ROOT / "docs" / name).read_text("utf-8"))


def notebooks() -> list[Path]:
    """The notebooks of the course, in order; last the one of ten minutes, which stands alone."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def _small_figures(shell, name):
    """Show figures as PNGs of 64 colours, titles as alt text; written to the folder FIGURES too, if it is set."""
    from matplotlib.figure import Figure

    from minianyflow.support.figures import small_png

    shell.run_line_magic("matplotlib", "inline")
    numbers = itertools.count(1)

    def show(figure):
        number = next(numbers)
        if folder := os.environ.get(FIGURES):
            (Path(folder) / f"{name}-{number}.png").write_bytes(small_png(figure, dpi=160))
        titles = [axes.get_title() or axes.get_ylabel() or axes.get_xlabel() for axes in figure.axes]
        titles = titles if any(titles) else [figure.get_label()]
        return small_png(figure, dpi=80), {"alt": "; ".join(" ".join(title.split()) for title in titles if title)}

    shell.display_formatter.formatters["image/png"].for_type(Figure, show)


def _explain(notebook, shell, kind, problem, trace, tb_offset=None):
    """A line for a missing name or package: which cell, or which command, provides it."""
    shell.showtraceback((kind, problem, trace), tb_offset=tb_offset)
    if kind is ModuleNotFoundError:
        print(f"The package {problem.name} is missing: run `make lab`, or `python -m minianyflow setup`.")
    elif cell := where_defined(NOTEBOOKS / f"{notebook}.ipynb", problem.name):
        print(f"`{problem.name}` comes from an earlier cell; run this one first:\n\n{cell}")


def where_defined(path: Path, name: str) -> str | None:
    """The source of the first cell of a notebook that defines or imports `name`, or None."""
    if not path.exists() or hasattr(builtins, name):
        return None
    for cell in nbformat.read(path, as_version=4).cells:
        try:
            symbols = symtable.symtable(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M), "cell", "exec")
        except SyntaxError:
            continue
        names = symbols.get_symbols() if cell.cell_type == "code" else []
        if any(symbol.get_name() == name and (symbol.is_assigned() or symbol.is_imported()) for symbol in names):
            return cell.source
    return None
