"""The command line on bad input: one line, no stack trace, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minianyflow.__main__ import main
from minianyflow.plane.race import METHODS, NFE

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["demo", "--dataset", "spirla"], "did you mean 'spiral'"),
        (["demo", "--steps", "0"], "at least one"),
        (["demo", "--seeds", "a,b"], "0,1,2"),
        (["demo", "--seeds", "1,1"], "different"),
        (["demo", "--workers", "0"], "at least 1"),
        (["demo", "--steps", "many"], "--help"),
        (["video", "--nfe", "1,four"], "step counts '1,four'"),
        (["video", "--nfe", "0,1"], "expected 1 or more"),
        (["video", "--nfe", "32,64"], "causal take those"),
        (["dmeo"], "invalid choice"),
        ([], "required"),
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


def test_video_takes_every_step_count_of_its_report_unless_told(monkeypatch):
    from minianyflow.video import report as video_report

    asked = []
    monkeypatch.setattr(video_report, "run", lambda *given: asked.append(given[3]))
    monkeypatch.setattr(video_report, "table", lambda report: "")
    assert main(["video"]) == main(["video", "--nfe", "1,4"]) == 0
    assert asked == [video_report.NFE, (1, 4)]


def test_a_folder_that_cannot_be_written_is_named_before_training(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--output", str(tmp_path / "file" / "demo")]) == 2
    printed = capsys.readouterr().err
    assert "cannot write to" in printed
    assert "--output" in printed


def command(*arguments):
    return [sys.executable, "-m", "minianyflow", *map(str, arguments)]


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
@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_an_interrupted_demo_leaves_what_was_there(tmp_path, how):
    (tmp_path / "any_step.json").write_text("of an earlier run")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and its children, ignore it
    running = subprocess.Popen(
        command("demo", "--output", tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(12)  # in the midst of training
    if how == "Ctrl-C":
        os.killpg(running.pid, signal.SIGINT)  # every process of the group
    else:
        running.terminate()  # the parent alone
    assert running.wait(timeout=60) == 130
    assert "Traceback" not in (printed := running.stderr.read())
    assert "interrupted" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["any_step.json"]
    assert (tmp_path / "any_step.json").read_text() == "of an earlier run"
    assert gone(running.pid)  # nobody is left behind


@pytest.mark.slow
def test_a_short_demo_writes_everything(tmp_path):
    done = subprocess.run(
        command("demo", "--dataset", "ring8", "--steps", 60, "--seeds", "4,5", "--output", tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    students = [f"{method}.safetensors" for method in METHODS if method != "euler"]
    assert {file.name for file in tmp_path.iterdir()} == {"any_step.json", "any_step.png", *students}
    report = json.loads((tmp_path / "any_step.json").read_text())
    assert (report["dataset"], report["seeds"]) == ("ring8", [4, 5])
    assert set(report["methods"]) == set(METHODS)
    for name, method in report["methods"].items():
        assert method["nfe"] == list(NFE)
        for figure in ("sliced_w2", "path_error"):
            assert [len(each) for each in method[figure]] == [len(NFE)] * 2
        assert (method["train_seconds"] > 0) == (method["network_evaluations"] > 0) == (name != "euler")
    cost = {name: method["network_evaluations"] for name, method in report["methods"].items() if name != "euler"}
    assert max(cost.values()) <= 1.05 * min(cost.values())  # the same for all; a consistency target at t = 0 is free
    assert "sliced_w2 x 1000" in done.stdout
