"""Set-up with nothing but Python: a `.venv` beside the package, filled with the pinned packages."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from minianyflow.support.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def setup(arguments=None):
    """Make .venv and install the pinned packages into it; does nothing where that is done."""
    folder, pins = ROOT / ".venv", ROOT / "requirements.txt"
    stamp = folder / "installed"
    wanted = hashlib.sha256(pins.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    if sys.version_info < (3, 11):  # noqa: UP036 (runs before anything has checked)
        raise InputError(f"Python {sys.version.split()[0]} found; expected 3.11 or newer: make PYTHON=python3.12 demo")
    print("setting up .venv with the packages of requirements.txt (once; a few minutes)", flush=True)
    try:
        venv.create(folder, with_pip=True)
    except (subprocess.CalledProcessError, OSError):
        raise InputError("could not make .venv; on Debian or Ubuntu: apt install python3-venv") from None
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for what in (["-r", pins], ["--no-deps", "--editable", ROOT]):
        if subprocess.call([*map(str, install), *map(str, what)]):
            raise InputError(f"pip could not install {what[-1]}; see its message above, then run the command again")
    stamp.write_text(wanted)
    return 0


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
APPLICATIONS = (  # where other systems keep one
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
)


def browser(install=False):
    """The path of a Chromium, which tests and the benchmark drive; InputError where there is none.

    install: with root on Debian, get it by apt-get first; nothing of this is ever downloaded from elsewhere.
    """
    found = [shutil.which(name) for name in BROWSERS] + [path for path in APPLICATIONS if Path(path).exists()]
    if any(found):
        return next(filter(None, found))
    if install and shutil.which("apt-get") and os.geteuid() == 0:
        print("installing Debian's chromium, which the browser tests drive (once; a minute or more)", flush=True)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for step in (["update"], ["install", "--yes", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
            subprocess.call(["apt-get", "--quiet", *step], env=environment, stdout=subprocess.DEVNULL)
        return browser()
    raise InputError("no browser found, and the browser tests drive one: apt install chromium (or install Chrome)")
