"""Jobs in processes of their own, and batches ahead of their time: order, results, and what stops them."""

import os
import threading

import pytest

from minianyflow.errors import InputError
from minianyflow.running import ahead, run_jobs, staged


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

    drawn = ahead(draw, 9)
    assert drawn(4) == 40
    assert drawn_ahead.wait(10)  # nobody has asked for it
    assert [drawn(5), drawn(6)] == [50, 60]
    with pytest.raises(InputError, match="step 7"):
        drawn(7)
    assert drawn(8) == 80
    assert asked == [4, 5, 6, 7, 8]  # each once, and none beyond the end


def test_what_is_staged_takes_the_place_of_what_a_killed_run_left(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student/old").write_text("old")
    (tmp_path / "file").write_text("old")
    with staged(tmp_path) as folder:
        (folder / "student").mkdir()
        (folder / "student/new").write_text("new")
        (folder / "file").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"student", "file"}
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["new"]
    assert (tmp_path / "file").read_text() == "new"
