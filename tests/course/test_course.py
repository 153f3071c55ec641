"""The course: what the committed notebooks hold, the exercises solved and unsolved, and the answer to a mistake."""

import base64
import copy
import io
import re
import statistics
import subprocess
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from docs import course as runner
from minianyflow.course import exercises
from minianyflow.course import notebooks as course
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT

NOTEBOOKS = course.notebooks()
SOLUTIONS = sorted(runner.SOLUTIONS.glob("[0-9]*.py"))
SLOW, LONG = pytest.mark.slow, pytest.mark.long
TIMED = [
    pytest.param(path, marks=LONG if path.name.startswith(("06", "07b")) else SLOW, id=path.stem) for path in SOLUTIONS
]


def test_the_course_is_whole():
    numbers = [path.stem.split("_")[0].removeprefix("0") for path in NOTEBOOKS]
    assert " ".join(numbers) == "0 1 2 3 4 5 6 7a 7b 8 9 ten"
    assert [path.stem for path in NOTEBOOKS[:-1]] == [path.stem for path in SOLUTIONS]
    index = (course.NOTEBOOKS / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"({path.name})" not in index] == []
    assert "(notebooks/README.md)" in (ROOT / "README.md").read_text()  # the course in one click


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem, scope="module")
def notebook(request):
    committed = nbformat.read(request.param, as_version=4)
    committed.name = request.param.stem
    return committed


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def test_it_ran_in_order_without_error_or_warning(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "Traceback" not in str(notebook.metadata.get("widgets", ""))  # nor in an Output area
    assert not re.search(r"Warning\b|/(home|root|work|tmp|Users|usr)/|\\Users\\", nbformat.writes(notebook))


def test_its_cells_are_short(notebook):
    lines = [len(list(filter(str.strip, cell.source.splitlines()))) for cell in code(notebook)]
    plain = [re.sub(r"\$\$.*?\$\$|\$.*?\$|^\|.*$", "", source, flags=re.S | re.M) for source in text(notebook)]
    words = [len(re.sub(r"<summary>.*</summary>|<.*?>", "", source).split()) for source in plain]  # and without folds
    assert max(lines) <= 30
    assert statistics.median(lines) <= 9
    assert max(words) <= 100
    assert statistics.median(words) <= 46


def test_its_first_cell_says_what_it_takes_and_its_last_claims(notebook):
    first, everything = code(notebook)[0].source, "\n".join(text(notebook))
    assert f'course.start("{notebook.name}"' in first
    assert "make lab" in first
    minutes, needs = re.search(r"about ([\d.]+) minutes? on two cores.*; needs (.+)", runner.printed(notebook)).groups()
    assert 0 < float(minutes) <= (2 if notebook.name < "06" else 4)  # videos take longer
    assert needs
    for word in ("**Predict", *["## Exercises", f"exercises/{notebook.name}.py"] * (notebook.name != "ten_minutes")):
        assert word in everything
    assert len(runner.claims_of(notebook)) >= 4
    assert "FAILS" not in runner.printed(notebook)
    assert "course.claim(" in code(notebook)[-1].source


def test_one_setting_makes_its_badges_and_the_cell_that_installs(notebook):
    public, alone = copy.deepcopy(notebook), copy.deepcopy(notebook)
    runner.frame(alone, notebook.name)
    assert alone == notebook
    runner.frame(public, notebook.name, "someone/flows")
    runner.frame(public, notebook.name, "someone/flows")  # twice is once
    assert public.cells[0].source.count(f"/gh/someone/flows/HEAD?labpath=notebooks/{notebook.name}.ipynb") == 1
    assert public.cells[0].source.count(f"/github/someone/flows/blob/main/notebooks/{notebook.name}.ipynb") == 1
    assert 'address = "https://github.com/someone/flows"\n' in code(public)[0].source
    runner.frame(public, notebook.name, "")
    assert "Open in" not in public.cells[0].source + code(public)[0].source


def test_it_answers_no_prediction_on_its_own_screen(notebook):
    again = copy.deepcopy(notebook.cells)
    runner.fold(again)
    assert again == notebook.cells
    assert sum("jupyter" in cell.metadata for cell in again) >= 3
    asked = False
    for cell in (cell for cell in notebook.cells if cell.cell_type == "markdown"):
        asked = asked and not re.search("^(<details|#)", cell.source)
        assert not (asked and re.search(r"\*\*(Explain|-?\d[\d.]*\*\*)", cell.source)), cell.source  # in a fold alone
        asked = asked or "**Predict" in cell.source


def test_its_figures_are_there_and_small(notebook):
    assert len(nbformat.writes(notebook)) < 1e6
    outputs = [output for cell in code(notebook) for output in cell.outputs if "image/png" in output.get("data", {})]
    images = [Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) for output in outputs]
    assert all(len(output.metadata.get("image/png", {}).get("alt", "")) > 5 for output in outputs)
    assert all(image.mode == "L" for image in images if image.is_animated)  # a player: grey, like its videos
    still = [image for image in images if not image.is_animated]
    assert len(still) >= 3
    assert all(image.mode == "P" and len(image.getcolors()) <= 64 for image in still)


def test_the_figures_in_its_text_are_those_of_its_outputs(notebook):
    printed = runner.printed(notebook)
    quoted = re.findall(r"\*\*(-?\d[\d.]*)\*\*", "\n".join(text(notebook)))
    assert not [number for number in quoted if not re.search(rf"(?<![\d.]){re.escape(number)}", printed)]


# The exercises


@pytest.mark.parametrize("solution", SOLUTIONS, ids=lambda path: path.stem)
def test_student_files_are_made_from_the_solutions(solution):
    student = (runner.EXERCISES / solution.name).read_text()
    assert student == runner.student_copy(solution.read_text())
    assert student.count(runner.GAP) == solution.read_text().count("# SOLUTION") >= 3
    assert not re.search(r'check\(\s*"[^"]+",\s*\w+,\s*["\d]', student)  # an answer in plain sight


RUN = """
import runpy, sys
from minianyflow.course import exercises
for path in sys.argv[1:]:
    exercises._solved.clear()
    print("file", path)
    try:
        runpy.run_path(path, run_name="__main__")
        print("exit status 0")
    except SystemExit as end:
        print("exit status", end.code)
"""


def run(files):
    """What the files print, solved and unsolved, by solution: one start of Python for all."""
    both = [path for solution in files for path in (solution, runner.EXERCISES / solution.name)]
    done = subprocess.run([sys.executable, "-c", RUN, *both], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    texts = re.split(r"^file .*\n", done.stdout, flags=re.M)[1:]
    return dict(zip(files, zip(texts[::2], texts[1::2], strict=True), strict=True))


@pytest.fixture(scope="module")
def ran():
    return run([param.values[0] for param in TIMED if SLOW in param.marks])


@pytest.mark.parametrize("solution", TIMED)
def test_exercises_pass_when_solved_and_fail_helpfully_when_not(solution, ran):
    solved, unsolved = (ran if solution in ran else run([solution]))[solution]
    assert solved.endswith("exit status 0\n"), solved
    count = unsolved.count("not solved yet")
    assert unsolved.count("hint: ") == count >= 3
    assert unsolved.endswith(f"0 of {count} solved\nexit status 1\n")


def broken():
    raise ZeroDivisionError("division by zero")


def nothing(): ...


def test_rows_that_differ_are_shown_with_their_place(capsys, monkeypatch):
    monkeypatch.setattr(exercises, "_solved", {})
    expected = torch.arange(12.0).reshape(3, 2, 2)
    wrong = expected.clone()
    wrong[2, 1] = 0
    assert not exercises.check("1", lambda: wrong, expected, "think", rows=("time", "noise"))
    head, row, _ = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["1", "of", "6", "differ", "yours", "expected"]
    assert row.split("   ")[1:] == [" time 2, noise 1", "[0. 0.]", "[10. 11.]"]


@pytest.mark.parametrize(
    ("yours", "words"),
    [
        (nothing, "not solved yet"),
        (lambda: torch.zeros(3, 2), "shape (3, 2), where (2, 2) was expected"),
        (lambda: "a guess", "a str, where numbers were expected"),
        (lambda: {1: 2}, "a dict, where numbers were expected"),
        (lambda: [[1.0], [2.0, 3.0]], "a list, where numbers were expected"),
        (lambda: torch.full((2, 2), float("nan")), "NaN in your answer"),
        (lambda: torch.ones(2, 2), "off by 1 at most"),
        (broken, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_answer_is_explained(yours, words, capsys, monkeypatch):
    monkeypatch.setattr(exercises, "_solved", {})
    assert not exercises.check("1", yours, torch.zeros(2, 2), "think")
    shown = capsys.readouterr().out
    assert words in shown
    assert "hint: think" in shown
    assert ("yours" in shown) == (
        yours not in (broken, nothing)
    )  # what is expected is held back until there is an answer
    with pytest.raises(SystemExit):
        exercises.finish()


@pytest.mark.parametrize(
    ("yours", "expected"), [(2, 2.00001), ("Flow map ", "flow map"), ([1, 2], torch.tensor([1.0, 2.0])), (True, 1)]
)
def test_a_right_answer_is_right(yours, expected, capsys, monkeypatch):
    monkeypatch.setattr(exercises, "_solved", {})
    assert exercises.check("1", lambda: yours, expected, "think")
    assert "hint" not in capsys.readouterr().out
    exercises.finish()


@pytest.mark.parametrize("text", ["x = 1\n# END\n", "# SOLUTION\nx = 1\n", "# SOLUTION\n# SOLUTION\n# END\n"])
def test_marks_out_of_place_are_named(text):
    with pytest.raises(InputError, match="out of place"):
        runner.student_copy(text)


def test_work_begun_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "EXERCISES", tmp_path)
    written = runner.write_exercises()
    assert len(written) == len(SOLUTIONS)
    written[0].write_text("my own answer")
    with pytest.raises(InputError, match="has been changed"):
        runner.write_exercises()
    assert written[0].read_text() == "my own answer"


# Mistakes in a notebook


def small_notebook(*sources, printed=""):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text=printed)] if printed else []
    return notebook


def test_a_claim_must_hold_for_every_seed_and_is_read_back(capsys):
    course.claim("exact map, 8 steps: error, e.g. of", [2e-5, 4e-5], at_most=1)
    course.claim("slope", -0.98, at_most=-0.9)
    printed = capsys.readouterr().out
    assert "error, e.g. of: 3e-05 (2e-05 to 4e-05, 2 runs), at most 1" in printed
    claims = runner.claims_of(small_notebook("", printed=printed))
    assert claims == {"exact map, 8 steps: error, e.g. of": 3e-5, "slope": -0.98}
    for figures, bounds in (([0.1, 0.3], {"at_most": 0.2}), (float("nan"), {"at_most": 1}), ([], {"at_least": 0})):
        with pytest.raises(AssertionError, match="FAILS"):
            course.claim("error", figures, **bounds)


def test_claims_of_two_runs_are_compared():
    one = small_notebook("", printed="holds  a: 0.5, at most 1")
    other = small_notebook("", printed="holds  a: 0.9, at most 1\nholds  b: 1, at most 2")
    assert runner.compare(one, one) == []
    assert len(runner.compare(other, one)) == 2


def test_a_cell_run_out_of_order_says_which_it_needs(tmp_path):
    path = tmp_path / "09_small.ipynb"
    nbformat.write(small_notebook("%pylab\nimport math", "z = math.pi\nw = 2", "print(w)", "def f(): q = 1"), path)
    cells = {"w": "z = math.pi\nw = 2", "math": "%pylab\nimport math", "f": "def f(): q = 1"}
    for name, cell in (cells | {"q": None, "print": None}).items():
        assert course.where_defined(path, name) == cell


def test_an_unknown_notebook_is_one_line():
    with pytest.raises(InputError, match="no notebook begins with '99'; expected one of 00, 01"):
        runner.course(["--only", "99"])


@pytest.mark.slow
def test_the_kernel_explains_what_is_missing():
    notebook = small_notebook(code(nbformat.read(NOTEBOOKS[0], 4))[0].source, "print(spiral)", "import nosuchpackage")
    NotebookClient(notebook, allow_errors=True, kernel_name="python3").execute(cwd=str(course.NOTEBOOKS))
    assert "`spiral` comes from an earlier cell" in runner.printed(notebook)
    assert "nosuchpackage is missing: run `make lab`" in runner.printed(notebook)


@pytest.mark.slow
def test_a_failing_notebook_is_one_line(tmp_path):
    path = tmp_path / "09_small.ipynb"
    nbformat.write(small_notebook("print(missing_name)"), path)
    with pytest.raises(InputError, match=r"09_small\.ipynb fails: NameError"):
        runner.execute(path)
