"""What draws the race: paths, curves, the figure of the README. Fixed axes, equal aspect, one colour per method."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from minianyflow.support.figures import COLOURS, LABELS, MARKERS
from minianyflow.support.reports import mean

FLOORS = {"exact": "exact flow", "consistency": "fresh noise, pooled"}  # {method: its floor in a report}


def axes_of(dimensions: int) -> dict:
    """What `plt.subplots(subplot_kw=...)` takes to draw states of that many numbers: three are drawn in space."""
    return {"projection": "3d"} if dimensions == 3 else {}


def draw_paths(axes, paths, colour: str, samples=None, exact=None, limit: float = 2.6) -> None:
    """Trajectories (steps + 1, n, D) as lines, noise to data; `samples` (m, D) as points, `exact` ones grey below.

    D = 3 needs axes in space (`axes_of`). Of more numbers the first two are drawn; one is drawn against time.
    """
    flat = axes.name != "3d"
    paths, space = np.asarray(paths), "xy" if flat else "xyz"
    shading = {} if flat else {"depthshade": False}  # one colour per method

    def seen(states, time):  # (..., 2 or 3)
        states = np.asarray(states)
        across = limit * (1 - 2 * time)  # time, if a state is one number: noise left, data right
        if states.shape[-1] == 1:
            states = np.concatenate([np.broadcast_to(across, states.shape), states], -1)
        return states[..., : len(space)]

    if len(paths) > 1 and paths.shape[1]:
        lines = seen(paths, np.linspace(1, 0, len(paths))[:, None, None])
        length = np.linalg.norm(np.diff(lines, axis=0), axis=-1).sum(0).mean()
        alpha = 0.4 / max(1.0, 0.4 * length)  # long, tangled ones are drawn fainter
        for line in lines.swapaxes(0, 1):
            axes.plot(*line.T, color=colour, alpha=alpha, linewidth=0.6, zorder=1)
    for points, shade, size, order in ((exact, "0.75", 4, 0), (samples, colour, 2, 2)):
        if points is not None:
            axes.scatter(*seen(points, 0.0).T, s=size, color=shade, linewidths=0, zorder=order, **shading)
    axes.set(**{f"{name}lim": (-limit, limit) for name in space}, **{f"{name}ticks": [] for name in space})
    axes.set_aspect("equal")
    if not flat:
        axes.set_box_aspect((1, 1, 1), zoom=1.1)
    for side in axes.spines.values():
        side.set_color("0.8")


def label_of(name: str, report: dict) -> str:
    """How a figure calls a method: the velocity of Euler's may be learnt."""
    return LABELS[name].replace("exact", "learnt") if report.get("truth") == "learnt" else LABELS[name]


def draw_curves(axes, report: dict, measure: str, ylabel: str, floors: dict[str, str] | None = None) -> None:
    """`sliced_w2` or `path_error` against steps: mean, range over seeds; dotted: `floors` {method: name}."""
    for name, method in report["methods"].items():
        values = np.array(method.get(f"{measure}_pooled", method[measure]))
        style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 5, "linewidth": 1.8}
        axes.plot(method["nfe"], values.mean(0), label=label_of(name, report).replace("\n", " "), **style)
        axes.fill_between(method["nfe"], values.min(0), values.max(0), color=COLOURS[name], alpha=0.2, linewidth=0)
    for name, floor in (floors or {}).items():
        readings = report["floors"][floor][measure]
        axes.axhline(mean(readings), color=COLOURS[name], linestyle=":", linewidth=1.4, zorder=0)
        axes.axhspan(min(readings), max(readings), color=COLOURS[name], alpha=0.08, linewidth=0, zorder=0)
    nfe = next(iter(report["methods"].values()))["nfe"]
    axes.set(xscale="log", yscale="log", xlabel="steps (network evaluations)", ylabel=ylabel)
    axes.xaxis.label.set_size(13)
    axes.yaxis.label.set_size(13)
    axes.tick_params(labelsize=11)
    axes.set_xticks(nfe, map(str, nfe))
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def any_step_figure(report: dict, trajectories: dict, exact_paths, shown=(1, 4, 16, 64), lines: int = 60) -> Figure:
    """Methods as rows, steps as columns, from {method: {nfe: (nfe + 1, n, D)}}; exact flow and curves beside."""
    figure = plt.figure(figsize=(15, max(11.5, 1.95 * len(trajectories))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.42, 1])
    limit = max(2.6, float(np.quantile(np.abs(exact_paths[-1]), 0.995)))
    room = axes_of(exact_paths.shape[-1])
    grid = left.subplots(len(trajectories), len(shown), subplot_kw=room, squeeze=False)
    for row, (name, by_steps) in zip(grid, trajectories.items(), strict=True):
        for axes, steps in zip(row, shown, strict=True):
            draw_paths(axes, by_steps[steps][:, :lines], COLOURS[name], by_steps[steps][-1], exact_paths[-1], limit)
            method = report["methods"][name]
            distances = np.array(method.get("sliced_w2_pooled", method["sliced_w2"]))  # (seeds, step counts)
            distance = distances[:, method["nfe"].index(steps)].mean()
            axes.annotate(f"{1000 * distance:.0f}", (0.97, 0.04), xycoords="axes fraction", ha="right", fontsize=14)
        beside = {"xycoords": "axes fraction", "rotation": 90, "ha": "center", "va": "center"}
        row[0].annotate(label_of(name, report), (-0.14, 0.5), fontsize=15, **beside)
    for axes, steps in zip(grid[0], shown, strict=True):
        axes.set_title(f"{steps} step{'s' if steps > 1 else ''}", fontsize=17)
    above, below = right.subfigures(2, 1, height_ratios=[1.25, 2])
    exact, (w2, path) = above.subplots(subplot_kw=room), below.subplots(2, 1)
    draw_paths(exact, exact_paths[:, :lines], COLOURS["exact"], exact_paths[-1], limit=limit)
    title = f"{report['dataset']}: {report['flow']}, same noise (grey in every panel)"
    exact.set_title(textwrap.fill(title, 48), fontsize=14)
    truth = report["flow"].partition(" of ")[0]
    draw_curves(w2, report, "sliced_w2", "sliced W2 to the data", FLOORS)
    w2.set_title(f"x 1000 in the panels; dotted: its floors,\n{truth} (black) and fresh noise (orange)", fontsize=13)
    draw_curves(path, report, "path_error", "path error")
    w2.legend(fontsize=11)
    return figure
