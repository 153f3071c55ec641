"""Jobs in processes of their own: their order, and what stops them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minianyflow.support.jobs import run_jobs
from tests.refused import refused

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import os, pathlib, sys, time
from minianyflow.support.jobs import run_jobs
def wait(folder, position):
    (pathlib.Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)
if __name__ == "__main__":
    run_jobs({name: (wait, (sys.argv[1],)) for name in "ab"})
"""


def ended(number, seconds=20):
    """Whether a process is gone, or soon will be."""
    for _ in range(10 * seconds):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":  # its status is not fetched
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_job_waits_for_another_and_an_error_stops_all(tmp_path):
    jobs = {"later": (os.chmod, (tmp_path / "new",)), "first": (os.mkdir, (tmp_path / "new",))}
    assert run_jobs(jobs, 2, {"later": "first"}) == {"later": None, "first": None}
    assert (tmp_path / "new").is_dir()
    with pytest.raises(FileNotFoundError):
        run_jobs({"alone": (os.chmod, (tmp_path / "none",)), "other": (os.mkdir, (tmp_path / "other",))}, 1)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills the parent alone")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    command, environment = [sys.executable, tmp_path / "parent.py", tmp_path], os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, env=environment)
    while len(list(tmp_path.glob("*.pid"))) < 2:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert all(ended(int(file.stem)) for file in tmp_path.glob("*.pid"))


def test_bad_input_is_one_line():
    with refused("0 workers; expected at least 1"):
        run_jobs({}, 0)
