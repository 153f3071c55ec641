"""A still picture of a scene for notebooks whose kernel is not running. A tenth of the time of importing matplotlib."""

import io
import textwrap
from itertools import pairwise

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from minianyflow.live.player import unpack

PANEL, CLIPS, GAP, LINE = 290, 210, 14, 22  # pixels: width of a panel, of a video panel, between panels, height of text
LETTER = 6.9  # pixels, width of a letter of the note, with a margin
SMOOTH = 2  # a panel is drawn this much larger and reduced, for smooth edges
INK, GREY = "#1a1a1a", "#777777"
EXPOSURE = "This picture shows all frames of a clip at once, later ones brighter."


def picture_png(scene: dict, payload: bytes, colours: int = 64) -> bytes:
    """`picture` as a small PNG."""
    file = io.BytesIO()
    picture(scene, payload).quantize(colours, dither=Image.Dither.NONE).save(file, "png")
    return file.getvalue()


def picture(scene: dict, payload: bytes) -> Image.Image:
    """A scene at its last time, with panels, measures and note as in the player; all frames of a video at once."""
    panels, columns = scene["panels"], scene.get("columns", len(scene["panels"]))
    tiles = [DRAW[panel["kind"]](panel, lambda name: unpack(scene, payload, name)) for panel in panels]
    wide, tall = (max(sizes) for sizes in zip(*(tile.size for tile in tiles), strict=True))
    row = tall + LINE * (max(len(panel.get("measures", {})) for panel in panels) + 1) + GAP
    width, rows = columns * (wide + GAP) + GAP, -(-len(panels) // columns)
    video = any(panel["kind"] == "video" for panel in panels)
    note = textwrap.wrap(scene.get("note", "") + f" {EXPOSURE}" * video, int((width - 2 * GAP) / LETTER))
    below = 2 * LINE + rows * row  # where the note begins
    sheet = Image.new("RGB", (width, below + (len(note) * LINE + GAP if note else 0)), "white")
    pen = ImageDraw.Draw(sheet)
    _text(pen, width / 2, LINE, scene["title"], 20)
    for place, (panel, tile) in enumerate(zip(panels, tiles, strict=True)):
        left, top = GAP + place % columns * (wide + GAP), 2 * LINE + place // columns * row
        _text(pen, left + wide / 2, top + LINE / 2, panel["title"], 17)
        sheet.paste(tile, (left, top + LINE))
        for line, measure in enumerate(panel.get("measures", {}).items()):
            _text(pen, left + wide / 2, top + LINE * (line + 1.5) + tall, ": ".join(measure), 15)
    for line, words in enumerate(note):
        _text(pen, GAP, below + LINE * (line + 0.5), words, 15, "lm")
    return sheet


def _text(pen, x, y, words, size, anchor="mm"):
    pen.text((x, y), words, INK, ImageFont.load_default(size), anchor)


def _canvas():
    image = Image.new("RGB", (SMOOTH * PANEL, SMOOTH * PANEL), "white")
    return image, ImageDraw.Draw(image, "RGBA")  # so that colours of four parts are blended


def _pale(colour, share):
    """A colour mixed with white."""
    return tuple(round(255 - share * (255 - part)) for part in ImageColor.getrgb(colour))


def _dots(pen, points, radius, colour):
    for x, y in points:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _plane(panel, array):
    image, pen = _canvas()
    side, limit = SMOOTH * PANEL, panel["limit"]

    def pixels(points):  # (..., 2)
        return (points / limit * (1, -1) + 1) * (side / 2)

    def lines(paths, colour, width):  # (T, n, 2)
        for path in pixels(paths).transpose(1, 0, 2):
            pen.line(path.ravel().tolist(), colour, width, "curve" if width > 2 else None)

    paths, colour, followed = array(panel["points"]), panel["colour"], panel["followed"]
    if "ring" in panel:
        pen.circle((side / 2, side / 2), side / 2 / limit * panel["ring"], outline=GREY, width=2)
    if "ghosts" in panel:
        _dots(pen, pixels(array(panel["ghosts"])), 2.5, "#c8c8c8")
    if "exact" in panel:
        lines(array(panel["exact"])[:, followed], "#a5a5a5", 9)
    lines(paths[:, : panel["trails"]], _pale(colour, 0.42), 1)
    lines(paths[:, followed], colour, 4)
    _dots(pen, pixels(paths[-1]), 2.5, colour)
    _dots(pen, pixels(paths[-1][followed]), 10, "white")
    _dots(pen, pixels(paths[-1][followed]), 7, "black")
    pen.rectangle((0, 0, side - 1, side - 1), outline="#cccccc", width=SMOOTH)
    return image.reduce(SMOOTH)


def _axes(top):
    """An empty panel, its pen, the pixel of a point (a, b) of the unit square, and a function that writes ticks."""
    image, pen = _canvas()
    left, bottom = 54, 48

    def pixel(a, b):
        return SMOOTH * (left + a * (PANEL - left - 14)), SMOOTH * (top + (1 - b) * (PANEL - top - bottom))

    def ticks(below, beside, label):  # pairs (place, words)
        for a, words in below:
            _text(pen, pixel(a, 0)[0], pixel(a, 0)[1] + 32, words, 14 * SMOOTH)
        for b, words in beside:
            _text(pen, pixel(0, b)[0] - 16, pixel(0, b)[1], words, 14 * SMOOTH, "rm")
        _text(pen, pixel(0.5, 0)[0], pixel(0, 0)[1] + 72, label, 15 * SMOOTH)

    return image, pen, pixel, ticks


def _triangle(panel, array):
    image, pen, pixel, ticks = _axes(top=22)
    unit = [(tick, f"{tick:g}") for tick in (0, 0.5, 1)]
    ticks(unit, unit, "from t (1 is noise)")
    _text(pen, *pixel(0.04, 0.86), "to r", 15 * SMOOTH, "lm")
    pen.line([pixel(0, 0), pixel(1, 1), pixel(1, 0), pixel(0, 0)], GREY, 3)
    _dots(pen, [pixel(*dot) for dot in panel.get("dots", [])], 7, "#999999")
    jumps = list(pairwise(panel["chain"]))
    pen.line([pixel(*corner) for t, r in jumps for corner in ((t, t), (t, r), (r, r))], panel["colour"], 5)
    _dots(pen, [pixel(*jump) for jump in jumps], 14, panel["colour"])
    return image.reduce(SMOOTH)


def _chart(panel, array):
    lines = panel.get("lines", [])
    image, pen, pixel, ticks = _axes(top=14 + 18 * len(lines))
    (low, high), (first, last) = panel["limits"], (panel["times"][0], panel["times"][-1])
    scale = np.log if panel.get("log") else np.asarray

    def across(time):
        return (time - first) / (last - first)

    def up(value):
        return (scale(np.clip(value, low, high)) - scale(low)) / (scale(high) - scale(low))

    beside = [(float(up(tick)), str(tick)) for tick in panel["ticks"]]
    ticks([(across(time), str(time)) for time in panel["times"]], beside, panel["xlabel"])
    for b, _ in beside:
        pen.line([pixel(0, b), pixel(1, b)], "#dddddd", 2)
    pen.line([pixel(0, 1), pixel(0, 0), pixel(1, 0)], GREY, 3)
    for bar in panel.get("bars", []):
        (left, right), colour = sorted(pixel(across(bar[end]), 0)[0] for end in ("from", "to")), bar["colour"]
        box = (left + 2, pixel(0, float(up(bar["height"])))[1], max(left + 4, right - 2), pixel(0, 0)[1])
        pen.rectangle(box, colour, outline=colour[:7], width=4)  # half-transparent ones have a rim that is not
    for row, line in enumerate(lines):
        heights = up(array(line["points"]))
        _dashed(pen, [pixel(across(time), b) for time, b in zip(line["times"], heights, strict=True)], line)
        level = SMOOTH * (12 + 18 * row)
        _dashed(pen, [(SMOOTH * 30, level), (SMOOTH * 64, level)], line)
        _text(pen, SMOOTH * 72, level, line["label"], 14 * SMOOTH, "lm")
    return image.reduce(SMOOTH)


def _dashed(pen, points, line):
    """A line through `points`; line["dash"]: lengths on and off in turn, in pixels; empty for an unbroken line."""
    points, (on, off) = np.array(points), (SMOOTH * part for part in line["dash"] or (1e6, 0))
    length = np.concatenate([[0], np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()])
    for start in np.arange(0, length[-1], on + off):
        end = min(start + on, length[-1])
        at = np.array([start, *length[(length > start) & (length < end)], end])
        pen.line(np.stack([np.interp(at, length, side) for side in points.T], 1).ravel().tolist(), line["colour"], 4)


def _video(panel, array):
    clips = array(panel["clips"])  # (n, T, H, W)
    brightness = np.linspace(0.25, 1, clips.shape[1])[:, None, None]  # later frames are brighter
    frames = np.pad((clips * brightness).max(1), ((0, 0), (0, 0), (0, 1)), constant_values=1)
    greys = np.concatenate(frames, 1)[:, :-1]  # a white column between the clips
    size = (CLIPS, round(CLIPS * greys.shape[0] / greys.shape[1]))
    return Image.fromarray((255 * greys).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


DRAW = {"plane": _plane, "triangle": _triangle, "chart": _chart, "video": _video}
