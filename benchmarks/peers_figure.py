"""What draws the comparison with other libraries."""

import matplotlib.pyplot as plt
import numpy as np

from minianyflow.support.figures import COLOURS, MARKERS

PEERS = {  # colour, marker, width: the first two learn the same by much the same, and one shows below the other
    "flow_matching": ("#CC79A7", "s", 6),
    "torchcfm": ("#D55E00", "v", 2),
    "torchcfm, OT": ("#E69F00", "^", 2.4),
}
DASHES = {
    **{"exact velocity": "-", "averaged velocity": "-.", "learnt velocity": "--", "data velocity": ":"},
    **{"OT velocity": (0, (1, 1)), "euler": "-", "midpoint": "--"},
}


def peers_figure(report):
    """Sliced W2 against evaluations, ours and the peers', a panel for each target of the report of `peers.run`."""
    targets = report["targets"]
    size = 6.4 * len(targets) + 4.2, 5.8
    figure, panels = plt.subplots(1, len(targets), figsize=size, layout="constrained", squeeze=False)
    for axes, (dataset, target) in zip(panels[0], targets.items(), strict=True):
        for label, method in target["methods"].items():
            name, kind = label.rsplit(", ", 1)
            values = np.array(method["sliced_w2"])
            colour, marker, width = PEERS.get(name, (COLOURS["mixed"], MARKERS["mixed"], 2.4))
            style = {"color": colour, "linestyle": DASHES[kind], "linewidth": width, "marker": marker}
            axes.plot(method["nfe"], values.mean(0), label=label, markersize=7, alpha=0.5 if width > 3 else 1, **style)
            axes.fill_between(method["nfe"], values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        exact = target["exact_flow"]["sliced_w2"]
        axes.axhline(exact, color="black", linestyle=(0, (1, 3)), linewidth=1.6, zorder=0, label="exact flow")
        axes.set(xscale="log", yscale="log")
        axes.set_title(dataset, fontsize=17)
        axes.set_xlabel("network evaluations", fontsize=15)
        axes.set_xticks((1, 2, 4, 8, 16, 32, 64), map(str, (1, 2, 4, 8, 16, 32, 64)))
        axes.minorticks_off()
        axes.tick_params(labelsize=13)
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("sliced W2 to the data", fontsize=15)
    beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "frameon": False}
    panels[0][-1].legend(fontsize=13, handlelength=3.6, labelspacing=0.8, **beside)
    return figure
