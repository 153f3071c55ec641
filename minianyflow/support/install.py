"""Set-up with nothing but Python: a `.venv` beside the package, filled with the pinned packages."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from minianyflow.support.errors import InputError

LOCK = "minianyflow/support/lock.txt"
ROOT = Path(__file__).resolve().parents[2]


def needs_checkout(command):
    """Raise InputError where the package was installed without the project around it."""
    if not (ROOT / "pyproject.toml").is_file():
        raise InputError(f"{command} works in a checkout of the project; expected one: this is an installed package")


def setup():
    """Make .venv and install the pinned packages into it; does nothing where that is done."""
    if sys.version_info < (3, 11):  # noqa: UP036 (runs before anything has checked)
        raise InputError(f"Python {sys.version.split()[0]} found; expected 3.11 or newer: make PYTHON=python3.12 demo")
    _environment(".venv", ROOT / "requirements.txt", ROOT / LOCK)
    return 0


def lowest_python():
    """The Python of .venv-lowest: every package but torch in the lowest version that pyproject.toml allows."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = ("video", "distill", "parquet", "course", "site", "test")
    extras = [project["optional-dependencies"][name] for name in wanted]
    pins = [line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if line.startswith("torch==")]
    pins += [line.replace(">=", "==") for line in sum(extras, project["dependencies"]) if not line.startswith("torch>")]
    listed = ROOT / "build" / "lowest.txt"
    listed.parent.mkdir(exist_ok=True)
    listed.write_text("\n".join(pins) + "\n")
    return str(_environment(".venv-lowest", listed))


AUDIT, PYTHONS = "pip-audit==2.9.0", ("3.11", "3.12", "3.13", "3.14")


def audit():
    """(what is wrong, what could not be looked up) with the pinned packages, lines each.

    Wrong are versions with a known vulnerability, and a Python that the lock does not install on. Both need a network.
    """
    listed, wrong, skipped = ROOT / "build/audit.txt", [], []
    listed.parent.mkdir(exist_ok=True)
    listed.write_text(f"{AUDIT}\n")
    try:
        python = str(_environment(".venv-audit", listed))
    except InputError as problem:
        return [], [f"not audited: {problem}"]
    command = [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off"]
    done = _quiet(*command, "--requirement", ROOT / "requirements.txt")
    try:
        for package in json.loads(done.stdout)["dependencies"]:
            skipped += [package["skip_reason"]] if "skip_reason" in package else []
            for known in package.get("vulns", ()):
                fixed = ", ".join(known["fix_versions"]) or "none yet"
                wrong.append(f"{package['name']} {package['version']}: {known['id']}; fixed in {fixed}")
    except ValueError:  # no report
        return [], [f"not audited: {_last_line(done)}"]
    for version in PYTHONS:
        where = ["--python-version", version, "--only-binary=:all:", "--target", listed.with_name("none")]
        install = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--require-hashes"]
        if (done := _quiet(*install, *where, "-r", ROOT / LOCK)).returncode:
            wrong.append(f"the lock does not install on Python {version}: {_last_line(done)}")
    return wrong, [f"{len(skipped)} packages not audited: {skipped[0]}"] if skipped else []


def _quiet(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def _last_line(done):
    return ([line for line in done.stderr.splitlines() if line.strip()] or ["no words"])[-1]


def _environment(name, requirements, lock=None):
    """The Python of a virtual environment with these packages and the project itself; made or renewed if need be.

    lock: a file with hashes, which takes the place of `requirements` but for torch.
    """
    folder = ROOT / name
    python, stamp = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"), folder / "installed"
    files = [requirements, ROOT / "pyproject.toml", *([lock] if lock else [])]
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return python
    print(f"setting up {name} with the packages of {requirements.name} (once; a few minutes)", flush=True)
    try:
        venv.create(folder, with_pip=True)
    except (subprocess.CalledProcessError, OSError):
        raise InputError(f"could not make {name}; on Debian or Ubuntu: apt install python3-venv") from None
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    packages = [["-r", requirements]]
    if lock:
        torch = [line for line in requirements.read_text("utf-8").splitlines() if line.startswith("torch==")]
        packages = [torch, ["--no-deps", "--require-hashes", "-r", lock]]
    for what in (*packages, ["--no-deps", "--editable", ROOT]):
        if subprocess.call([*map(str, install), *map(str, what)]):
            raise InputError(f"pip could not install {what[-1]}; see its message above, then run the command again")
    stamp.write_text(wanted)
    return python


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
APPLICATIONS = (  # where other systems keep one
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
)


def browser(install=False):
    """The path of a Chromium, for tests and the benchmark; install: where there is none, get Debian's by apt-get."""
    if found := next(filter(None, map(shutil.which, (*BROWSERS, *APPLICATIONS))), None):
        return found
    if install and shutil.which("apt-get") and os.geteuid() == 0:
        print("installing Debian's chromium, which the browser tests drive (once; a minute or more)", flush=True)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for step in (["update"], ["install", "--yes", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
            subprocess.call(["apt-get", "--quiet", *step], env=environment, stdout=subprocess.DEVNULL)
        return browser()
    how = "`python -m minianyflow setup --browser`, as root on Debian or Ubuntu, or install Chrome"
    raise InputError(f"no browser found, and the browser tests drive one: {how}")
