"""The scenes as one app for a class: Voila serves them, the first one drawn before a page is opened."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import ipywidgets
import nbformat

from minianyflow.live import scenes
from minianyflow.live.player import STATIC
from minianyflow.support.errors import InputError, choose

TITLES = {name: f"{number}  {title}" for number, (name, (_, _, title)) in enumerate(scenes.SCENES.items(), 1)}
EXTENSIONS = ["@voila-dashboards/widgets-manager8", "@jupyter-widgets/jupyterlab-manager", "anywidget"]  # and no others


def app(first: str = "race") -> ipywidgets.Widget:
    """The widget that Voila shows: a menu of the scenes above the chosen one."""
    choose("scene", first, TITLES)
    built, stage = {}, ipywidgets.VBox()
    menu = ipywidgets.ToggleButtons(options=[(title, name) for name, title in TITLES.items()], value=first)
    menu.style.button_width = "auto"

    def show(name):
        if name not in built:
            stage.children = [ipywidgets.Label(f"drawing {TITLES[name][3:]} (some seconds)")]
            try:
                built[name] = scenes.open_scene(name).widget
            except Exception as problem:  # a class must see why, and can go on with another scene
                stage.children = [ipywidgets.Label(f"{name} cannot be shown: {type(problem).__name__}: {problem}")]
                raise
        stage.children = [built[name]]

    show(first)
    menu.observe(lambda change: show(change.new), "value")
    return ipywidgets.VBox([menu, stage]).add_class("live")


def prepared(first: str) -> ipywidgets.Widget:
    """`app(first)` in the notebook that is served; then the file `ready` is beside it, with the error if any."""
    problem = ""
    try:
        return app(first)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        Path("unready").write_text(problem)
        Path("unready").replace("ready")  # a reader never sees half of it


@contextmanager
def serve(scene: str = "race", port: int = 0) -> Iterator[tuple[str, subprocess.Popen]]:
    """Voila with that scene drawn and waiting; yields its address and its process."""
    choose("scene", scene, TITLES)
    port = free_port(port)
    with TemporaryDirectory(prefix="minianyflow-live-") as folder:
        folder = Path(folder)
        write_notebook(folder / "live.ipynb", f"from minianyflow.live import app\napp.prepared({scene!r})")
        options = ["--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}", "--template=minianyflow"]
        options += ["--preheat_kernel=True", "--pool_size=1", "--show_tracebacks=True"]
        options += [f"--VoilaConfiguration.extension_allowlist={EXTENSIONS}"]
        environment = {"JUPYTER_PATH": str(STATIC), "IPYTHONDIR": str(folder)}
        command, ready = ["-m", "voila", folder / "live.ipynb", *options], folder / "ready"
        with serving(command, ready.exists, folder / "log", environment) as process:
            if problem := ready.read_text():
                raise InputError(f"{scene} cannot be drawn: {problem}")
            yield f"http://127.0.0.1:{port}/", process


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook of these code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def free_port(port: int = 0) -> int:
    """`port`, if it is free on loopback, or any free one for 0. Raises InputError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise InputError(f"port {port} is not free; expected one that is: name another, or 0 for any") from None
        return probe.getsockname()[1]


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
                last = (Path(log).read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
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
