"""What is installed, pinned and imported agrees with what is said."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from minianyflow.support import install
from minianyflow.support.errors import InputError

ROOT = install.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))
UNPINNED = {"peers"}  # for benchmarks/peers.py alone: torchcfm brings lightning and a torchvision that must fit torch
EXTRAS = [needed for extra, needed in PROJECT["optional-dependencies"].items() if extra not in UNPINNED]
NEEDED = [Requirement(line) for line in sum(EXTRAS, PROJECT["dependencies"])]
FILES = [path for folder in ("minianyflow", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_inside_its_range():
    pins = {canonical(name): value for name, value in PINS.items()}
    for needed in NEEDED:
        assert Version(pins[canonical(needed.name)]) in needed.specifier, needed
    assert pins["torch"] == "2.13.0"
    torch = next(needed for needed in NEEDED if needed.name == "torch")
    assert torch.specifier.contains("2.12.0")  # a range, not a pin


def test_every_pin_but_torch_is_locked_by_its_hashes():
    text = (ROOT / install.LOCK).read_text("utf-8")
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)(?: ; [^\n]*)? \\\n    --hash=sha256:[0-9a-f]{64}", text, re.M))
    expected = {canonical(name): value for name, value in PINS.items() if name != "torch"}
    assert {canonical(name): value for name, value in locked.items()} == expected


def test_what_is_installed_is_what_is_pinned():
    for name, pin in PINS.items():
        assert Version(version(name)).public == pin, name


def test_conda_gets_the_same_packages():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda[-1] == {"pip": ["-r requirements.txt", "-e ."]}
    python = next(line for line in conda[:-1] if line.startswith("python"))
    assert python.removeprefix("python") == PROJECT["requires-python"]
    assert {line.split(">")[0] for line in conda[:-1]} == {"python", "pip"}  # nothing but the pins decides a version


def test_only_what_nothing_else_needs_goes_unpinned():
    """An extra without pins: not installed by `make`, imported by one module, inside its functions."""
    pins = {canonical(name) for name in PINS}
    unpinned = [Requirement(line).name for extra in UNPINNED for line in PROJECT["optional-dependencies"][extra]]
    for name in unpinned:
        assert canonical(name) not in pins, name
        importing = re.compile(rf"^( *)(?:from|import) {name.replace('-', '_')}\b", re.M)
        found = {path.stem: lines for path in FILES if (lines := importing.findall(path.read_text()))}
        assert list(found) == ["peers"]
        assert all(found["peers"]), f"{name} is imported at the top of peers.py"


def in_a_fresh_interpreter(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_importing_is_light():
    """The mathematics and the plane without its pictures: no diffusers, no matplotlib, two seconds beyond torch."""
    rooms = [path.stem for path in (ROOT / "minianyflow").glob("*.py") if path.stem[0] != "_"]
    rooms += ["networks.mlp", "plane.race", "plane.exposure", "plane.students"]
    imports = "; ".join(["from minianyflow import *", *(f"import minianyflow.{name}" for name in rooms)])
    heavy = {"diffusers", "transformers", "accelerate", "peft", "matplotlib", "scipy", "torchdiffeq", "anywidget"}
    code = f"import sys, time, torch; before, start = {{*sys.modules}}, time.process_time(); {imports}; "
    code += f"print(time.process_time() - start, *{heavy} & {{*sys.modules}} - before)"
    for _ in range(3):  # the first may find a cold disk
        seconds, *loaded = in_a_fresh_interpreter(code).split()
        assert loaded == []
        if float(seconds) < 2:
            break
    assert float(seconds) < 2


def test_imports_go_down_the_floors():
    """The layers in pyproject.toml: the mathematics knows no network, wan knows no plane, and so on."""
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_package_itself_needs_only_python():
    """`python -m minianyflow setup` runs before anything is installed."""
    loaded = in_a_fresh_interpreter("import sys; import minianyflow.support.cli; print(*sys.modules)").split()
    assert not {"torch", "numpy", "tqdm"} & set(loaded)


def test_set_up_does_nothing_where_it_is_done_and_names_what_failed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install.venv, "create", lambda folder, with_pip: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(install.subprocess, "call", lambda command: calls.append(command) or 0)
    (tmp_path / install.LOCK).parent.mkdir(parents=True)
    for name in ("requirements.txt", "pyproject.toml", install.LOCK):
        (tmp_path / name).write_text("torch==2.13.0\n" if name == "requirements.txt" else "")
    assert install.setup() == 0
    assert [command[6:] for command in calls] == [
        ["torch==2.13.0"],
        ["--no-deps", "--require-hashes", "-r", str(tmp_path / install.LOCK)],
        ["--no-deps", "--editable", str(tmp_path)],
    ]
    install.setup()
    assert len(calls) == 3  # done once
    (tmp_path / install.LOCK).write_text("numpy==2.0.0")
    monkeypatch.setattr(install.subprocess, "call", lambda command: 1)
    with pytest.raises(InputError, match=r"pip could not install torch==2\.13\.0"):
        install.setup()
    monkeypatch.setattr(install.sys, "version_info", (3, 10, 0))
    with pytest.raises(InputError, match=r"expected 3\.11 or newer"):
        install.setup()


@pytest.mark.parametrize("found", ["known", "skipped", "none", "no network"])
def test_an_audit_names_what_is_known_and_what_it_could_not_look_up(tmp_path, monkeypatch, found):
    packages = {
        "known": {"name": "x", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]},
        "skipped": {"name": "x", "skip_reason": "not found"},
        "none": {"name": "x", "version": "1", "vulns": []},
    }
    report = json.dumps({"dependencies": [packages[found]]}) if found in packages else ""

    def quiet(*command):
        audits = "pip_audit" in command
        said = "warning\nno such host" if audits else "no wheel"
        return SimpleNamespace(stdout=report, stderr=said, returncode=int("3.14" in command))

    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "_environment", lambda *given: "python")
    monkeypatch.setattr(install, "_quiet", quiet)
    wheels = [] if found == "no network" else ["the lock does not install on Python 3.14: no wheel"]
    unknown = {"skipped": ["1 packages not audited: not found"], "no network": ["not audited: no such host"]}
    assert install.audit() == (["x 1: CVE-1; fixed in 2"] * (found == "known") + wheels, unknown.get(found, []))
