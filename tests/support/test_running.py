"""Jobs in processes of their own, and batches ahead of their time: order, results, and what stops them."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from minianyflow.support import files
from minianyflow.support.errors import InputError
from minianyflow.support.files import lock_folder, new_folder, remove_leftovers, staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.wan.prefetch import prefetch, waiting_share


def test_a_job_waits_for_the_one_it_comes_after(tmp_path):
    jobs = {"later": (os.chmod, (tmp_path / "new",)), "first": (os.mkdir, (tmp_path / "new",))}
    assert run_jobs(jobs, 2, {"later": "first"}) == {"later": None, "first": None}
    assert (tmp_path / "new").is_dir()
    with pytest.raises(FileNotFoundError):
        run_jobs({"alone": (os.chmod, (tmp_path / "none",)), "other": (os.mkdir, (tmp_path / "other",))}, 1)
    assert not (tmp_path / "other").exists()  # an error stops what has not begun


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match="0 workers; expected at least 1"):
        run_jobs({}, 0)


def test_the_next_batch_is_drawn_while_this_one_is_worked_on():
    asked, drawn_ahead, main = [], threading.Event(), threading.get_ident()

    def draw(step):
        assert threading.get_ident() != main
        asked.append(step)
        if step == 5:
            drawn_ahead.set()
        if step == 7:
            raise InputError("step 7 is broken")
        return step * 10

    drawn = prefetch(draw, 9)
    assert drawn(4) == 40
    assert drawn_ahead.wait(10)  # nobody has asked for it
    assert [drawn(5), drawn(6)] == [50, 60]
    with pytest.raises(InputError, match="step 7"):
        drawn(7)
    assert drawn(8) == 80
    assert asked == [4, 5, 6, 7, 8]  # each once, and none beyond the end


@pytest.mark.parametrize(("drawing", "working", "low", "high"), [(0.0, 0.02, 0.0, 0.2), (0.04, 0.02, 0.35, 0.65)])
def test_the_share_of_a_step_that_waits_for_data_is_told(drawing, working, low, high):
    """A batch that takes twice as long as the work beside it: half of every step is waiting."""
    waits = []
    drawn = prefetch(
        lambda step: time.sleep(10 * drawing if step == 3 else drawing), 10, waits
    )  # the first is left out
    for step in range(3, 10):
        drawn(step)
        time.sleep(working)
    told = waiting_share(waits)
    assert told["steps"] == 5  # nor is it known when the last one ended
    assert low <= told["median"] <= high
    assert low - 0.1 <= told["all"] <= high + 0.3
    assert waiting_share([(1, 4), (0, 2), (0, 4)]) == {"steps": 3, "median": 0, "all": 0.1}
    assert waiting_share([]) is None


def test_what_killed_processes_left_is_swept_away_and_nothing_else(tmp_path):
    for name in (".unfinished-1/student", "student", ".lock/x"):
        (tmp_path / name).mkdir(parents=True)
    with staging_folder(tmp_path / "other"):  # of somebody at work elsewhere
        remove_leftovers(tmp_path)
        assert list((tmp_path / "other").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"student", ".lock", "other"}


def test_what_a_living_process_writes_is_not_swept_away(tmp_path):
    with new_folder(tmp_path / "export") as inside, staging_folder(tmp_path) as folder:
        for each in (inside, folder):
            (each / "weights").write_text("new")
        remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"export", "weights"}
    assert (tmp_path / "export/weights").read_text() == "new"


def test_a_folder_is_held_by_one_where_there_are_locks(tmp_path, monkeypatch):
    held = lock_folder(tmp_path)
    with pytest.raises(InputError, match="another run is at work"):
        lock_folder(tmp_path)
    held.close()
    lock_folder(tmp_path).close()

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with (
        lock_folder(tmp_path),
        lock_folder(tmp_path),
        staging_folder(tmp_path) as folder,
    ):  # some network disks have none
        (folder / "file").touch()
    assert (tmp_path / "file").exists()


def test_a_sweep_follows_no_links(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    (tmp_path / "run/.unfinished-1").mkdir(parents=True)
    for link in ("run/.unfinished-link", "run/.unfinished-1/link"):
        (tmp_path / link).symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path / "run")
    assert not (tmp_path / "run/.unfinished-1").exists()
    assert (tmp_path / "mine/file").exists()


@pytest.mark.parametrize("names", [("config.yaml", "run.json"), ("00000.safetensors", "null.safetensors")])
def test_what_says_that_all_is_there_comes_last(tmp_path, monkeypatch, names):
    """Folders list their files in any order, and a process may be killed between two of them."""
    came, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (came.append(target.name), replace(source, target)))
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / name for name in reversed(names)]))
    with staging_folder(tmp_path) as folder:
        for name in names:
            (folder / name).touch()
    assert tuple(came) == names


def test_what_is_staged_takes_the_place_of_what_a_killed_run_left(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student/old").write_text("old")
    (tmp_path / "file").write_text("old")
    with staging_folder(tmp_path) as folder:
        (folder / "student").mkdir()
        (folder / "student/new").write_text("new")
        (folder / "file").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"student", "file"}
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["new"]
    assert (tmp_path / "file").read_text() == "new"
