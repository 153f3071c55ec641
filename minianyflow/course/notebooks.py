"""What a notebook of the course stands on: its first cell, its claims, its small figures; and how notebooks are run.

Notebooks are committed with their outputs. `execute` runs one from a fresh kernel; `compare` runs it and compares the
claims it ends with to the committed ones.
"""

import ast
import builtins
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT

NOTEBOOKS = ROOT / "notebooks"
FIGURES = "MINIANYFLOW_FIGURES"  # a folder: figures are written there too, for slides
_CLAIM = re.compile(r"^(holds|FAILS)  (.+?): (-?\d[\d.]*(?:e[-+]\d+)?)(?=, | \()", re.M)


def start(name, minutes, needs="nothing but the library"):
    """The first cell of notebook `name`: says what it takes, sets the figures up, makes mistakes readable."""
    torch.set_num_threads(1)
    shell = _shell()
    if shell:
        _small_figures(shell, name)
        shell.set_custom_exc((NameError, ModuleNotFoundError), lambda *args, **kwargs: _explain(name, *args))
    print(f"about {minutes:g} minute{'s' if minutes > 1 else ''} on two cores, top to bottom; needs {needs}")


def claim(what, figures, at_most=None, at_least=None):
    """Print one figure of the notebook (a number, or one a seed) beside its bound; AssertionError if it does not hold.

    The bound is asked of every seed.
    """
    values = np.asarray([float(each) for each in np.ravel(figures)] or [math.nan])
    holds = bool(np.isfinite(values).all())
    holds &= at_most is None or bool((values <= at_most).all())
    holds &= at_least is None or bool((values >= at_least).all())
    seeds = f" ({values.min():.3g} to {values.max():.3g}, {len(values)} runs)" if len(values) > 1 else ""
    bound = " and ".join(
        f"{word} {limit:.4g}" for word, limit in (("at least", at_least), ("at most", at_most)) if limit is not None
    )
    line = f"{'holds' if holds else 'FAILS'}  {what}: {values.mean():.3g}{seeds}, {bound or 'no bound stated'}"
    print(line)
    if not holds:
        raise AssertionError(line)


def notebooks():
    """The notebooks of the course, in order."""
    return sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def execute(path, figures=None):
    """Run a notebook from a fresh kernel; returns it with its outputs. figures: a folder for its pictures, or None."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | ({FIGURES: str(Path(figures).resolve())} if figures else {})
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False)
    try:
        client.execute(env=environment, cwd=str(path.parent))
    except CellExecutionError as problem:
        what = f"{problem.ename}: {problem.evalue}".splitlines()[0]
        raise InputError(f"{path.name} fails: {what}; run it in JupyterLab") from None
    for cell in notebook.cells:
        _tidy(cell)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return notebook


def claims_of(notebook):
    """The claims a notebook printed: {what: mean}."""
    return {what: float(value) for word, what, value in _CLAIM.findall(printed(notebook)) if word == "holds"}


def printed(notebook):
    """All text of a notebook's outputs."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
    return "\n".join("".join(text) for text in texts)


def compare(committed, fresh, tolerance=0.25):
    """Differences between the claims of two runs of a notebook, as lines; none means that they agree.

    tolerance: on a claim's mean, relative: other processors round differently, and training amplifies it.
    """
    old, new = claims_of(committed), claims_of(fresh)
    lines = [f"no longer claimed: {what}" for what in old.keys() - new.keys()]
    lines += [f"only in the new run: {what}" for what in new.keys() - old.keys()]
    for what in old.keys() & new.keys():
        if abs(old[what] - new[what]) > tolerance * abs(old[what]) + 1e-6:
            lines.append(f"{what}: committed {old[what]:g}, now {new[what]:g}")
    return lines


def _shell():
    try:
        from IPython import get_ipython
    except ModuleNotFoundError:
        return None
    return get_ipython()


def _small_figures(shell, name):
    """Figures are shown as PNGs of 64 colours; with MINIANYFLOW_FIGURES set they are also written there."""
    from matplotlib.figure import Figure

    from minianyflow.support.figures import small_png

    shell.run_line_magic("matplotlib", "inline")
    count = 0

    def show(figure):
        nonlocal count
        count += 1
        png = small_png(figure, dpi=80)
        if folder := os.environ.get(FIGURES):
            (Path(folder) / f"{name}-{count}.png").write_bytes(small_png(figure, dpi=160))
        return png

    shell.display_formatter.formatters["image/png"].for_type(Figure, show)


def _explain(notebook, shell, kind, problem, trace, tb_offset=None):
    """One line for a missing name or package: which cell, or which command, provides it."""
    shell.showtraceback((kind, problem, trace), tb_offset=tb_offset)
    if kind is ModuleNotFoundError:
        print(f"The package {problem.name} is missing: run `make lab`, or `python -m minianyflow setup`.")
        return
    where = where_defined(NOTEBOOKS / f"{notebook}.ipynb", problem.name)
    if where:
        print(f"`{problem.name}` comes from an earlier cell; run this one first:\n\n{where}")


def where_defined(path, name):
    """The source of the first cell of a notebook that gives `name` its value, or None."""
    import nbformat

    if not Path(path).exists() or hasattr(builtins, name):
        return None
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and name in _assigned(cell.source):
            return cell.source
    return None


def _assigned(source):
    try:
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))
    except SyntaxError:
        return set()
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _tidy(cell):
    """Drop what changes from run to run and says nothing: execution times, progress bars."""
    cell.metadata = {}
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if not _is_bar(output)]
        for output in cell.outputs:
            output.pop("metadata", None) if output.output_type == "stream" else None
            if "image/png" in output.get("data", {}):  # a scene's picture is shown where its widget has no kernel
                output.data.pop("application/vnd.jupyter.widget-view+json", None)


def _is_bar(output):
    return (
        output.output_type == "stream" and output.name == "stderr" and ("\r" in output.text or not output.text.strip())
    )
