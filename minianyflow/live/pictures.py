"""A still picture of a scene by matplotlib, for notebooks whose kernel is not running."""

import textwrap
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from minianyflow.live.player import unpack
from minianyflow.support.figures import small_png

PANEL, CLIPS, LINE = 3.6, 2.5, 0.24  # inches: side of a panel, of a video panel, height of text
LETTERS = 12.5  # letters of the note per inch
GREY = "#777777"
EXPOSURE = "This picture shows all frames of a clip at once, later ones brighter."


def picture_png(scene: dict, payload: bytes) -> bytes:
    """`picture` as a small PNG."""
    return small_png(picture(scene, payload), dpi=80)


def picture(scene: dict, payload: bytes) -> Figure:
    """A scene at its last time, with panels, measures and note as in the player; all frames of a video at once."""
    panels, columns = scene["panels"], scene.get("columns", len(scene["panels"]))
    video = any(panel["kind"] == "video" for panel in panels)
    rows, lines = -(-len(panels) // columns), max(len(panel.get("measures", {})) for panel in panels) + 2
    wide, tall = (CLIPS, CLIPS / 2) if video else (PANEL, PANEL)
    note = textwrap.wrap(scene.get("note", "") + f" {EXPOSURE}" * video, int(LETTERS * columns * wide))
    size = columns * wide, rows * (tall + lines * LINE) + (len(note) + 2) * LINE
    figure = Figure(size, layout="constrained")
    figure.suptitle(scene["title"], fontsize=15)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        axes.set_title(panel["title"], fontsize=13)
        DRAW[panel["kind"]](axes, panel, lambda name: unpack(scene, payload, name))
        below = [axes.get_xlabel(), *map(": ".join, panel.get("measures", {}).items())]
        axes.set_xlabel("\n".join(filter(None, below)), fontsize=11)
    figure.supxlabel("\n".join(note), x=0.01, ha="left", fontsize=11)
    return figure


def _plane(axes, panel, array):
    paths, colour, limit = array(panel["points"]), panel["colour"], panel["limit"]  # (T, n, 2)
    followed, trails = paths[:, panel["followed"]], paths[:, : panel["trails"]]
    if "ring" in panel:
        axes.add_patch(Circle((0, 0), panel["ring"], fill=False, color=GREY))
    if "ghosts" in panel:
        axes.scatter(*array(panel["ghosts"]).T, 2, "#c8c8c8")
    if "exact" in panel:
        exact = array(panel["exact"])[:, panel["followed"]]
        axes.plot(exact[..., 0], exact[..., 1], color="#a5a5a5", linewidth=5)
    axes.plot(trails[..., 0], trails[..., 1], color=colour, alpha=0.42, linewidth=0.5)
    axes.plot(followed[..., 0], followed[..., 1], color=colour, linewidth=2)
    axes.scatter(*paths[-1].T, 2, colour, zorder=3)
    axes.scatter(*followed[-1].T, 45, "black", edgecolors="white", zorder=4)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")


def _triangle(axes, panel, array):
    axes.plot([0, 1, 1, 0], [0, 1, 0, 0], color=GREY)
    jumps = list(pairwise(panel["chain"]))
    if dots := panel.get("dots"):
        axes.scatter(*np.array(dots).T, 12, "#999999")
    axes.plot(*np.array([((t, t), (t, r), (r, r)) for t, r in jumps]).reshape(-1, 2).T, panel["colour"], linewidth=2.5)
    axes.scatter(*np.array(jumps).T, 90, panel["colour"], zorder=3)
    axes.set(xlabel="from t (1 is noise)", ylabel="to r", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")


def _chart(axes, panel, array):
    for line in panel.get("lines", []):
        style = (0, [part / 2 for part in line["dash"]]) if line["dash"] else "-"
        heights = array(line["points"]).ravel()
        axes.plot(line["times"], heights, color=line["colour"], linewidth=2, linestyle=style, label=line["label"])
    for bar in panel.get("bars", []):
        height, width, colour = bar["height"], bar["to"] - bar["from"], bar["colour"]
        axes.bar(bar["from"], height, width, align="edge", color=colour, edgecolor=colour[:7])
    axes.set_yscale("log" if panel.get("log") else "linear")
    axes.set_xlim(panel["times"][0], panel["times"][-1])
    axes.set_xticks(panel["times"])
    axes.set(ylim=panel["limits"], xlabel=panel["xlabel"])
    axes.set_yticks(panel["ticks"], map(str, panel["ticks"]))
    axes.minorticks_off()
    axes.set_box_aspect(1)
    axes.grid(axis="y", alpha=0.4)
    if "lines" in panel:
        axes.legend(fontsize=9, frameon=False)


def _video(axes, panel, array):
    clips = array(panel["clips"])  # (n, T, H, W)
    brightness = np.linspace(0.25, 1, clips.shape[1])[:, None, None]  # later frames are brighter
    frames = np.pad((clips * brightness).max(1), ((0, 0), (0, 0), (0, 1)), constant_values=1)
    greys = np.concatenate(frames, 1)[:, :-1]  # a white column between the clips
    axes.imshow(greys, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


DRAW = {"plane": _plane, "triangle": _triangle, "chart": _chart, "video": _video}
