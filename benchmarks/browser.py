"""A real browser and a JupyterLab, for the tests and for scene_speed.py: playwright drives Debian's chromium.

Nothing leaves the machine: a request beyond loopback is blocked and recorded.
"""

import functools
import http.server
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urldefrag, urlparse

import nbformat

from minianyflow.support.commands import lab_command
from minianyflow.support.errors import InputError

TOKEN = secrets.token_hex()  # or any account of the machine could run code in the kernels meanwhile
KERNEL = "globalThis.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
PATIENCE = 180000  # milliseconds until a page is given up: the cores may have other work
WINDOW = {"width": 1600, "height": 1000}


@contextmanager
def watched(browser, size=WINDOW, **options) -> Iterator:
    """A page of its own: `page.complaints` lists its errors, `page.blocked` its requests beyond loopback."""
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


# What a page links to, with the ids it has; pictures without words; how wide it is.
READ = """() => ({
  links: [...document.querySelectorAll("a, iframe, img, link, script")].map((part) => part.href || part.src || ""),
  ids: [...document.querySelectorAll("[id], a[name]")].map((part) => part.id || part.name),
  dumb: [...document.images].filter((image) => image.alt.trim().length < 4).map((image) => image.src),
  nameless: [...document.querySelectorAll("iframe")].filter((frame) => !frame.title).map((frame) => frame.src),
})"""


def page_faults(browser, folder: Path) -> tuple[int, list[str]]:
    """How often a page of a site was looked at, from a file and http, wide and narrow, light and dark; its faults."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    ids, links, seen, faults = {}, set(), 0, []
    with served(folder) as address:
        for root, widths in (
            (folder.as_uri(), (1400, 390)),
            (address, (390, 1400)),
        ):  # opened in one, turned to the other
            with watched(browser) as page:
                for name in names:
                    page.set_viewport_size({"width": widths[0], "height": 900})
                    page.goto(f"{root}/{name}")
                    for width, theme in product(widths, ("light", "dark")):
                        page.set_viewport_size({"width": width, "height": 900})
                        page.emulate_media(color_scheme=theme)
                        wide, seen = page.evaluate("document.documentElement.scrollWidth > innerWidth"), seen + 1
                        faults += [f"{name}: wider than {width}, {theme}"] * wide
                    read = page.evaluate(READ)
                    faults += [f"{name}: no words for {part}" for part in read["dumb"] + read["nameless"]]
                    faults += [f"{name}: {complaint}" for complaint in page.complaints]
                    page.complaints.clear()
                    ids[name] = set(read["ids"])
                    links |= {(name, link.removeprefix(root)) for link in read["links"] if link.startswith(root)}
                page.goto(f"{root}/search.html?q=semigroup")
                page.locator("#search-results li").nth(3).wait_for()
                faults += [f"request for {address}" for address in page.blocked]
    for name, link in sorted(links):
        path, place = urldefrag(link)
        path = unquote(urlparse(path).path).lstrip("/")
        path = path + "index.html" if path.endswith("/") or not path else path
        if not (folder / path).is_file() or (place and path in ids and unquote(place) not in ids[path]):
            faults.append(f"{name}: dead link to {link}")
    return seen, faults


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A static host of `folder` on loopback, as its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextmanager
def jupyter_lab(folder, alone: int = 600) -> Iterator[str]:
    """JupyterLab over `folder`, on loopback, with settings of its own; yields its address. alone: of `lab_command`."""
    with TemporaryDirectory() as own:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--LabApp.expose_app_in_browser=True"]
        command = [*lab_command(alone), *options, folder]
        settings = {
            "JUPYTER_TOKEN": TOKEN,
            "JUPYTERLAB_SETTINGS_DIR": own,
            "JUPYTERLAB_WORKSPACES_DIR": own,
            "IPYTHONDIR": own,
        }
        with serving(command, lambda: answers(f"{address}/api"), Path(own) / "log", settings):
            yield address


def answers(address: str) -> bool:
    """Whether a server answers there."""
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def open_notebook(page, address: str, name: str) -> None:
    """Open a notebook of that JupyterLab and wait until its kernel is ready."""
    page.goto(f"{address}/doc/tree/{name}?token={TOKEN}")
    page.wait_for_function(f"{KERNEL}?.status == 'idle'")


def shut_down(page) -> None:
    """End the kernel of the open notebook: it would outlive the page."""
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def run_cells(page, restart: bool = False) -> None:
    """Start all cells of the open notebook, after a restart of its kernel if `restart`."""
    which = "restart-run-all" if restart else "run-all-cells"
    page.evaluate(f"() => {{ jupyterapp.commands.execute('notebook:{which}') }}")  # and do not wait for its end
    if restart:
        page.click(".jp-Dialog .jp-mod-accept")


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook of these code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


@contextmanager
def serving(
    command: Sequence, ready: Callable[[], bool], log: Path, environment: dict[str, str], seconds: float = 180
) -> Iterator[subprocess.Popen]:
    """A server, `python COMMAND`, from when `ready()` is true: its process. InputError with its last line if not."""
    command = [sys.executable, *map(str, command)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment)
    try:
        deadline = time.monotonic() + seconds
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                last = (Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[
                    -1
                ]
                raise InputError(f"{' '.join(command[1:3])} was not ready within {seconds} s; it says: {last}")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
