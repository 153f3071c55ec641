"""What draws exposure bias on the circle: its course in training, and the map of what cures it."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from minianyflow.plane.exposure import COLOURS, NFE


def exposure_figure(report: dict) -> Figure:
    """A row per NFE. Columns: last radius error and sliced W2 against total cost, radius error by frame at the end.

    Solid: free-running; dashed: with true context; dotted: the data's own. Lines are means over seeds.
    """
    figure, grid = plt.subplots(2, 3, figsize=(15, 8), layout="constrained", sharex="col", sharey="col")
    start = report["start"][-1]
    for row, nfe in zip(grid, map(str, NFE), strict=False):
        for (arm, points), colour in zip(report["arms"].items(), COLOURS, strict=False):
            path, style = [start, *points], {"color": colour, "marker": "o", "markersize": 4}
            cost = np.array([0, *(point["cost"]["evaluations"] for point in points)]) + start["cost"]["evaluations"]
            for name, line in (("free_running", "-"), ("true_context", "--")):
                values = np.mean([point["nfe"][nfe][name] for point in path], 1)  # (points, F)
                row[0].plot(cost / 1e6, values[:, -1], line, label=arm if line == "-" else None, **style)
                row[2].plot(values[-1], line, color=colour)
            row[1].plot(cost / 1e6, np.mean([point["nfe"][nfe]["sliced_w2"] for point in path], 1), **style)
        labels = "last frame's radius error", "sliced W2 of clips", "radius error by frame"
        for axes, label, floor in zip(row, labels, ("radius_error", "sliced_w2", "radius_error"), strict=True):
            axes.axhline(report["data"][floor], color="black", linestyle=":")
            axes.set(yscale="log", title=f"{label}, NFE {nfe}", xlabel="million evaluations")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        row[2].set(xlabel="frame")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS))
    return figure


MAP_COLOURS = {
    "teacher forcing": "#56B4E9",
    "teacher forcing, exact velocity": "#009E73",
    "on-policy": "#D55E00",
    "own past, exact velocity": "#F0E442",
    "on-policy, windows of two": "#CC79A7",
    "teacher forcing, turned student": "#0072B2",
}
MAP_MEASURES = {"tv": "speeds, distance from even", "kept": "kept", "whole": "whole"}


def map_figure(report: dict) -> Figure:
    """A column per start, a row per figure at frame 160, against the evaluations per frame; bars: the seeds' range."""
    columns, options = len(report["cells"]), {"layout": "constrained", "sharex": True, "sharey": "row"}
    figure, grid = plt.subplots(3, columns, figsize=(1 + 4.4 * columns, 11), squeeze=False, **options)
    place = report["frames"].index(160)

    def draw(axes, measure, nfe, **style):
        values = np.array([[seed[measure][place] for seed in seeds] for seeds in nfe.values()])  # (NFE, seeds)
        axes.vlines(range(len(values)), values.min(1), values.max(1), color=style["color"], linewidth=1)
        axes.plot(values.mean(1), **style)

    for column, (start, recipes) in zip(grid.T, report["cells"].items(), strict=True):
        for axes, (measure, label) in zip(column, MAP_MEASURES.items(), strict=True):
            draw(axes, measure, report["starts"][start]["nfe"], color="0.5", linestyle="--", label="the start itself")
            for recipe, cell in recipes.items():
                draw(axes, measure, cell["nfe"], color=MAP_COLOURS[recipe], marker="o", linewidth=2, label=recipe)
            axes.axhline(report["exact"][measure][place], color="black", linestyle=":", label="exact law, given four")
            axes.set(ylim=(0, 1), ylabel=label)
            axes.label_outer()
            axes.grid(alpha=0.25)
        spent = [report["budget"][name] / 1e6 for name in (start, "after")]
        column[0].set_title(f"{start} start: {spent[0]:.1f} + {spent[1]:.1f} million evaluations")
        column[2].set_xticks(range(len(cell["nfe"])), cell["nfe"])
        column[2].set_xlabel("evaluations per frame")
    found = {name: handle for axes in grid[0] for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found, loc="outside lower center", ncols=3)
    return figure
