"""A real browser and a JupyterLab beside it, for the tests and the benchmark: playwright drives Debian's chromium.

Nothing here leaves the machine: a request beyond loopback is stopped and counted.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlparse

from minianyflow.support import install
from minianyflow.support.errors import InputError

READY = '.lm-player[data-ready="1"]'  # the first picture is drawn
KERNEL = "globalThis.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
PATIENCE = 180000  # milliseconds until a page is given up: the cores may have other work
WINDOW = {"width": 1600, "height": 1000}
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0  # whose Chromium and Jupyter start only if told that this is meant


@contextmanager
def chromium():
    """A headless Chromium, playwright's Browser."""
    from playwright.sync_api import sync_playwright

    path = install.browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if ROOT else [])
        yield browser
        browser.close()


@contextmanager
def watched(browser, size=WINDOW, **options):
    """A page of its own: `page.complaints` holds its errors, `page.blocked` what it asked for beyond loopback."""
    context = browser.new_context(viewport=size, **options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.complaints, page.blocked = [], []

    def loopback_only(route):
        address = urlparse(route.request.url)
        if address.scheme in ("data", "blob", "file") or address.hostname in ("127.0.0.1", "localhost"):
            return route.continue_()
        page.blocked.append(route.request.url)
        return route.abort()

    page.route("**/*", loopback_only)
    page.on("pageerror", lambda problem: page.complaints.append(f"page: {problem}"))
    page.on("console", lambda line: page.complaints.append(f"console: {line.text}") if line.type == "error" else None)
    yield page
    context.close()


def free_port(wanted=0):
    """A loopback port that nobody has; `wanted`, if that is free, InputError if not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except (OSError, OverflowError):
            raise InputError(f"port {wanted} cannot be had, something may be running there; try --port 0") from None
        return probe.getsockname()[1]


@contextmanager
def serving(command, address, log, environment=None, ready=None, seconds=180):
    """A server as a process of its own, from its answer at `address` (or a file `ready`) to the end of the block.

    What it prints goes to the file `log`; if it does not come up, its last line is in the error.
    """
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=file, stderr=file, env=os.environ | (environment or {})
        )
    try:
        deadline = time.monotonic() + seconds
        while not (Path(ready).exists() if ready else _answers(address)):
            if process.poll() is not None or time.monotonic() > deadline:
                last = (Path(log).read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                name = command[command[0] == "-m"]
                raise InputError(f"{name} did not come up within {seconds} s; it says: {last}")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextmanager
def jupyter_lab(folder):
    """JupyterLab over `folder`, on loopback, with settings of its own; yields its address."""
    with TemporaryDirectory() as own:
        port = free_port()
        settings = {"JUPYTERLAB_SETTINGS_DIR": own, "JUPYTERLAB_WORKSPACES_DIR": own, "IPYTHONDIR": own}
        options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=", "--allow-root"]
        options += [
            f"--LabApp.app_settings_dir={install.ROOT / 'notebooks/.lab'}",
            "--LabApp.expose_app_in_browser=True",
        ]
        command, address = ["-m", "jupyterlab", *options, folder], f"http://127.0.0.1:{port}"
        with serving(command, f"{address}/api", Path(own) / "log", settings):
            yield address


def write_notebook(path, *cells):
    """A notebook of these code cells."""
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def open_notebook(page, address, name):
    """Open one notebook of that JupyterLab and wait until its kernel is ready."""
    page.goto(f"{address}/doc/tree/{name}")
    page.wait_for_function(f"{KERNEL}?.status == 'idle'")


def shut_down(page):
    """End the kernel of the notebook that is open: it would outlive the page."""
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def run_cells(page, restart=False):
    """Run every cell of the notebook that is open, after a restart of its kernel if so asked."""
    which = "restart-run-all" if restart else "run-all-cells"
    page.evaluate(f"() => {{ jupyterapp.commands.execute('notebook:{which}') }}")  # and do not wait for its end
    if restart:
        page.click(".jp-Dialog .jp-mod-accept")
