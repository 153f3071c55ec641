"""The scenes as one full-window app for a class: Voila serves them from this machine, ready before a page is opened.

One kernel waits with the first scene drawn (a preheated one); the others are built when they are first asked for.
"""

import time
import webbrowser
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from minianyflow.live.browser import free_port, serving, write_notebook
from minianyflow.support.errors import InputError, choose

TITLES = {
    "race": "1  The race",
    "triangle": "2  The triangle",
    "backward_simulation": "3  Backward simulation",
    "exposure": "4  Exposure bias",
    "video": "5  Video",
}
FRONT_ENDS = [
    "@voila-dashboards/widgets-manager8",
    "@jupyter-widgets/jupyterlab-manager",
    "anywidget",
]  # whatever else is installed for JupyterLab stays out
STATIC = Path(__file__).parent / "static"


def app(first="race"):
    """The widget that Voila shows: a menu of the scenes above the one that is on."""
    import ipywidgets

    from minianyflow.live import scenes

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


def prepared(first):
    """`app(first)`, as the served notebook calls it: the file `ready` beside it says that it is drawn, or why not."""
    problem = ""
    try:
        return app(first)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        Path("unready").write_text(problem)
        Path("unready").replace("ready")  # whole, whenever it is looked at


@contextmanager
def serve(scene="race", port=0):
    """Voila with that scene drawn and waiting; yields its address and the process."""
    choose("scene", scene, TITLES)
    port = free_port(port)  # taken: said before anything is started
    with TemporaryDirectory(prefix="minianyflow-live-") as folder:
        folder = Path(folder)
        write_notebook(folder / "live.ipynb", f"from minianyflow.live import app\napp.prepared({scene!r})")
        options = ["--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}", "--template=minianyflow"]
        options += ["--preheat_kernel=True", "--pool_size=1", "--show_tracebacks=True"]
        options += [f"--VoilaConfiguration.extension_allowlist={FRONT_ENDS}"]
        command, address = ["-m", "voila", folder / "live.ipynb", *options], f"http://127.0.0.1:{port}/"
        environment = {"JUPYTER_PATH": str(STATIC), "IPYTHONDIR": str(folder)}
        with serving(command, address, folder / "log", environment, ready=folder / "ready") as process:
            if problem := (folder / "ready").read_text():
                raise InputError(f"{scene} cannot be drawn: {problem}")
            yield address, process


def run(scene="race", port=8866, open_page=True):
    """Serve until interrupted; opens the browser once the first scene is ready."""
    choose("scene", scene, TITLES)
    start = time.perf_counter()
    print(f"drawing {scene} (some seconds)", flush=True)
    with serve(scene, port) as (address, process):
        print(f"ready after {time.perf_counter() - start:.0f} s: {address} (Ctrl-C ends it)", flush=True)
        if open_page:
            webbrowser.open(address)
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("\nended")
            return 0
