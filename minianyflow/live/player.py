"""The one player: a canvas that gets trajectories once, as bytes, and scrubs time in the browser.

`Pack` collects what a scene shows: numbers as bytes, everything else as JSON. `Player` is the widget; static/player.js
draws, and needs no widget: an offline page uses the same file. Panels, by their "kind":
    plane       points (T, n, 2) at T times; ghosts (n, 2) grey below; exact (T', n, 2) paths beside those `followed`
    triangle    a chain of times, its jumps as dots; `drag` lets one move them
    chart       lines over time, or bars
    video       clips (n, T, H, W) of greys
"""

from pathlib import Path

import anywidget
import numpy as np
import traitlets

from minianyflow.support.errors import InputError, choose

STATIC = Path(__file__).parent / "static"
KINDS = dict.fromkeys(("plane", "triangle", "chart", "video"))
FARTHEST = 8.0  # of a coordinate that is drawn, in data units: steps of 1/4096 up to there
GREYS = 15  # a video needs no more, and its bytes squeeze well


class Player(anywidget.AnyWidget):
    """scene: JSON, what to draw. payload: the bytes of its arrays. picked: a chain of times moved by hand; empty again
    once it is heard."""

    _esm = STATIC / "player.js"
    _css = STATIC / "player.css"
    scene = traitlets.Dict().tag(sync=True)
    payload = traitlets.Bytes(b"").tag(sync=True)
    picked = traitlets.List(traitlets.Float()).tag(sync=True)

    def show(self, scene, payload):
        """Draw another scene: one message, so that arrays and what names them never disagree."""
        with self.hold_sync():
            self.payload = payload
            self.scene = scene | {"serial": self.scene.get("serial", 0) + 1}


class Pack:
    """Arrays on their way to the browser: each once, however many scenes show it.

    add_points and add_video return the name to show an array by; `scene` makes the JSON, `payload` the bytes.
    """

    def __init__(self):
        self.pieces, self.arrays, self.size = {}, {}, 0

    def add_points(self, values, farthest=FARTHEST):
        """Coordinates of any shape as 16-bit numbers; what lies beyond `farthest` is put there."""
        values = np.asarray(values, dtype=np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"an array {values.shape} to draw holds NaN or infinity; expected finite numbers")
        scale = farthest / 32767
        return self._add(np.clip(np.rint(values / scale), -32767, 32767).astype("<i2"), "int16", scale)

    def add_video(self, clips):
        """Clips (n, T, H, W) in [0, 1], as bytes of GREYS + 1 shades."""
        clips = np.asarray(clips, dtype=np.float32)
        if clips.ndim != 4:
            raise InputError(f"clips of shape {clips.shape}; expected (n, T, H, W)")
        return self._add((np.rint(clips.clip(0, 1) * GREYS) * (255 // GREYS)).astype(np.uint8), "uint8", 1 / 255)

    def _add(self, array, kind, scale):
        data = array.tobytes()
        name = self.pieces.setdefault((data, array.shape, scale), f"a{len(self.pieces)}")
        if name not in self.arrays:
            self.arrays[name] = {"offset": self.size, "shape": list(array.shape), "type": kind, "scale": scale}
            self.size += len(data) + len(data) % 2
        return name

    @property
    def payload(self):
        """All arrays, each at its offset; numbers of two bytes at even ones."""
        return b"".join(data + bytes(len(data) % 2) for data, _, _ in self.pieces)

    def scene(self, title, panels, axis, **more):
        """The JSON of a scene.

        axis: {"label", "from", "to", "stops", "digits"}, what is scrubbed; `stops` are where arrow keys halt.
        more: `note`, a line below; `columns` of the grid of panels; `position` to begin at, 0 to 1;
        `duration` in milliseconds; `loop`.
        """
        for panel in panels:
            choose("kind of panel", panel["kind"], KINDS)
        used = {value for panel in panels for value in _names(panel)}
        arrays = {name: told for name, told in self.arrays.items() if name in used}
        return {"title": title, "panels": panels, "axis": axis, "arrays": arrays, **more}


def _names(panel):
    keys = ("points", "ghosts", "exact", "clips")
    return [panel[key] for key in keys if panel.get(key)] + [line["points"] for line in panel.get("lines", [])]


def unpacked(scene, payload, name):
    """The array of that name as the browser reads it, in data units; for tests, and for pictures of what is drawn."""
    told = choose("array", name, scene["arrays"])
    kind = {"int16": "<i2", "uint8": "u1"}[told["type"]]
    values = np.frombuffer(payload, kind, int(np.prod(told["shape"])), told["offset"])
    return values.reshape(told["shape"]) * np.float32(told["scale"])


def time_axis(stops, label="t", digits=2):
    """The axis of a scene that runs through `stops`, from the first to the last."""
    stops = [float(stop) for stop in stops]
    return {"label": label, "from": stops[0], "to": stops[-1], "stops": stops, "digits": digits}
