"""What draws exposure bias on the circle."""

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
