"""The wheel, installed without the checkout: every command works from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from minianyflow.support.install import ROOT

pytestmark = pytest.mark.slow
TINY = "tiny base=tiny data=tiny/latents steps=2 samples.every=0 device=cpu"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `minianyflow` of a clean environment that has the wheel; what it depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("minianyflow", "toy_data"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, folder / "source"], folder)
    venv.create(folder / "clean", with_pip=False)
    python = folder / "clean/bin/python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    run([*pip, "--python", python, "install", "--quiet", "--no-deps", *folder.glob("*.whl")], folder)
    (folder / "empty").mkdir()
    place = run([python, "-c", "import minianyflow; print(minianyflow.__file__)"], folder / "empty")
    assert place.strip().startswith(str(site)), "the checkout is imported, not the wheel"
    return folder / "clean/bin/minianyflow"


def run(command, folder):
    """What a command prints, with `folder` as the working directory; its errors where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}: {done.stdout[-500:]} {done.stderr[-1500:]}"
    return done.stdout


@pytest.mark.long
def test_the_race_runs_from_an_empty_folder(installed, tmp_path):
    run([installed, "demo", "--evaluations", "1000", "--seeds", "0", "--quiet"], tmp_path)
    assert json.loads((tmp_path / "outputs/demo/any_step.json").read_text())["dataset"] == "spiral"


def test_the_race_finds_its_data_and_its_students(installed, tmp_path):
    code = "from minianyflow.plane.students import load_student; print(load_student('teacher_step').copies)"
    assert run([installed.with_name("python"), "-c", code], tmp_path).strip() == "1"
    assert "options:" in run([installed, "demo", "--help"], tmp_path)


ALL = """
import shlex, sys
from minianyflow.__main__ import main
for line in sys.argv[1:]:
    assert main(shlex.split(line)) == 0, line
"""


def test_wan_is_planned_distilled_sampled_and_exported_from_an_empty_folder(installed, tmp_path):
    """One process does all: that each command is found as a script, the tests above show."""
    lines = ["make-tiny-wan tiny", "plan --config wan-1.3b causal forward --gpu h100"]
    lines += [f"distill --config bidirectional forward {TINY} output=run"]
    lines += ["sample run --prompt 'a red disc' --steps 1 --output clips", "export run exported"]
    assert "planned, not measured" in run([installed.with_name("python"), "-c", ALL, *lines], tmp_path)
    assert (tmp_path / "clips/1_step-0.mp4").stat().st_size > 0
    assert (tmp_path / "exported/model_index.json").is_file()
