"""A still picture of a scene, of the very arrays that the player draws: for notebooks where nothing runs."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np

from minianyflow.pictures import draw_paths
from minianyflow.player import unpacked


def still(scene, payload):
    """A Figure of a scene at the time it begins with; panels and measures as in the player. Video: a long exposure."""
    columns = scene.get("columns", len(scene["panels"]))
    rows = -(-len(scene["panels"]) // columns)
    video = scene["panels"][0]["kind"] == "video"
    lines = max(len(panel.get("measures", [])) for panel in scene["panels"])
    height = (1.9 if video else 4.6) + 0.27 * lines
    figure, grid = plt.subplots(rows, columns, figsize=(3.7 * columns, 0.4 + rows * height), layout="constrained")
    for axes, panel in zip(np.ravel(grid), scene["panels"], strict=True):
        _PANELS[panel["kind"]](axes, panel, lambda name: unpacked(scene, payload, name))
        axes.set_title(panel["title"], fontsize=15)
        words = [f"{name}: {value}" for name, value in panel.get("measures", [])]
        axes.set_xlabel("\n".join(filter(None, [axes.get_xlabel(), *words])), fontsize=13)
    figure.suptitle(scene["title"], fontsize=18)
    return figure


def _plane(axes, panel, array):
    paths, exact = array(panel["points"]), array(panel["exact"]) if panel.get("exact") else None
    if exact is not None:
        axes.plot(*np.moveaxis(exact[:, panel["followed"]], -1, 0), color="0.65", linewidth=3.5)
    if panel.get("ring"):
        axes.add_patch(plt.Circle((0, 0), panel["ring"], fill=False, color="0.6"))
    ghosts = array(panel["ghosts"]) if panel.get("ghosts") else None
    draw_paths(axes, paths[:, : panel["trails"]], panel["colour"], paths[-1], ghosts, panel["limit"])
    axes.plot(*np.moveaxis(paths[:, panel["followed"]], -1, 0), color=panel["colour"], linewidth=1.6)
    axes.scatter(*paths[-1][panel["followed"]].T, color="black", s=34, zorder=3)


def _triangle(axes, panel, array):
    chain = np.array(panel["chain"])
    axes.plot([0, 1, 1, 0], [0, 1, 0, 0], color="0.5")
    stairs = [[(t, t), (t, r), (r, r)] for t, r in pairwise(chain)]
    axes.plot(*np.concatenate(stairs).T, color=panel["colour"], linewidth=2)
    if panel.get("dots"):
        axes.scatter(*np.array(panel["dots"]).T, color="0.6", s=16, zorder=2)
    axes.scatter(chain[:-1], chain[1:], color=panel["colour"], s=80, zorder=3)
    axes.set(aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.set_xlabel("from t (1 is noise)", fontsize=13)
    axes.set_ylabel("to r", fontsize=13)


def _chart(axes, panel, array):
    for bar in panel.get("bars", []):
        place, wide = (bar["from"] + bar["to"]) / 2, abs(bar["from"] - bar["to"])
        axes.bar(place, bar["height"], 0.96 * wide, color=bar["colour"])
    for line in panel.get("lines", []):
        dash = (0, tuple(line["dash"])) if line["dash"] else "-"
        axes.plot(line["times"], array(line["points"]), color=line["colour"], linestyle=dash, label=line["label"])
    axes.set(
        yscale="log" if panel.get("log") else "linear",
        ylim=panel["limits"],
        xlim=(panel["times"][0], panel["times"][-1]),
    )
    axes.set_xticks(panel["times"], map(str, panel["times"]), fontsize=12)
    axes.set_yticks(panel["ticks"], map(str, panel["ticks"]), fontsize=12)
    axes.minorticks_off()
    axes.set_xlabel(panel["xlabel"], fontsize=13)
    axes.set_box_aspect(1)
    if panel.get("lines"):
        axes.legend(fontsize=11)


def _video(axes, panel, array):
    clips = array(panel["clips"])  # (n, T, H, W)
    age = np.linspace(0.25, 1, clips.shape[1])[:, None, None]
    exposed = (clips * age).max(1)  # later frames are brighter
    axes.imshow(
        np.concatenate([np.pad(each, ((0, 0), (0, 1)), constant_values=1) for each in exposed], 1)[:, :-1],
        cmap="gray",
        vmin=0,
        vmax=1,
    )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


_PANELS = {"plane": _plane, "triangle": _triangle, "chart": _chart, "video": _video}
