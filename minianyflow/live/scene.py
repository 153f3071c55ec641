"""What every scene is made of: controls, one drawing function, a picture for where nothing runs.

A scene is an object; as the last line of a cell it shows itself. `state` gives the values of its controls, `draw` turns
such values into what the player shows and touches no widget: so it is tested, exported and called without a browser.
"""

import base64
import contextlib
import html
import itertools
import sys
import traceback

import ipywidgets
import torch
from traitlets import TraitError

from minianyflow.live.player import Pack, Player
from minianyflow.live.stills import still_png
from minianyflow.support.errors import InputError, choose

WIDE = ipywidgets.Layout(width="auto", min_width="260px")
STYLE = {"description_width": "initial"}


class Scene:
    """A player below its controls. Subclasses set `title`, `controls` (in `make_controls`) and `draw`.

    errors: what callbacks raised. It is shown below the player, printed, and kept here: ipywidgets drop it otherwise.
    """

    title = ""
    offline = ()  # (control, the values that an offline page offers), ...; others stay as they are
    offline_particles = 300

    def __init__(self, **start):
        self.errors, self.player = [], Player()
        self.controls = self.make_controls()
        for name, value in start.items():
            self.set(name, value)
        self.message = ipywidgets.HTML()
        row = ipywidgets.HBox(list(self.controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.widget = ipywidgets.VBox([row, self.player, self.message])
        self.widget.add_class("lm-scene")
        self.redraw()  # once before anything is wired: an error here reaches whoever asked for the scene
        for control in self.controls.values():
            control.observe(self.on_change, "value")
        self.player.observe(self.on_pick, "picked")

    def make_controls(self):
        """{name: ipywidgets control}, in the order shown."""
        return {}

    def draw(self, pack, **state):
        """The scene, JSON, for these values of the controls; arrays go into `pack`."""
        raise NotImplementedError

    def picked(self, chain):
        """What to do with a chain of times moved by hand; most scenes have none."""

    def possible(self, **state):
        """Whether these values of the controls go together: an offline page leaves out what does not."""
        return True

    @property
    def particles(self):
        """How many are drawn."""
        return 1000

    def state(self):
        """The values of the controls, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def set(self, name, value):
        """Move a control; InputError names what it can be."""
        control = choose("control", name, self.controls)
        try:
            control.value = value
        except TraitError:
            raise InputError(f"{name} {value!r}; expected {_expected(control)}") from None

    def redraw(self):
        """Draw what the controls say."""
        pack = Pack()
        with one_thread():
            scene = self.draw(pack, particles=self.particles, **self.state())
        self.player.show(scene, pack.payload)

    def on_change(self, change):
        """A control was moved."""
        self.guarded(self.redraw)

    def on_pick(self, change):
        """A dot was moved in the picture."""
        if chain := list(change["new"]):
            self.player.picked = []  # or the same again would be no change
            self.guarded(lambda: self.picked(chain))

    @contextlib.contextmanager
    def quiet(self, *names):
        """Controls may be moved in here without a new drawing for each."""
        for name in names:
            self.controls[name].unobserve(self.on_change, "value")
        try:
            yield
        finally:
            for name in names:
                self.controls[name].observe(self.on_change, "value")

    def guarded(self, work):
        """work(); an error is shown below the player, printed, kept in `errors` and raised again."""
        try:
            work()
            self.message.value = ""
        except Exception as problem:
            self.errors.append(problem)
            self.message.value = f'<pre class="lm-error">{type(problem).__name__}: {html.escape(str(problem))}</pre>'
            traceback.print_exc(file=sys.stderr)
            raise

    def payloads(self):
        """What an offline page holds: ({"title", "controls", "scenes"}, bytes); all possible scenes, by choices."""
        pack, state = Pack(), self.state()
        offline = dict(self.offline)
        controls = [_choices(name, self.controls[name], values, state[name]) for name, values in offline.items()]
        scenes = {}
        for chosen in itertools.product(*offline.values()):
            key = "|".join(_plain(value) for value in chosen)
            now = state | dict(zip(offline, chosen, strict=True))
            if self.possible(**now):
                scenes[key] = self.draw(pack, particles=self.offline_particles, **now)
        return {"title": self.title, "controls": controls, "scenes": scenes}, pack.payload

    def png(self):
        """The picture as it stands, with the time at the start of a scene: what a saved notebook keeps. PNG, bytes."""
        return still_png(self.player.scene, self.player.payload)

    def _repr_mimebundle_(self, include=None, exclude=None):
        """The widget for a running kernel; the picture and its name for everybody else."""
        bundle = self.widget._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        still = base64.b64encode(self.png()).decode()
        text = f"{self.title} (run this cell to move it)"
        return {**data, "image/png": still, "text/plain": text}, metadata


@contextlib.contextmanager
def one_thread():
    """Small networks run fastest on one thread, whatever the notebook has set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def dropdown(label, options, value=None):
    """A control that chooses one of `options`: a list, or {shown: value}."""
    options = list(options.items()) if isinstance(options, dict) else [(str(each), each) for each in options]
    value = options[0][1] if value is None else value
    return ipywidgets.Dropdown(options=options, value=value, description=label, layout=WIDE, style=STYLE)


def slider(label, options, value):
    """A control that slides along `options`, numbers."""
    options = [(f"{each:.3g}", each) for each in options]
    return ipywidgets.SelectionSlider(options=options, value=value, description=label, layout=WIDE, style=STYLE)


def _choices(name, control, values, value):
    shown = {each: text for text, each in getattr(control, "options", ())}
    labels = [str(shown.get(each, each)) for each in values]
    return {"name": name, "label": control.description, "values": list(values), "labels": labels, "value": value}


def _plain(value):
    """As JavaScript's String(value) writes it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _expected(control):
    options = getattr(control, "options", None)
    if options:
        return "one of " + ", ".join(repr(each[1]) for each in options)
    return f"{control.min} to {control.max}" if hasattr(control, "max") else "another value"
