"""The base of all scenes: a widget whose controls and pictures live in the page, and a picture for everybody else.

All scenes but the stream compute in the page (static/scenes.js), from weights and noises that `data` hands over once:
the kernel is asked for nothing after that. A scene without a `kind` is drawn here, by `draw`, when a control is moved.
"""

import base64
import contextlib
import itertools
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import anywidget
import torch
import traitlets

from minianyflow.live.player import STATIC, Pack, script
from minianyflow.support.errors import InputError, choose


class Scene(anywidget.AnyWidget):
    """Subclasses set `title`, `picture_of` and `kind`, and define `make_controls`, and `data` or `draw`.

    state: the values of the controls, as the page has them now. errors: exceptions of `draw`, which the page shows.
    """

    title: ClassVar[str] = ""
    kind: ClassVar[str] = ""  # the name of its function in scenes.js; "": `draw` makes its pictures
    particles: ClassVar[int] = 1000
    offline: ClassVar[dict[str, tuple]] = {}  # of a scene with `draw`: {control: the values that a page holds}

    _ipython_display_ = None  # that of ipywidgets 7 (Colab) would leave no picture
    _esm = script()
    _css = (STATIC / "player.css").read_text(encoding="utf-8")
    page = traitlets.Dict().tag(sync=True)
    payload = traitlets.Bytes(b"").tag(sync=True)  # the bytes of the page's arrays
    state = traitlets.Dict().tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)  # what `draw` made last, and the bytes of its arrays
    picture = traitlets.Bytes(b"").tag(sync=True)

    def __init__(self, **start):
        super().__init__()
        self.errors = []
        self.controls = self.make_controls() | {"seed": slider("noise, seed", range(10), 0)}
        for name, value in start.items():
            control = choose("control", name, self.controls)
            if value not in control["values"]:
                expected = ", ".join(map(repr, control["values"]))
                raise InputError(f"{name} {value!r}; expected one of {expected}")
            control["value"] = value
        self.state = {name: control["value"] for name, control in self.controls.items()}
        pack = Pack()
        self.page, self.payload = self.described(data=self.data(pack), arrays=pack.arrays), pack.payload
        if not self.kind:
            self.redraw()
            self.observe(lambda change: self.redraw(), "state")

    def described(self, names=None, **more) -> dict:
        """What the page is told: its controls (names: only these) and their values, and `more`."""
        controls = [
            {"name": name, **control} for name, control in self.controls.items() if names is None or name in names
        ]
        state = {control["name"]: control.pop("value") for control in controls}
        return {
            "kind": self.kind,
            "title": self.title,
            "particles": self.particles,
            "controls": controls,
            "state": state,
        } | more

    def make_controls(self) -> dict[str, dict]:
        """The controls by name, in the order shown; that of the noise's seed comes last."""
        return {}

    def data(self, pack: Pack) -> dict:
        """What the page computes from; its arrays are added to `pack`."""
        return {}

    def draw(self, pack: Pack, **state) -> dict:
        """The JSON of the scene for these values of the controls; its arrays are added to `pack`."""
        raise NotImplementedError

    def redraw(self) -> None:
        """Draw the scene for the present state: one message. An error is shown, printed, appended and raised again."""
        pack = Pack()
        try:
            with one_thread():
                drawn = self.draw(pack, **self.state)
        except Exception as problem:
            self.errors.append(problem)
            self.shown = {"error": f"{type(problem).__name__}: {problem}"}
            traceback.print_exc(file=sys.stderr)
            raise
        with self.hold_sync():
            self.picture = pack.payload
            self.shown = drawn | {"number": self.shown.get("number", 0) + 1}  # two pictures may have the same figures

    def offline_page(self) -> tuple[dict, bytes]:
        """The page that needs no kernel, and the bytes of its arrays: of `draw`, every choice in `offline`."""
        if self.kind:
            return self.page, self.payload
        pack, state, scenes = Pack(), dict(self.state), {}
        page = self.described(self.offline)
        for control in page["controls"]:
            held = self.offline[control["name"]]
            control["labels"] = [control["labels"][control["values"].index(value)] for value in held]
            control["values"] = list(held)
        for values in itertools.product(*self.offline.values()):
            with one_thread():
                drawn = self.draw(pack, **state | dict(zip(self.offline, values, strict=True)))
            scenes["|".join(map(str, values))] = drawn
        return page | {"scenes": scenes}, pack.payload

    def _repr_mimebundle_(self, **options):
        """The widget for a running kernel; for everybody else its picture, as it opens, and its name."""
        data, metadata = super()._repr_mimebundle_(**options)
        data["text/plain"] = f"{self.title} (run this cell to move it)"
        if self.saved.exists():
            data["image/png"] = base64.b64encode(self.saved.read_bytes()).decode()
            metadata["image/png"] = {"alt": f"{self.title}: a picture of the scene"}
        return data, metadata

    @property
    def saved(self) -> Path:
        """The picture for where no scene runs."""
        return STATIC / "pictures" / f"{type(self).__name__.lower()}.png"


@contextlib.contextmanager
def one_thread():
    """One thread inside the block, whatever the notebook has set: small networks run fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def dropdown(label: str, options: Iterable | dict[str, object], value=None) -> dict:
    """A control that chooses one of `options`: a list, or {label: value}."""
    options = options if isinstance(options, dict) else {str(option): option for option in options}
    values = list(options.values())
    return {"label": label, "labels": list(options), "values": values, "value": values[0] if value is None else value}


def slider(label: str, options: Iterable[float], value: float, below: str = "") -> dict:
    """A control that slides along `options`, numbers; below: the control whose value it stays under."""
    return dropdown(label, {f"{option:.3g}": option for option in options}, value) | {"slider": True, "below": below}
