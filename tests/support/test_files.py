"""Files and folders: whole or absent, locked by one process, and what is removed when that was killed."""

import errno
import os
from pathlib import Path

import pytest

from minianyflow.support import files
from minianyflow.support.files import lock_folder, new_folder, remove_leftovers, staging_folder
from tests.refused import refused


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    for name in (".unfinished-1/student", "student", ".lock/x"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for link in ("run/.unfinished-link", "run/.unfinished-1/link"):
        (tmp_path / link).symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"student", ".lock", ".unfinished-link"}
    assert (tmp_path / "mine/file").exists()  # links are not followed


def test_unfinished_folders_of_a_living_process_stay(tmp_path):
    with new_folder(tmp_path / "export") as inside, staging_folder(tmp_path) as folder:
        for place in (inside, folder):
            (place / "weights").write_text("new")
        remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"export", "weights"}
    assert (tmp_path / "export/weights").read_text() == "new"


@pytest.mark.parametrize("kind", [new_folder, staging_folder])
def test_an_error_leaves_nothing(tmp_path, kind):
    with refused(r"cannot write to .*new \(No space left on device\); make room"), kind(tmp_path / "new") as folder:
        (folder / "file").touch()
        raise OSError(28, "No space left on device")
    assert not [path for path in tmp_path.rglob("*") if path.name != "new"]


def test_a_rerun_sweeps_what_a_killed_process_left(tmp_path):
    (tmp_path / ".unfinished-killed").mkdir()
    with staging_folder(tmp_path) as living, staging_folder(tmp_path) as folder:
        assert {path.name for path in tmp_path.iterdir()} == {living.name, folder.name}


def test_one_process_locks_a_folder_where_there_are_locks(tmp_path, monkeypatch):
    lock = lock_folder(tmp_path)
    with refused("another run is at work"):
        lock_folder(tmp_path)
    lock.close()
    lock_folder(tmp_path).close()
    with refused(r"cannot write to .*.lock/run \(Not a directory\)"):
        lock_folder(tmp_path / ".lock/run")

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)  # some network disks have no locks
    with lock_folder(tmp_path), lock_folder(tmp_path), staging_folder(tmp_path) as folder:
        (folder / "file").touch()
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("names", [("config.yaml", "run.json"), ("00000.safetensors", "null.safetensors")])
def test_the_file_that_marks_a_complete_folder_comes_last(tmp_path, monkeypatch, names):
    """Folders list their files in any order, and a process may be killed between two of them."""
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / name for name in reversed(names)]))
    with staging_folder(tmp_path) as folder:
        for name in names:
            (folder / name).touch()
    assert tuple(moved) == names


def test_staged_files_replace_those_of_a_killed_run(tmp_path):
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
