"""The tables of docs/wan.md and docs/evaluation.md, from the JSON files in docs/."""

import json

from minianyflow.support.install import ROOT
from minianyflow.support.reports import markdown_table

ROLES = ("student", "fake", "teacher")
ROWS = {
    "sliced_w2": "sliced W2 of latents",
    "path_error": "distance to own sample of 128 steps",
    "temporal_roughness": "roughness in time",
    "frechet": "Frechet distance of latents",
}


def evaluations_per_sample() -> str:
    """Forwards and backwards per sample of every stage, as scripts/wan_tiny.py counted them."""
    counts = json.loads((ROOT / "docs/wan/evaluations.json").read_text("utf-8"))
    rows = [
        [stage, *("{forwards:.2f}, {backwards:.2f}".format(**roles[role]) if role in roles else "" for role in ROLES)]
        for stage, roles in counts.items()
    ]
    return markdown_table(["stage", "student: forwards, backwards", "fake score", "teacher"], rows)


def evaluation() -> str:
    """The small video's teacher and flow map at a few step counts, beside held-out clips."""
    report = json.loads((ROOT / "docs/video/evaluation.json").read_text("utf-8"))
    steps, rows = [1, 2, 4, 8, 64, 128], []
    for name, words in ROWS.items():
        for label, method in report["methods"].items():
            values = dict(zip(method["nfe"], method[name][0], strict=True))
            cells = ["" if values[count] is None else f"{values[count]:.3g}" for count in steps]
            floor = report["floors"]["data"].get(name)
            rows.append([words, label, *cells, "" if floor is None else f"{floor:.3g}"])
    return markdown_table(["measure", "network", *steps[:-1], f"{steps[-1]} steps", "held-out clips"], rows)
