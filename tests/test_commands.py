"""The command line on bad input: one line, no stack trace, nothing half-written."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from minianyflow.support.cli import COMMANDS, command, main, run
from minianyflow.support.files import staging_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["demo", "--dataset", "spirla"], "did you mean 'spiral'"),
        (["demo", "--evaluations", "0"], "at least one"),
        (["demo", "--seeds", "a,b"], "0,1,2"),
        (["demo", "--seeds", "1,1"], "different"),
        (["demo", "--workers", "0"], "at least 1"),
        (["demo", "--evaluations", "many"], "--help"),
        (["video", "--nfe", "1,four"], "argument --nfe: '1,four'"),
        (["video", "--nfe", "0,1"], "expected 1 or more"),
        (["video", "--nfe", "32,64"], "causal take those"),
        (["demo", "--output=~/x"], "nobody has put a folder in the place of this ~; write the whole path"),
        (["demo", "--workers=--"], "--workers=-- gives no value"),
        (["demo", "--seeds", "9" * 6000], "999 ..."),
        (["sample", "x", "--prompt", "a\udcff"], "is not UTF-8"),
        (["evaluate", "x", "--prompts", "y", "--negative", "\udcff"], "is not UTF-8"),
        (["prepare-latents", "--output", "o", "--null", "\udcff"], "is not UTF-8"),
        (["prepare-latents", "--output", "o", "--videos=v", "--captions=c", "--length", "9" * 12], "length="),
        (["prepare-latents", "--output", "o", "--videos=v", "--captions=c", "--height", "1" + "6" * 12], "height="),
        (["dmeo"], "did you mean 'demo'"),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert words in printed.err
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("problem", "status", "words"),
    [
        (OSError(28, "No space left on device", "weights"), 2, "weights: No space left on device"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't\nallocate memory"), 2, "out of memory"),
        (RecursionError("maximum depth"), 2, "nested too deeply"),
        (UnicodeEncodeError("ascii", "caf\u00e9", 3, 4, "not in range"), 2, r"'caf\xe9' cannot be written as ascii"),
        (BrokenPipeError(), 141, ""),
        (KeyboardInterrupt(), 130, "interrupted"),
        (type("PanicException", (BaseException,), {})("of a library\nin Rust"), 1, "of a library in Rust"),
        (KeyError(9 * "9" * 1000), 1, "99 ..."),
    ],
)
@pytest.mark.parametrize("asked", [False, True])
def test_any_error_is_one_line_and_a_stack_trace_only_if_asked_for(problem, status, words, asked, capsys):
    def fails():
        raise problem

    before = signal.getsignal(signal.SIGTERM)
    assert run(fails, ["--traceback"] * asked) == status
    signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr().err
    assert ("Traceback" in printed) == asked
    if not asked:
        assert words in printed
        assert len(printed.strip().splitlines()) == bool(words)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "matplotlibrc"])
def test_a_persons_own_settings_of_matplotlib_change_no_picture(tmp_path, name):
    (tmp_path / name).write_text("axes.facecolor: red\nbackend: svg\n")
    code = "from minianyflow.support.cli import main; main(['--help']); import matplotlib as m;"
    code += "print(m.rcParams['axes.facecolor'], m.get_backend())"
    environment = os.environ | {"MATPLOTLIBRC": name, "PYTHONPATH": str(ROOT)}
    environment.pop("MPLBACKEND", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["white", "agg"]


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_error_is_an_interruption_if_a_library_made_it_of_one_and_no_later_one_is(goes_on, capsys):
    def imported():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            if not goes_on:
                raise RuntimeError("cannot be imported") from None
        raise RuntimeError("of its own")

    before = [signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert run(imported) == (1 if goes_on else 130)
        assert ("of its own" if goes_on else "interrupted") in capsys.readouterr().err
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_errors_that_are_each_others_cause_end(capsys):
    first, second = RuntimeError("of a first try"), RuntimeError("of a second")
    first.__cause__, second.__cause__ = second, first

    def command():
        raise first

    assert run(command) == 1
    assert "of a first try" in capsys.readouterr().err


@pytest.mark.slow
def test_output_that_nobody_can_take_is_one_line():
    help_of = [sys.executable, "-m", "minianyflow", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(help_of, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "No space left" in done.stderr


def test_letters_that_a_locale_does_not_have_end_no_work():
    code = r"from minianyflow.support import cli; raise SystemExit(cli.run(lambda: print('\u4e00') or 0))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [rb"\u4e00"], b"")


ALIKE = """
import os
from minianyflow.support import cli, errors
def command():
    print("begun", flush=True)
    raise errors.InputError("a bucket is too small")
cli.PATIENCE, sleep = float(os.environ["PATIENCE"]), cli.time.sleep
cli.time.sleep = lambda seconds: (print("waits", flush=True), sleep(seconds))
raise SystemExit(cli.run(command))
"""


@pytest.mark.parametrize(("rank", "patience", "said"), [(0, 60, 1), (1, 0, 1), (1, 60, 0)])
def test_what_all_processes_say_is_one_line(rank, patience, said):
    """Further ones wait, and their launcher ends them once the first has ended; one that fails alone says so."""
    environment = os.environ | {"LOCAL_RANK": str(rank), "PATIENCE": str(patience)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ALIKE], cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        if not said:
            assert process.stdout.readline() == "waits\n"
            process.terminate()
        assert process.stderr.read() == "error: a bucket is too small\n" * said
        assert process.wait(60) == (2 if said else -signal.SIGTERM)


DEEP = ["[" * 100_000, "a: " + "[" * 100_000 + "]" * 100_000, "- " * 60_000, "seed: " + "9" * 6000]


@pytest.mark.parametrize("text", DEEP, ids=["open", "closed", "lists", "digits"])
def test_a_file_that_would_end_the_process_is_one_line(text, tmp_path, capsys):
    (tmp_path / "deep.yaml").write_text(text)
    assert main(["distill", "--config", str(tmp_path / "deep.yaml"), "--print-config"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_command_is_listed_with_what_it_does(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err
    for name in COMMANDS:
        assert f"  {name:16}{command(name).__doc__.splitlines()[0]}" in printed.out


def test_a_wheel_says_which_commands_need_a_checkout(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("minianyflow.support.install.ROOT", tmp_path)
    assert main(["course"]) == main(["docs"]) == 2
    assert "error: docs works in a checkout of the project" in capsys.readouterr().err
    assert main(["--help"]) == 0  # and lists them


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_scripts_parse_and_call(script):
    """What a script can do, the command of the same name in the wheel can do, too."""
    if script not in ("faults", "wan_tiny"):  # of the checkout alone
        text = (ROOT / f"scripts/{script}.py").read_text()
        assert f'"{script.replace("_", "-")}"' in text
        assert script.replace("_", "-") in COMMANDS
        assert len(text.splitlines()) < 10


def test_video_takes_all_step_counts_of_its_report_by_default(monkeypatch):
    from minianyflow.video import motion_report
    from minianyflow.video import report as video_report

    counts = []
    monkeypatch.setattr(motion_report, "run", lambda *arguments: counts.append("motion"))
    monkeypatch.setattr(video_report, "run", lambda *arguments: counts.append(arguments[3]))
    monkeypatch.setattr(video_report, "table", lambda report: "")
    assert main(["video"]) == main(["video", "--nfe", "1,4"]) == 0
    assert main(["video", "--motion"]) == 0
    assert counts == [video_report.NFE, "motion", (1, 4), "motion", "motion"]


def test_a_folder_that_cannot_be_written_is_named_before_training(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--output", str(tmp_path / "file" / "demo")]) == 2
    assert re.search("cannot write to .*name a folder", capsys.readouterr().err)


def gone(group, seconds=15):
    """Whether a process group is empty, or soon will be."""
    for _ in range(10 * seconds):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", *(pytest.param(how, marks=pytest.mark.long) for how in ("TERM", "KILL"))])
def test_an_interrupted_demo_leaves_what_was_there(tmp_path, how):
    (tmp_path / "any_step.json").write_text("of an earlier run")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and its children, ignore it
    demo = [sys.executable, "-m", "minianyflow", "demo", "--output", str(tmp_path)]
    running = subprocess.Popen(demo, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = psutil.Process(running.pid).children
    while sum(child.cpu_times().user > 4 for child in children()) < 2:  # in the midst of training
        time.sleep(0.1)
    if how == "Ctrl-C":
        os.killpg(running.pid, signal.SIGINT)  # every process of the group
    else:
        running.send_signal(signal.Signals[f"SIG{how}"])  # the parent alone
    assert running.wait(timeout=60) == (-signal.SIGKILL if how == "KILL" else 130)
    printed = running.stderr.read()
    assert ("interrupted" in printed) == (how != "KILL")
    assert "Traceback" not in printed
    with staging_folder(tmp_path):  # which the next demo begins with
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["any_step.json"]
    assert (tmp_path / "any_step.json").read_text() == "of an earlier run"
    assert gone(running.pid)  # nobody is left behind
