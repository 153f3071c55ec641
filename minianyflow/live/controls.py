"""The base of all scenes: controls, one drawing function, and a picture for a notebook whose kernel is not running.

`draw` turns the values of the controls into what the player shows, and touches no widget: offline pages call it, too.
"""

import base64
import contextlib
import html
import itertools
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import ClassVar

import ipywidgets
import torch
from traitlets import TraitError

from minianyflow.live.pictures import picture_png
from minianyflow.live.player import Pack, Player
from minianyflow.support.errors import InputError, choose

LOOKS = {"layout": {"width": "auto", "min_width": "260px"}, "style": {"description_width": "initial"}}


class Scene:
    """A player below its controls. Subclasses set `title` and define `make_controls` and `draw`.

    errors: exceptions of callbacks, which ipywidgets drops: they are shown below the player, printed and appended here.
    """

    title: ClassVar[str] = ""
    particles: ClassVar[int] = 1000
    offline: ClassVar[dict[str, tuple]] = {}  # {control: the values that an offline page offers}; others stay fixed
    offline_particles: ClassVar[int] = 300

    def __init__(self, **start):
        self.errors, self.player, self.message = [], Player(), ipywidgets.HTML()
        self.controls = self.make_controls() | {"seed": slider("noise, seed", range(10), 0)}
        for name, value in start.items():
            self.set(name, value)
        row = ipywidgets.HBox(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        self.widget = ipywidgets.VBox([row, self.player, self.message]).add_class("lm-scene")
        self.redraw()  # before controls are observed: an error in the first drawing is raised to the caller
        for control in self.controls.values():
            control.observe(self.on_change, "value")
        self.player.observe(self.on_pick, "picked")

    def make_controls(self) -> dict[str, ipywidgets.Widget]:
        """The controls by name, in the order shown; that of the noise's seed comes last."""
        return {}

    def draw(self, pack: Pack, **state) -> dict:
        """The JSON of the scene for these values of the controls; its arrays are added to `pack`."""
        raise NotImplementedError

    def picked(self, chain: list[float]) -> None:
        """React to a chain of times that a user has moved; most scenes have none."""

    def possible(self, **state) -> bool:
        """Whether these values of the controls go together; an offline page leaves out those that do not."""
        return True

    def state(self) -> dict:
        """The values of the controls, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def set(self, name: str, value) -> None:
        """Move a control. Raises InputError that lists the values it can have."""
        control = choose("control", name, self.controls)
        try:
            control.value = value
        except TraitError:
            options = [repr(option) for _, option in getattr(control, "options", ())]
            expected = ", ".join(options) or f"{control.min} to {control.max}"
            raise InputError(f"{name} {value!r}; expected one of {expected}") from None

    def redraw(self) -> None:
        """Draw the scene for the present values of the controls."""
        pack = Pack()
        with one_thread():
            scene = self.draw(pack, particles=self.particles, **self.state())
        self.player.show(scene, pack.payload)

    def on_change(self, change) -> None:
        """A control was moved."""
        self.guarded(self.redraw)

    def on_pick(self, change) -> None:
        """A dot was moved in the picture."""
        if chain := list(change["new"]):
            self.player.picked = []  # or the same chain again would be no change
            self.guarded(lambda: self.picked(chain))

    def guarded(self, work: Callable) -> None:
        """Call work(); an error is shown below the player, printed, appended to `errors` and raised again."""
        try:
            work()
            self.message.value = ""
        except Exception as problem:
            self.errors.append(problem)
            self.message.value = f'<pre class="lm-error">{type(problem).__name__}: {html.escape(str(problem))}</pre>'
            traceback.print_exc(file=sys.stderr)
            raise

    def offline_page(self) -> tuple[dict, bytes]:
        """({"title", "controls", "scenes"}, bytes): a scene per possible choice, by its values joined with "|"."""
        pack, state, controls, scenes = Pack(), self.state(), [], {}
        for name, values in self.offline.items():
            control = self.controls[name]
            label_of = {value: label for label, value in getattr(control, "options", ())}
            labels = [str(label_of.get(value, value)) for value in values]
            spec = {"name": name, "label": control.description, "labels": labels, "value": str(control.value)}
            controls.append(spec | {"values": [str(value) for value in values]})
        for values in itertools.product(*self.offline.values()):
            chosen = state | dict(zip(self.offline, values, strict=True))
            if self.possible(**chosen):
                scenes["|".join(map(str, values))] = self.draw(pack, particles=self.offline_particles, **chosen)
        return {"title": self.title, "controls": controls, "scenes": scenes}, pack.payload

    def png(self) -> bytes:
        """The picture at the scene's last time, as a PNG: a saved notebook contains it."""
        return picture_png(self.player.scene, self.player.payload)

    def _repr_mimebundle_(self, include=None, exclude=None):
        """The widget for a running kernel; the picture and its name for everybody else."""
        bundle = self.widget._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        text = f"{self.title} (run this cell to move it)"
        return {**data, "image/png": base64.b64encode(self.png()).decode(), "text/plain": text}, metadata


@contextlib.contextmanager
def one_thread():
    """One thread inside the block, whatever the notebook has set: small networks run fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def dropdown(label: str, options: Iterable | dict[str, object], value=None) -> ipywidgets.Dropdown:
    """A control that chooses one of `options`: a list, or {label: value}."""
    options = options if isinstance(options, dict) else {str(option): option for option in options}
    value = next(iter(options.values())) if value is None else value
    return ipywidgets.Dropdown(options=list(options.items()), value=value, description=label, **LOOKS)


def slider(label: str, options: Iterable[float], value: float) -> ipywidgets.SelectionSlider:
    """A control that slides along `options`, numbers."""
    options = [(f"{option:.3g}", option) for option in options]
    return ipywidgets.SelectionSlider(options=options, value=value, description=label, **LOOKS)
