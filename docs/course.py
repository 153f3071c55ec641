"""The course is run, saved and compared, and its exercise files are written: `course` and `exercises`.

Exercises are the scripts in `notebooks/solutions/` without the lines between `# SOLUTION` and `# END`.
"""

import os
import re
import tomllib
from contextlib import nullcontext
from pathlib import Path

import nbformat
from tqdm import tqdm

from minianyflow.course.notebooks import FIGURES, NOTEBOOKS, notebooks
from minianyflow.support.cli import Parser
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.support.install import ROOT

SOLUTIONS, EXERCISES = ROOT / "notebooks/solutions", ROOT / "notebooks/exercises"
GAP = "...  # your lines here"
EXTRAS = {"06": "[video]", "07b": "[video]", "08": "[video,distill]"}  # {begin of a name: extras}
FIRST = """\
try:
    from minianyflow.course import notebooks as course
except ModuleNotFoundError as missing:
    import os, subprocess, sys

    address = "{address}"
    if os.path.exists("../pyproject.toml") or not address:
        raise SystemExit(f"{{missing.name}} is missing: run `make lab`, or `python -m minianyflow setup`") from None
    # This notebook is alone, as on Colab: fetch the library and install what it needs (once, a minute).
    if not os.path.exists("course"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, "course"], check=True)
    wanted = ["--editable", "./course{extras}", "anywidget"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    sys.path.insert(0, os.path.abspath("course"))
    from minianyflow.course import notebooks as course
"""
BADGES = {
    "Open in Colab": "https://colab.research.google.com/github/{}/blob/main/notebooks/{}.ipynb",
    "Open in Binder": "https://mybinder.org/v2/gh/{}/HEAD?labpath=notebooks/{}.ipynb",
}
_BADGES = re.compile(r"^\[Open in .*\n\n", re.M)
_CLAIM = re.compile(r"^(holds|FAILS)  (.+?): (-?\d[\d.]*(?:e[-+]\d+)?)(?=, | \()", re.M)
_WIDGET = "application/vnd.jupyter.widget-view+json"


def course(argv: list[str]) -> int:
    """Run the notebooks in fresh kernels and save them with their outputs, or compare them with what is saved."""
    parser = Parser("minianyflow course", description=course.__doc__)
    parser.add_argument("--only", help="the number of one notebook, say 03 or 07a")
    parser.add_argument("--compare", action="store_true", help="write nothing; print where claims differ from saved")
    parser.add_argument("--frame", action="store_true", help="run nothing; write badges and first cells anew")
    parser.add_argument("--figures", metavar="FOLDER", help="write every figure there too, for slides")
    arguments = parser.parse_args(argv)
    chosen = [path for path in notebooks() if not arguments.only or path.name.startswith(arguments.only)]
    if not chosen:
        known = ", ".join(path.name.split("_")[0] for path in notebooks())
        raise InputError(f"no notebook begins with {arguments.only!r}; expected one of {known}")
    if arguments.frame:
        for path in chosen:
            notebook = nbformat.read(path, as_version=4)
            frame(notebook, path.stem)
            nbformat.write(notebook, path)
        return 0
    differences = []
    with staging_folder(arguments.figures) if arguments.figures else nullcontext() as figures:
        for path in tqdm(chosen, unit="notebook"):
            fresh = execute(path, figures)
            if arguments.compare:
                differences += [f"{path.name}: {line}" for line in compare(nbformat.read(path, as_version=4), fresh)]
            else:
                nbformat.write(fresh, path)
    print("\n".join(differences) or f"{len(chosen)} notebooks run, every claim holds")
    return 1 if differences else 0


def exercises(argv: list[str]) -> int:
    """Write the student's exercise files from the solutions."""
    Parser("minianyflow exercises", description=exercises.__doc__).parse_args(argv)
    print("\n".join(str(path.relative_to(ROOT)) for path in write_exercises()))
    return 0


def repository() -> str:
    """Where the project is public, "owner/name" on GitHub, by pyproject.toml; "" as long as it is nowhere."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["minianyflow"]["repository"]


def frame(notebook: nbformat.NotebookNode, name: str, public: str | None = None) -> None:
    """Write what is the same in all notebooks: badges below the title, and the cell that installs where it must.

    public: the project's "owner/name" on GitHub, or a whole address to clone; by default `repository()`.
    """
    public = repository() if public is None else public
    title, first = notebook.cells[0], next(cell for cell in notebook.cells if cell.cell_type == "code")
    badges = " · ".join(f"[{words}]({address.format(public, name)})" for words, address in BADGES.items())
    head, _, rest = _BADGES.sub("", title.source).partition("\n\n")
    title.source = "\n\n".join([head, *([badges] if public else []), rest])
    extras = next((extra for begin, extra in EXTRAS.items() if name.startswith(begin)), "")
    address = public if "://" in public or not public else f"https://github.com/{public}"
    first.source = FIRST.format(address=address, extras=extras) + first.source[first.source.index("course.start(") :]


def execute(path: Path, figures=None) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel; returns it with its outputs. figures: a folder for its pictures, or None."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | ({FIGURES: str(Path(figures).resolve())} if figures else {})
    client = NotebookClient(notebook, timeout=600, startup_timeout=600, kernel_name="python3", record_timing=False)
    try:
        client.execute(env=environment, cwd=str(path.parent))
    except CellExecutionError as problem:
        what = f"{problem.ename}: {problem.evalue}".splitlines()[0]
        raise InputError(f"{path.name} fails: {what}; run it in JupyterLab") from None
    if path.parent == NOTEBOOKS:
        frame(notebook, path.stem)
    for cell in notebook.cells:
        tidy(cell)
    fold(notebook.cells)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


def claims_of(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """The claims that a notebook printed: {what: mean}."""
    return {what: float(value) for word, what, value in _CLAIM.findall(printed(notebook)) if word == "holds"}


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text of a notebook's outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def compare(committed: nbformat.NotebookNode, fresh: nbformat.NotebookNode, tolerance: float = 0.25) -> list[str]:
    """Lines for differences between the claims of two runs of a notebook; none means that they agree.

    tolerance: of a claim's mean, relative: other processors round differently, and training amplifies it.
    """
    old, new = claims_of(committed), claims_of(fresh)
    lines = [f"no longer claimed: {what}" for what in old.keys() - new.keys()]
    lines += [f"only in the new run: {what}" for what in new.keys() - old.keys()]
    for what in old.keys() & new.keys():
        if abs(old[what] - new[what]) > tolerance * abs(old[what]) + 1e-6:
            lines.append(f"{what}: committed {old[what]:g}, now {new[what]:g}")
    return lines


def tidy(cell: nbformat.NotebookNode) -> None:
    """Drop what changes from run to run: execution times, progress bars, the widget of a scene beside its picture."""

    def is_bar(output):
        errors = output.output_type == "stream" and output.name == "stderr"
        return errors and ("\r" in output.text or not output.text.strip())

    cell.metadata = {}
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if not is_bar(output)]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data.pop(_WIDGET, None)


def fold(cells: list[nbformat.NotebookNode]) -> None:
    """Hide the saved outputs between a prediction and its folded answer: a click, or a run, shows them."""
    asked = False
    for cell in cells:
        if cell.cell_type == "markdown":
            over = re.search("<details|^#", cell.source, re.M)
            asked = "**Predict" in cell.source or (asked and not over)
        elif asked and "scenes." not in cell.source:  # a scene hides its own answer
            cell.metadata = {"jupyter": {"outputs_hidden": True}}


def student_copy(solution: str) -> str:
    """The text of a student's file: a gap in place of the lines between the marks. InputError for a lone mark."""
    copy = re.sub(r"# SOLUTION$((?!# SOLUTION$).)*?# END$", GAP, solution, flags=re.S | re.M)
    if mark := re.search(r"^ *(# SOLUTION|# END)$", copy, re.M):
        raise InputError(f"{mark[1]} out of place; expected # SOLUTION, lines, # END in turn")
    return copy


def write_exercises() -> list[Path]:
    """Write every student's file; returns their paths. Raises InputError for a file that a student has changed."""
    EXERCISES.mkdir(exist_ok=True)
    written = []
    for solution in sorted(SOLUTIONS.glob("[0-9]*.py")):
        target, text = EXERCISES / solution.name, student_copy(solution.read_text("utf-8"))
        if target.exists() and target.read_text("utf-8") != text:
            raise InputError(f"{target.name} has been changed; move it away first, then run this again")
        target.write_text(text, "utf-8")
        written.append(target)
    return written
