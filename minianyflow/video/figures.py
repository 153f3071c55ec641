"""Pictures of videos: contact sheets, players that work in a saved notebook, any-step curves of a video report.

Videos are grey, (n, T, H, W) in [0, 1]; what is outside is clipped. `save_figure` of `pictures` writes a figure.
"""

import io
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image, ImageDraw, ImageFont

from minianyflow.support.errors import InputError, choose
from minianyflow.support.figures import COLOURS, LABELS, MARKERS

# Beside those of the plane; the teacher is what Euler was there. Others take the spare ones in order.
_STYLES = {name: (COLOURS[name], MARKERS[name]) for name in COLOURS if name != "exact"} | {
    "teacher": (COLOURS["euler"], MARKERS["euler"]),
    "on_policy": ("#000000", "D"),
    "forward_only": ("0.6", "P"),
}
_SPARE = (("#000000", "D"), ("0.6", "P"), ("#F0E442", "h"))
_FLOORS = (":", "--", "-.")
_GREYS = 64  # a quarter of all: smaller files, and no eye sees it


def contact_sheet(rows, frames=(0, 4, 8, 12, 16), titles=("one ball", "two balls")):
    """A Figure of stills: a row for each video of `rows` {label: (n, T, H, W)}, a block of `frames` for each title.

    Block k shows clip k. Raises InputError for a clip or a frame that a video does not have.
    """
    rows = {label: _checked(label, video, len(titles), max(frames) + 1) for label, video in rows.items()}
    height, width = next(iter(rows.values())).shape[2:]
    gap, inch = max(1, width // 16), 0.95  # between stills, in pixels; a still
    size = (len(titles) * len(frames) * inch + 1.9, len(rows) * inch * 1.06 + 0.8)
    figure, grid = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False, layout="constrained")
    for axes_row, (label, video) in zip(grid, rows.items(), strict=True):
        for axes, clip in zip(axes_row, video, strict=False):
            strip = np.ones((height, len(frames) * (width + gap) - gap))
            for k, frame in enumerate(frames):
                strip[:, k * (width + gap) :][:, :width] = clip[frame]
            axes.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        axes_row[0].set_ylabel(label, fontsize=15, rotation=0, ha="right", va="center", labelpad=8)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=16)
    for axes in grid[-1]:
        axes.set_xticks([k * (width + gap) + (width - 1) / 2 for k in range(len(frames))], frames, fontsize=13)
        axes.tick_params(length=0)
        axes.set_xlabel("frame", fontsize=13)
    return figure


def player(video, titles=None, columns=8, scale=6, fps=8):
    """The videos playing side by side, in a loop: an image for a notebook's output, no kernel needed.

    video: (n, T, H, W), or {label: (n, T, H, W)} for a labelled row each; the first `columns` clips are shown, under
    their `titles`. An animated PNG, since nbconvert shows no GIF; `animated_png` gives the bytes.
    """
    from IPython.display import Image as Shown

    return Shown(data=animated_png(video, titles, columns, scale, fps), format="png")


def animated_png(video, titles=None, columns=8, scale=6, fps=8):
    """What `player` shows, as bytes. A bar below says how far the clip is; the last frame is held for a moment."""
    rows = video if isinstance(video, dict) else {"": video}
    rows = {label: _checked(label, each)[:columns] for label, each in rows.items()}
    shapes = {each.shape for each in rows.values()}
    if len(shapes) != 1 or scale < 1 or fps <= 0:
        raise InputError(f"videos {shapes}, scale {scale}, fps {fps}; expected one shape for all rows, scale 1 or more")
    frames = [np.concatenate([each[:, k] for each in rows.values()]) for k in range(next(iter(shapes))[1])]
    back, corners, bar = _stage(list(rows), titles or [], next(iter(shapes)), scale)
    pictures = []
    for k, tiles in enumerate(frames):
        picture = back.copy()
        for tile, (left, top) in zip(tiles, corners, strict=True):
            grey = np.round(np.round(np.clip(tile, 0, 1) * (_GREYS - 1)) * 255 / (_GREYS - 1)).astype(np.uint8)
            large = grey.repeat(scale, 0).repeat(scale, 1)
            picture.paste(Image.fromarray(large), (left, top))
        left, top, right, bottom = bar
        done = left + (right - left) * (k + 1) // len(frames)
        ImageDraw.Draw(picture).rectangle((left, top, done, bottom), fill=90)
        pictures.append(picture)
    file, tick = io.BytesIO(), 1000 / fps
    hold = [tick] * (len(pictures) - 1) + [tick + 500]
    pictures[0].save(file, "png", save_all=True, append_images=pictures[1:], duration=hold, loop=0)
    return file.getvalue()


def _stage(labels, titles, shape, scale):
    """What does not move: a picture with labels and titles, where the tiles go, and the box of the bar."""
    count, _, height, width = shape
    font = ImageFont.load_default(16)
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    margin = max(int(pen.multiline_textbbox((0, 0), label, font=font)[2]) for label in labels)
    left, top, gap = margin + 14 if margin else 0, 26 if titles else 0, max(4, scale)
    step_x, step_y = width * scale + gap, height * scale + gap
    right, bottom = left + count * step_x - gap, top + len(labels) * step_y
    picture = Image.new("L", (right, bottom + 4), 255)
    pen = ImageDraw.Draw(picture)
    for k, title in enumerate(titles[:count]):
        pen.text((left + k * step_x + width * scale // 2, top // 2), title, fill=0, font=font, anchor="mm")
    for k, label in enumerate(labels):
        place = (left - 10, top + k * step_y + height * scale // 2)
        pen.multiline_text(place, label, fill=0, font=font, anchor="rm", align="right")
    bar = (left, bottom, right - 1, bottom + 3)
    pen.rectangle(bar, fill=225)
    return picture, [(left + x * step_x, top + y * step_y) for y in range(len(labels)) for x in range(count)], bar


def any_step_curves(report, measure, ylabel=None):
    """A Figure of `draw_any_step`, the legend beside it."""
    figure, axes = plt.subplots(figsize=(8.6, 5.2), layout="constrained")
    draw_any_step(axes, report, measure, ylabel)
    axes.legend(fontsize=12, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def draw_any_step(axes, report, measure, ylabel=None):
    """Steps (log2) against `measure` for every method of a `report`; mean over seeds, bars their range.

    report: {"methods": {name: {"nfe": [...], measure: [a list for each seed]}}, "floors": {name: {measure: value}}}.
    Methods and floors without the measure are left out; InputError if no method has it. The axis of the measure is
    logarithmic where it covers more than a factor of eight; the legend names a floor of 0, which has no place there.
    Steps are called evaluations, too, where they are: a method with "evaluations", as it has measures, says so itself.
    """
    methods = {name: each for name, each in report["methods"].items() if measure in each}
    if not methods:
        known = {key: None for each in report["methods"].values() for key, value in each.items() if _curves(value)}
        choose("measure", measure, known)
    used = {_STYLES.get(name) for name in methods}
    spare = cycle([style for style in _SPARE if style not in used] or _SPARE)
    seen, steps = [], set()
    for k, (name, method) in enumerate(methods.items()):
        colour, marker = _STYLES.get(name) or next(spare)
        values = np.array(method[measure], dtype=float)  # (seeds, step counts)
        label = LABELS.get(name, name.replace("_", "-")).replace("\n", " ")
        beside = np.array(method["nfe"]) * 2 ** (0.07 * (k - (len(methods) - 1) / 2))  # so that no bar hides another
        axes.plot(beside, values.mean(0), label=label, color=colour, marker=marker, markersize=7, linewidth=2)
        axes.vlines(beside, values.min(0), values.max(0), color=colour, linewidth=1.5)
        seen, steps = [*seen, *values.flat], steps | set(method["nfe"])
    floors = {name: each[measure] for name, each in report.get("floors", {}).items() if measure in each}
    seen = [each for each in (*seen, *(floor for floor in floors.values() if floor)) if np.isfinite(each)]
    logarithmic = bool(seen) and min(seen) > 0 and max(seen) > 8 * min(seen)
    for (name, floor), line in zip(floors.items(), cycle(_FLOORS), strict=False):
        label, style = name.replace("_", " "), {"color": "0.25", "linewidth": 1.5, "zorder": 0}
        if logarithmic and not floor:  # 0 has no place on this axis: the legend says it
            axes.plot([], [], linestyle="", label=f"{label}: 0")
        else:
            axes.axhline(floor, linestyle=line, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log" if logarithmic else "linear")
    if logarithmic:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(sorted(steps), map(str, sorted(steps)), fontsize=13)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=13)
    axes.set_xlabel("steps (network evaluations)" if _one_each(methods) else "steps", fontsize=15)
    axes.set_ylabel(ylabel or measure.replace("_", " "), fontsize=15)
    axes.grid(alpha=0.25)


def _one_each(methods):
    """Does every method take one evaluation a step? A causal one takes them for every chunk, guidance two."""
    said = {name: each.get("evaluations", [each["nfe"]]) for name, each in methods.items()}
    return all(
        not name.startswith("causal") and all(list(row) == list(methods[name]["nfe"]) for row in rows)
        for name, rows in said.items()
    )


def _curves(value):
    """Is this a list for each seed?"""
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


def _checked(label, video, clips=1, frames=1):
    """The video as an array, if it holds so many clips and frames."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[0] < clips or video.shape[1] < frames:
        raise InputError(
            f"video {label!r} of shape {video.shape}; expected (n, T, H, W) with n at least {clips}, "
            f"T at least {frames}: decode latents, or show less of it"
        )
    return video
