"""The course where others run it: with Colab's versions, from one notebook alone, in Binder."""

import re
import subprocess
import sysconfig
import venv

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from docs import course as runner
from minianyflow.course.notebooks import NOTEBOOKS
from minianyflow.support.install import ROOT
from tests.support.test_packages import PROJECT, canonical

VERSIONS = ROOT / "tests/data/colab.txt"
RUN = """
import sys, nbformat
from pathlib import Path
from docs.course import execute
nbformat.write(execute(Path(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """The Python of an environment with Colab's versions above the packages of this one."""
    folder = tmp_path_factory.mktemp("colab") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", "-r", VERSIONS]
    subprocess.run(install, check=True)
    return python


@pytest.mark.long
@pytest.mark.parametrize("number", ["00", "03", "06"])
def test_a_notebook_runs_with_colabs_versions(colab, tmp_path, number):
    path = next(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    subprocess.run([colab, "-c", RUN, path, tmp_path / path.name], check=True, cwd=ROOT)
    fresh = nbformat.read(tmp_path / path.name, 4)
    assert set(runner.claims_of(fresh)) == set(runner.claims_of(nbformat.read(path, 4)))  # every one holds
    scene = next(cell for cell in fresh.cells if cell.cell_type == "code" and "scenes." in cell.source)
    assert any("image/png" in output.get("data", {}) for output in scene.outputs)


@pytest.mark.long
def test_a_notebook_alone_fetches_the_library_and_installs_it(colab, tmp_path):
    source = nbformat.read(NOTEBOOKS / "00_the_claim.ipynb", 4)
    alone = nbformat.v4.new_notebook(cells=source.cells[:2])
    runner.frame(alone, "00_the_claim", f"file://{ROOT}")
    alone.cells.append(nbformat.v4.new_code_cell("import os, minianyflow\nprint(minianyflow.__file__, os.getcwd())"))
    nbformat.write(alone, tmp_path / "00_the_claim.ipynb")
    command = [colab, "-c", RUN.replace("from docs", f"sys.path.append({str(ROOT)!r})\nfrom docs")]
    subprocess.run([*command, "00_the_claim.ipynb", "done.ipynb"], check=True, cwd=tmp_path)
    printed = runner.printed(nbformat.read(tmp_path / "done.ipynb", 4))
    fetched = tmp_path / "course"
    assert f"{fetched / 'minianyflow/__init__.py'} {fetched / 'notebooks'}" in printed


def test_binder_gets_what_the_plane_needs_and_no_more():
    wanted = yaml.safe_load((ROOT / ".binder/environment.yml").read_text())["dependencies"]
    names = {canonical(re.split("[ >=<]", line)[0]) for line in wanted} - {"python", "pip"}
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["course"]]
    needed = {canonical(Requirement(line).name) for line in needed}
    assert names == needed - {"torch"} | {"pytorch-cpu"}
    assert "--no-deps --editable ." in (ROOT / ".binder/postBuild").read_text()
