"""A still picture of a scene, of the very arrays that the player draws: for notebooks where nothing runs.

Drawn by Pillow, in a tenth of the time that loading matplotlib takes: a notebook waits for it before its first picture.
"""

import io
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minianyflow.live.player import unpacked

PANEL, CLIPS, GAP, LINE = 290, 210, 14, 22  # pixels: wide a panel, wide a panel of videos, between them, a line of text
SMOOTH = 2  # a panel is drawn so many times larger, for smooth edges
INK, GREY = "#1a1a1a", "#777777"
EXPOSED = "This picture shows all frames of a clip at once, later ones brighter."


def still_png(scene, payload, colours=64):
    """A small PNG of `still`, bytes."""
    file = io.BytesIO()
    still(scene, payload).quantize(colours, dither=Image.Dither.NONE).save(file, "png")
    return file.getvalue()


def still(scene, payload):
    """A picture of a scene at its last time; panels, measures and note as in the player. Video: a long exposure."""
    panels, columns = scene["panels"], scene.get("columns", len(scene["panels"]))
    tiles = [_PANELS[panel["kind"]](panel, lambda name: unpacked(scene, payload, name)) for panel in panels]
    wide, tall = (max(each) for each in zip(*(tile.size for tile in tiles), strict=True))
    lines = max(len(panel.get("measures", [])) for panel in panels)
    row, width = tall + LINE * (lines + 1) + GAP, columns * (wide + GAP) + GAP
    exposed = [EXPOSED] if any(panel["kind"] == "video" for panel in panels) else []
    note = _wrapped(" ".join([scene.get("note", ""), *exposed]), width - 2 * GAP, 15)
    below = 2 * LINE + -(-len(panels) // columns) * row  # where the note begins
    size = (width, below + (len(note) * LINE + GAP if note else 0))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    _text(pen, size[0] / 2, LINE, scene["title"], 20)
    for place, (panel, tile) in enumerate(zip(panels, tiles, strict=True)):
        left, top = GAP + place % columns * (wide + GAP), 2 * LINE + place // columns * row
        _text(pen, left + wide / 2, top + LINE / 2, panel["title"], 17)
        sheet.paste(tile, (left, top + LINE))
        for line, words in enumerate(panel.get("measures", [])):
            _text(pen, left + wide / 2, top + LINE * (line + 1.5) + tall, ": ".join(words), 15)
    for line, words in enumerate(note):
        _text(pen, GAP, below + LINE * (line + 0.5), words, 15, "lm")
    return sheet


def _text(pen, x, y, words, size, anchor="mm", colour=INK):
    pen.text((x, y), words, colour, ImageFont.load_default(size), anchor)


def _wrapped(words, width, size):
    """Lines of words, each at most `width` pixels."""
    lines, font = [], ImageFont.load_default(size)
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _canvas(width, height):
    image = Image.new("RGB", (SMOOTH * width, SMOOTH * height), "white")
    return image, ImageDraw.Draw(image)


def _pale(colour, keep):
    """A colour mixed with white."""
    parts = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return tuple(round(255 - keep * (255 - part)) for part in parts)


def _dots(pen, points, radius, colour):
    for x, y in points:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _plane(panel, array):
    image, pen = _canvas(PANEL, PANEL)
    side = SMOOTH * PANEL

    def placed(points):  # (..., 2) in pixels
        return (points / panel["limit"] * (1, -1) + 1) * (side / 2)

    def lines(points, colour, width):  # (T, n, 2)
        for path in placed(points).transpose(1, 0, 2):
            pen.line(path.ravel().tolist(), colour, width, "curve" if width > 2 else None)

    paths, colour, followed = array(panel["points"]), panel["colour"], panel["followed"]
    if panel.get("ring"):
        reach = side / 2 / panel["limit"] * panel["ring"]
        pen.circle((side / 2, side / 2), reach, outline=GREY, width=2)
    if panel.get("ghosts"):
        _dots(pen, placed(array(panel["ghosts"])), 2.5, "#c8c8c8")
    if panel.get("exact"):
        lines(array(panel["exact"])[:, followed], "#a5a5a5", 9)
    lines(paths[:, : panel["trails"]], _pale(colour, 0.42), 1)
    lines(paths[:, followed], colour, 4)
    _dots(pen, placed(paths[-1]), 2.5, colour)
    _dots(pen, placed(paths[-1][followed]), 10, "white")
    _dots(pen, placed(paths[-1][followed]), 7, "black")
    pen.rectangle((0, 0, side - 1, side - 1), outline="#cccccc", width=SMOOTH)
    return image.reduce(SMOOTH)


def _axes(top, left=54, bottom=48):
    """An empty panel, its pen, and where the unit square's point (a, b) lies in it."""
    image, pen = _canvas(PANEL, PANEL)
    wide, tall = PANEL - left - 14, PANEL - top - bottom

    def placed(a, b):
        return SMOOTH * (left + a * wide), SMOOTH * (top + (1 - b) * tall)

    def ticks(below, beside, label):
        for a, words in below:
            _text(pen, placed(a, 0)[0], placed(a, 0)[1] + 32, words, 14 * SMOOTH)
        for b, words in beside:
            _text(pen, placed(0, b)[0] - 16, placed(0, b)[1], words, 14 * SMOOTH, "rm")
        _text(pen, placed(0.5, 0)[0], placed(0, 0)[1] + 72, label, 15 * SMOOTH)

    return image, pen, placed, ticks


def _triangle(panel, array):
    image, pen, placed, ticks = _axes(top=22)  # as wide as tall
    unit = [(tick, f"{tick:g}") for tick in (0, 0.5, 1)]
    ticks(unit, unit, "from t (1 is noise)")
    _text(pen, *placed(0.04, 0.86), "to r", 15 * SMOOTH, "lm")
    pen.line([placed(0, 0), placed(1, 1), placed(1, 0), placed(0, 0)], GREY, 3)
    _dots(pen, [placed(*dot) for dot in panel.get("dots", [])], 7, "#999999")
    jumps = list(pairwise(panel["chain"]))
    stairs = [placed(*corner) for t, r in jumps for corner in ((t, t), (t, r), (r, r))]
    pen.line(stairs, panel["colour"], 5)
    _dots(pen, [placed(*jump) for jump in jumps], 14, panel["colour"])
    return image.reduce(SMOOTH)


def _chart(panel, array):
    lines = panel.get("lines", [])
    image, pen, placed, ticks = _axes(top=14 + 18 * len(lines))
    (low, high), (first, last) = panel["limits"], (panel["times"][0], panel["times"][-1])
    scale = np.log if panel.get("log") else np.asarray

    def across(time):
        return (time - first) / (last - first)

    def up(value):
        return (scale(np.clip(value, low, high)) - scale(low)) / (scale(high) - scale(low))

    beside = [(float(up(tick)), str(tick)) for tick in panel["ticks"]]
    ticks([(across(time), str(time)) for time in panel["times"]], beside, panel["xlabel"])
    for b, _ in beside:
        pen.line([placed(0, b), placed(1, b)], "#dddddd", 2)
    pen.line([placed(0, 1), placed(0, 0), placed(1, 0)], GREY, 3)
    for bar in panel.get("bars", []):
        (x1, x2), b = sorted(placed(across(bar[end]), 0)[0] for end in ("from", "to")), float(up(bar["height"]))
        keep = int(bar["colour"][7:] or "ff", 16) / 255
        box = (x1 + 2, placed(0, b)[1], max(x1 + 4, x2 - 2), placed(0, 0)[1])
        if keep < 1:  # half-transparent, with a rim that is not
            shade = Image.new("RGB", image.size, bar["colour"][:7])
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).rectangle(box, round(255 * keep))
            image.paste(shade, mask=mask)
            pen.rectangle(box, outline=bar["colour"][:7], width=4)
        else:
            pen.rectangle(box, bar["colour"])
    for row, line in enumerate(lines):
        heights = up(array(line["points"]))
        _dashed(pen, [placed(across(time), b) for time, b in zip(line["times"], heights, strict=True)], line)
        level = SMOOTH * (12 + 18 * row)
        _dashed(pen, [(SMOOTH * 30, level), (SMOOTH * 64, level)], line)
        _text(pen, SMOOTH * 72, level, line["label"], 14 * SMOOTH, "lm")
    return image.reduce(SMOOTH)


def _dashed(pen, points, line):
    """A line through `points`; line["dash"]: pixels on and off in turn, none for a whole line."""
    if not line["dash"]:
        return pen.line(points, line["colour"], 4)
    points, (on, off) = np.array(points), (SMOOTH * each for each in line["dash"])
    length = np.concatenate([[0], np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()])
    for start in np.arange(0, length[-1], on + off):
        inside = length[(length > start) & (length < start + on)]
        at = np.array([start, *inside, min(start + on, length[-1])])
        pen.line(np.stack([np.interp(at, length, side) for side in points.T], 1).ravel().tolist(), line["colour"], 4)
    return None


def _video(panel, array):
    clips = array(panel["clips"])  # (n, T, H, W)
    age = np.linspace(0.25, 1, clips.shape[1])[:, None, None]
    exposed = np.pad((clips * age).max(1), ((0, 0), (0, 0), (0, 1)), constant_values=1)  # later frames are brighter
    greys = np.concatenate(list(exposed), 1)[:, :-1]  # a white column between the clips
    size = (CLIPS, round(CLIPS * greys.shape[0] / greys.shape[1]))
    return Image.fromarray((255 * greys).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


_PANELS = {"plane": _plane, "triangle": _triangle, "chart": _chart, "video": _video}
