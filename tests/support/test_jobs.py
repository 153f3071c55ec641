"""Jobs in processes of their own: their order, and what stops them."""

import os

import pytest

from minianyflow.support.jobs import run_jobs
from tests.refused import refused


@pytest.mark.slow
def test_a_job_waits_for_another_and_an_error_stops_all(tmp_path):
    jobs = {"later": (os.chmod, (tmp_path / "new",)), "first": (os.mkdir, (tmp_path / "new",))}
    assert run_jobs(jobs, 2, {"later": "first"}) == {"later": None, "first": None}
    assert (tmp_path / "new").is_dir()
    with pytest.raises(FileNotFoundError):
        run_jobs({"alone": (os.chmod, (tmp_path / "none",)), "other": (os.mkdir, (tmp_path / "other",))}, 1)
    assert not (tmp_path / "other").exists()


def test_bad_input_is_one_line():
    with refused("0 workers; expected at least 1"):
        run_jobs({}, 0)
