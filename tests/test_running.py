"""Jobs in processes of their own: order, results, and what stops them."""

import os

import pytest

from minianyflow.errors import InputError
from minianyflow.running import run_jobs


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
