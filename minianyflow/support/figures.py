"""One colour, one marker and one name per method throughout the course; any-step curves, contact sheets, small PNGs."""

import io
import textwrap
import warnings
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from minianyflow.support.errors import InputError, choose

warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a caption in a script that no font here has
# Okabe and Ito's palette: distinct with any colour vision.
COLOURS = {
    "exact": "#000000",
    "euler": "#CC79A7",
    "eulerian": "#56B4E9",
    "lagrangian": "#E69F00",
    "semigroup": "#009E73",
    "mixed": "#0072B2",
    "teacher_step": "#882255",
    "consistency": "#D55E00",
}
MARKERS = dict(zip(COLOURS, ["", "v", "<", ">", "s", "o", "P", "X"], strict=True))
LABELS = {
    "exact": "exact flow",
    "euler": "Euler,\nexact velocity",
    "eulerian": "flow map,\nEulerian",
    "lagrangian": "flow map,\nLagrangian",
    "semigroup": "flow map,\nsemigroup",
    "mixed": "flow map,\nmixed",
    "teacher_step": "flow map,\nteacher step",
    "consistency": "consistency,\nre-noised",
}

# Those of the plane and of video; the teacher has Euler's. Other names take the spare ones in order.
_STYLES = {name: (COLOURS[name], MARKERS[name]) for name in COLOURS if name != "exact"} | {
    "teacher": (COLOURS["euler"], MARKERS["euler"]),
    "on_policy": ("#000000", "D"),
    "forward_only": ("0.6", "P"),
}
_SPARE = (("#000000", "D"), ("0.6", "P"), ("#F0E442", "h"))
_FLOORS = (":", "--", "-.")


def small_png(figure, dpi: int = 110, colours: int = 64) -> bytes:
    """The bytes of a PNG of at most `colours` colours, small enough to commit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels, file = np.asarray(canvas.buffer_rgba())[..., :3], io.BytesIO()
    Image.fromarray(pixels).quantize(colours, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def save_figure(figure, path: str | Path, dpi: int = 110, colours: int = 64) -> str | Path:
    """Write a small PNG and close the figure; returns the path."""
    Path(path).write_bytes(small_png(figure, dpi, colours))
    import matplotlib.pyplot as plt

    plt.close(figure)
    return path


def checked_video(label: str, video, clips: int = 1):
    """The video (n, T, H, W) or (n, T, H, W, 3) as an array. Raises InputError unless it holds so many clips."""
    video = np.asarray(video)
    if video.ndim not in (4, 5) or len(video) < clips:
        expected = f"(n, T, H, W) or (n, T, H, W, 3) with n at least {clips}"
        raise InputError(f"video {label!r} of shape {video.shape}; expected {expected}: decode latents, or show fewer")
    return video


def contact_sheet(rows: dict, titles, stills: int = 5, columns: int | None = None, inches: float = 0.95):
    """A Figure of stills: a row per video of {label: (n, T, H, W) or (n, T, H, W, 3)}, values in [0, 1].

    Block k shows clip k of every row below title k, `stills` evenly in time, both ends among them; `columns` blocks
    stand side by side (None: all). inches: the longer side of a still.
    """
    from matplotlib.figure import Figure

    rows = {label: checked_video(label, video, len(titles)) for label, video in rows.items()}
    (frames, height, width), columns = next(iter(rows.values())).shape[1:4], columns or len(titles)
    shown = np.unique(np.linspace(0, frames - 1, stills).round().astype(int))
    lines, gap, scale = -(-len(titles) // columns), max(1, width // 16), inches / max(height, width)
    block = len(shown) * (width + gap) * scale, len(rows) * (height + gap) * scale  # inches
    titles = [textwrap.fill(title, max(20, int(7 * block[0]))) for title in titles]
    head = 0.3 * (1 + max(title.count("\n") for title in titles))
    figure = Figure((columns * block[0] + 1.9, lines * (head + block[1] + 0.5)), layout="constrained")
    grid = figure.subplots(lines * len(rows), columns, squeeze=False)
    for k, title in enumerate(titles):
        column = grid[k // columns * len(rows) :][: len(rows), k % columns]
        column[0].set_title(title, fontsize=16, parse_math=False)
        for axes, (label, video) in zip(column, rows.items(), strict=True):
            strip = [
                np.pad(still, [(0, 0), (0, gap)] + [(0, 0)] * (still.ndim - 2), constant_values=1)
                for still in video[k][shown]
            ]
            axes.imshow(np.concatenate(strip, 1)[:, :-gap], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if k % columns == 0:
                axes.set_ylabel(label, fontsize=15, rotation=0, ha="right", va="center", labelpad=8, parse_math=False)
        axes.set_xticks([n * (width + gap) + (width - 1) / 2 for n in range(len(shown))], shown, fontsize=13)
        axes.tick_params(length=0)
        axes.set_xlabel("frame", fontsize=13)
    for axes in grid[-len(rows) :, (len(titles) - 1) % columns + 1 :].flat:
        axes.axis("off")
    return figure


def draw_any_step(axes, report: dict, measure: str, ylabel: str | None = None) -> None:
    """`measure` against steps (log2) for every method of a report (reports.py): the mean over seeds, and their range.

    Methods and floors without the measure are left out; InputError if no method has it. The axis of the measure is
    logarithmic where values cover more than a factor of eight; the legend then names a floor of 0. The axis of steps
    says evaluations where every method takes one per step (a method may have "evaluations", in the form of a measure).
    """
    methods = {name: method for name, method in report["methods"].items() if measure in method}
    if not methods:
        entries = [entry for method in report["methods"].values() for entry in method.items()]
        curves = [key for key, value in entries if isinstance(value, list) and isinstance(value[0], list)]
        choose("measure", measure, dict.fromkeys(curves))
    used = {_STYLES.get(name) for name in methods}
    spare = cycle([style for style in _SPARE if style not in used] or _SPARE)
    drawn, steps = [], set()
    for k, (name, method) in enumerate(methods.items()):
        colour, marker = _STYLES.get(name) or next(spare)
        values = np.array(method[measure], dtype=float)  # (seeds, step counts)
        label = LABELS.get(name, name.replace("_", "-")).replace("\n", " ")
        beside = np.array(method["nfe"]) * 2 ** (0.07 * (k - (len(methods) - 1) / 2))  # so that no bar hides another
        axes.plot(beside, values.mean(0), label=label, color=colour, marker=marker, markersize=7, linewidth=2)
        axes.vlines(beside, values.min(0), values.max(0), color=colour, linewidth=1.5)
        drawn, steps = [*drawn, *values.flat], steps | set(method["nfe"])
    floors = {name: floor[measure] for name, floor in report.get("floors", {}).items() if measure in floor}
    drawn = [value for value in (*drawn, *(floor for floor in floors.values() if floor)) if np.isfinite(value)]
    logarithmic = bool(drawn) and min(drawn) > 0 and max(drawn) > 8 * min(drawn)
    for (name, floor), line in zip(floors.items(), cycle(_FLOORS), strict=False):
        label, style = name.replace("_", " "), {"color": "0.25", "linewidth": 1.5, "zorder": 0}
        if logarithmic and not floor:  # 0 has no place on this axis
            axes.plot([], [], linestyle="", label=f"{label}: 0")
        else:
            axes.axhline(floor, linestyle=line, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log" if logarithmic else "linear")
    if logarithmic:
        from matplotlib.ticker import LogLocator

        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(sorted(steps), map(str, sorted(steps)), fontsize=13)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=13)
    are_evaluations = all(_one_evaluation_per_step(name, method) for name, method in methods.items())
    axes.set_xlabel("steps (network evaluations)" if are_evaluations else "steps", fontsize=15)
    axes.set_ylabel(ylabel or measure.replace("_", " "), fontsize=15)
    axes.grid(alpha=0.25)


def _one_evaluation_per_step(name, method):
    """A causal method takes evaluations for every chunk, guidance takes two."""
    return not name.startswith("causal") and all(row == method["nfe"] for row in method.get("evaluations", []))
