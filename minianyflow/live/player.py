"""What the one player of the page is given: `Pack` collects numbers as bytes; everything else is JSON.

static/player.js draws; in a notebook it is a widget's code, in a page it needs none. Panels, by their "kind":
    plane       points (T, n, 2) at T times; ghosts (n, 2) grey below; exact (T', n, 2) paths beside those `followed`
    triangle    a chain of times, its jumps as dots; with `drag` a user can move them
    chart       lines over time, or bars
    curve       a measure against the number of steps
    pen         paper to draw on; ghosts (n 2): what was made of the drawing
    video       clips (n, T, H, W) of greys
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minianyflow.support.errors import InputError, choose

STATIC = Path(__file__).parent / "static"
KINDS = dict.fromkeys(("plane", "triangle", "chart", "curve", "pen", "video"))
GREYS = 15  # shades of a stream; so few compress well


def script() -> str:
    """All of the page's code as one module: player.js after the others, each in a function that a worker runs too."""
    text = {
        name: (STATIC / f"{name}.js").read_text("utf-8") for name in ("compute", "learn", "video", "scenes", "player")
    }
    text = {name: re.sub(r"^import .*\n", "", code, flags=re.M) for name, code in text.items()}
    public = r"^export (?:const|class|function\*?) (\w+)"
    names = {name: ", ".join(re.findall(public, text[name], re.M)) for name in text}
    inner = {name: re.sub(r"^export (?=const|class|function)", "", text[name], flags=re.M) for name in text}
    compute, learn, video, scenes = (
        f"() => {{\n{inner[name]}\nreturn {{ {names[name]} }};\n}}" for name in list(text)[:4]
    )
    return f"""const compute = {compute};
const math = compute();
const learn = {learn};
const learning = learn();
const video = ({video})();
const WORKER = `const math = (${{compute}})(); onmessage = (${{learn}})().answer;`;
const {{ COMPUTED, World }} = ({scenes})();
{text["player"]}"""


class Pack:
    """Arrays on their way to the browser, once per array; panels show them by the names that add_* return."""

    def __init__(self):
        self.names, self.arrays, self.data = {}, {}, bytearray()

    def add_exact(self, values: ArrayLike) -> str:
        """Numbers of any shape as they are: float32, float16, whose bits the page gets, or int32 for whole ones."""
        values = np.asarray(values)
        if values.dtype == np.float16:
            return self._add(values, "float16", 1)
        whole = np.issubdtype(values.dtype, np.integer)
        return self._add(values.astype("<i4" if whole else "<f4"), "int32" if whole else "float32", 1)

    def add_video(self, clips: ArrayLike) -> str:
        """Clips (n, T, H, W) in [0, 1], as bytes of GREYS + 1 shades."""
        clips = np.asarray(clips, dtype=np.float32)
        if clips.ndim != 4:
            raise InputError(f"clips of shape {clips.shape}; expected (n, T, H, W)")
        return self._add((np.rint(clips.clip(0, 1) * GREYS) * (255 // GREYS)).astype(np.uint8), "uint8", 1 / 255)

    def _add(self, array, kind, scale):
        data = array.tobytes()
        name = self.names.setdefault((data, array.shape, scale), f"a{len(self.names)}")
        if name not in self.arrays:
            self.arrays[name] = {"offset": len(self.data), "shape": list(array.shape), "type": kind, "scale": scale}
            self.data += data + bytes(-len(data) % 4)  # the browser reads 32-bit numbers at such offsets only
        return name

    @property
    def payload(self) -> bytes:
        """All arrays, one after another."""
        return bytes(self.data)

    def scene(self, title: str, panels: list[dict], axis: dict, **more) -> dict:
        """The JSON of a scene. panels: dicts with a "kind"; `measures`, {name: text}, is printed below.

        axis: of `time_axis`. more: `note`, a line below; `columns` of the grid of panels; `position` to begin at, 0 to
        1; `duration` in milliseconds; `loop`.
        """
        for panel in panels:
            choose("kind of panel", panel["kind"], KINDS)
        parts = panels + [line for panel in panels for line in panel.get("lines", [])]
        used = {part.get(key) for part in parts for key in ("points", "ghosts", "exact", "clips")}
        arrays = {name: array for name, array in self.arrays.items() if name in used}
        return {"title": title, "panels": panels, "axis": axis, "arrays": arrays, **more}


def time_axis(stops: Iterable, label: str = "t", digits: int = 2) -> dict:
    """The axis of a scene that runs through `stops`, where arrow keys halt, from the first to the last."""
    stops = [float(stop) for stop in stops]
    return {"label": label, "from": stops[0], "to": stops[-1], "stops": stops, "digits": digits}
