"""One colour, one mark and one name per method throughout the course; figures as small PNG files."""

import io
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from minianyflow.support.errors import choose

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = {
    "exact": "#000000",
    "euler": "#CC79A7",
    "eulerian": "#56B4E9",
    "lagrangian": "#E69F00",
    "semigroup": "#009E73",
    "mixed": "#0072B2",
    "consistency": "#D55E00",
}
MARKERS = dict(zip(COLOURS, ["", "v", "<", ">", "s", "o", "X"], strict=True))
LABELS = {
    "exact": "exact flow",
    "euler": "Euler,\nexact velocity",
    "eulerian": "flow map,\nEulerian",
    "lagrangian": "flow map,\nLagrangian",
    "semigroup": "flow map,\nsemigroup",
    "mixed": "flow map,\nmixed",
    "consistency": "consistency,\nre-noised",
}

# Beside those of the plane; the teacher is what Euler was there. Others take the spare ones in order.
_STYLES = {name: (COLOURS[name], MARKERS[name]) for name in COLOURS if name != "exact"} | {
    "teacher": (COLOURS["euler"], MARKERS["euler"]),
    "on_policy": ("#000000", "D"),
    "forward_only": ("0.6", "P"),
}
_SPARE = (("#000000", "D"), ("0.6", "P"), ("#F0E442", "h"))
_FLOORS = (":", "--", "-.")


def small_png(figure, dpi=110, colours=64):
    """A PNG of at most `colours` colours, small enough to commit; bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels, file = np.asarray(canvas.buffer_rgba())[..., :3], io.BytesIO()
    Image.fromarray(pixels).quantize(colours, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def save_figure(figure, path, dpi=110, colours=64):
    """Write a small PNG and close the figure; returns the path."""
    Path(path).write_bytes(small_png(figure, dpi, colours))
    import matplotlib.pyplot as plt

    plt.close(figure)
    return path


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
        from matplotlib.ticker import LogLocator

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
