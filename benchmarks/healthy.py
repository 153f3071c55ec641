"""Curves of the three stages on small video, healthy and made to fail: docs/healthy.md and docs/healthy/.

Every run is the loop of long runs (wan/trainer.py), from the committed weights of small video, with the figures that a
tracker shows. Every so often the student is sampled from fixed noise. Measured in latents, 1 is as much as held-out
clips have:
    spread   how far the clips of a prompt lie from their mean: 0 where all are one clip
    motion   how far a frame lies from the one before: 0 for stills
    size     how far numbers lie from 0: above 1 colours saturate
and the distance from held-out clips (w2: sliced W2 x 1000).
"""

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.published import material
from minianyflow.measures import sliced_w2
from minianyflow.support import cli
from minianyflow.support.errors import InputError
from minianyflow.support.figures import COLOURS, save_figure
from minianyflow.support.files import staging_folder
from minianyflow.support.reports import markdown_table, rounded
from minianyflow.training import Role
from minianyflow.video import report as video
from minianyflow.video import stages
from minianyflow.wan.trainer import train_run

SEEDS, ROWS, CLIPS, LOOKS = (0, 1, 2), 32, 128, 8
KINDS = {  # {kind of stage: (its healthy run, its parent, learning rate, loss)}
    "teacher": ("teacher", "", 6e-3, {}),
    "flow_map": ("forward", "teacher", 3e-3, stages.EULERIAN),
    "on_policy": ("on-policy", "eulerian", 1e-4, {"forward_weight": 24.0}),
}
ALONE = {"forward_weight": 0.0}
CASES = {  # {name: (kind of stage, steps, what is another than in the healthy run)}
    "teacher": ("teacher", 400, {}),
    "forward": ("flow_map", 160, {}),
    "on-policy": ("on_policy", 120, {}),
    "collapse": ("on_policy", 80, {"lr": 3e-4, "loss": ALONE, "guidance": 24.0, "fake_lr": 1e-4}),
    "saturation": ("on_policy", 120, {"lr": 1e-3, "loss": ALONE, "fake_lr": 1e-6}),
    "still": ("teacher", 400, {"still": 0.7}),
    "nan": ("flow_map", 60, {"lr": 100.0}),
    "lagging": ("on_policy", 80, {"lr": 3e-4, "loss": ALONE, "fake_lr": 1e-5}),
}
HEALTHY = {kind: entry[0] for kind, entry in KINDS.items()}
LOSSES = {"teacher": "teacher/loss", "flow_map": "student/loss", "on_policy": "student/distribution matching"}
KEPT = {"loss", "gradient_norm", "tangent", "eulerian", "distribution matching"}


def build(earlier: stages.Earlier, kind: str, seed: int, changes: dict) -> tuple[dict[str, Role], Callable]:
    """The roles of a run and its batches, as the stages of small video have them, with `changes`."""
    _, parent, lr, loss = KINDS[kind]
    options = {"lr": changes.get("lr", lr), "options": changes.get("loss", loss)}
    guidance = changes.get("guidance", stages.GUIDANCE)
    stage = stages.Stage(kind, parent, rows=ROWS, stream=11, guidance=guidance, **options)
    roles, draw = stages.BUILDERS[kind](stage, seed, earlier)
    next(iter(roles.values())).warmup = 10
    if "fake_lr" in changes:
        roles["fake"].lr = changes["fake_lr"]

    def stilled(step):
        batch, rows = draw(step), round(changes["still"] * ROWS)
        x = batch["x"]
        return batch | {"x": torch.cat([x[:rows, :1].expand_as(x[:rows]), x[rows:]])}

    return roles, stilled if "still" in changes else draw


@torch.no_grad()
def measure(network: Callable, kind: str, clips: Tensor, balls: Tensor) -> dict[str, float]:
    """Spread, motion and size of samples beside those of `clips` (n, F, C, h, w), and their distance."""
    z = torch.randn(clips.shape, generator=stages.generator(7))
    prompt = stages.TextEncoder()(stages.blobs.PROMPTS)[balls - 1]
    how = ("euler", 16) if kind == "teacher" else ("flow_map", 4)
    made = video.sample(how[0], network, z, prompt, how[1])
    ours, theirs = _figures(made, balls), _figures(clips, balls)
    return {name: ours[name] / theirs[name] for name in ours} | {"w2": 1000 * sliced_w2(made, clips)}


def _figures(clips, balls):
    around = torch.cat([clips[balls == k] - clips[balls == k].mean(0) for k in (1, 2)])
    numbers = {"spread": around, "motion": clips.diff(dim=1), "size": clips}
    return {name: float(values.square().mean().sqrt()) for name, values in numbers.items()}


def train_case(name: str, seed: int, folder: Path, clips: tuple[Tensor, Tensor]) -> dict:
    """One case: history and measures, as columns, at about LOOKS steps; and the line that stopped it, if one did."""
    kind, steps, changes = CASES[name]
    roles, draw = build(stages.Earlier(folder), kind, seed, changes)
    network, measures, history, stopped = next(iter(roles.values())).network, [], [], None
    accelerator = Accelerator(cpu=True)
    accelerator.log = lambda values, step: history.append({"step": step} | values)
    looks = max(1, steps // LOOKS), lambda done: measures.append({"step": done} | measure(network, kind, *clips))
    try:
        train_run(roles, draw, steps, 1, accelerator, False, None, 1, samples=looks)
    except InputError as problem:
        stopped = str(problem)
    shown = history[:: max(1, len(history) // LOOKS)]
    kept = [{key: entry[key] for key in entry if key == "step" or key.split("/")[-1] in KEPT} for entry in shown]
    return rounded({"history": columns(kept), "measures": columns(measures)}, 4) | {"stopped": stopped}


def columns(entries: list[dict]) -> dict[str, list[float]]:
    """{name: value per entry}."""
    return {key: [entry[key] for entry in entries] for key in entries[0]}


def run(folder: str | Path = "outputs/healthy") -> dict:
    """Train every case with every seed; writes healthy.json and a figure per case, all or none.

    The report: {case: [what `train_case` returns, per seed]}.
    """
    torch.set_num_threads(1)
    where, (x, balls) = material("video", Path(folder) / "video")
    clips = x[:CLIPS], balls[:CLIPS]
    report = {name: [train_case(name, seed, where, clips) for seed in SEEDS] for name in tqdm(CASES, unit="case")}
    with staging_folder(folder) as unfinished:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entries)}" for name, entries in report.items())
        (unfinished / "healthy.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        for name in CASES:
            save_figure(draw(report, name), unfinished / f"{name}.png", dpi=80, colours=16)
    return report


def draw(report: dict, name: str) -> Figure:
    """A case beside the healthy run of its stage, which is grey: losses, gradient norm, and what samples measure.

    A line per seed.
    """
    kind = CASES[name][0]
    losses = {LOSSES[kind]: "0", "fake/loss": "1"} if kind == "on_policy" else {LOSSES[kind]: "0"}
    panels = {"loss": ("history", list(losses)), "gradient norm": ("history", [f"{student_of(kind)}/gradient_norm"])}
    panels |= {key: ("measures", [key]) for key in ("spread", "motion", "size")}
    figure = Figure((15, 3), layout="constrained")
    for axes, (title, (part, keys)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for who in dict.fromkeys((HEALTHY[kind], name)):
            colour = "0.6" if who == HEALTHY[kind] else COLOURS["consistency"]
            for (number, entry), (key, line) in product(enumerate(report[who]), zip(keys, ("-", ":"), strict=False)):
                label = None if number else f"{key.replace('student/', '')}, {who}"
                style = {"marker": "o", "markersize": 3, "linewidth": 1, "color": colour, "label": label}
                axes.plot(entry[part]["step"], entry[part][key], line, **style)
        axes.set_title(title, fontsize=14)
        axes.set_xlabel("step", fontsize=12)
        if part == "history":
            axes.set_yscale("log")
        else:
            axes.axhline(1.0, color="0.85", zorder=0)
            axes.set_ylim(0, max(1.2, axes.get_ylim()[1]))
        if title == "loss":
            axes.legend(fontsize=8)
    return figure


def table(report: dict) -> str:
    """The first and the last figures of all cases: means of the seeds (the range of the last)."""
    rows = []
    for name, (kind, *_) in CASES.items():
        cells = []
        for key in (LOSSES[kind], "fake/loss", f"{student_of(kind)}/gradient_norm"):
            values = [entry["history"][key] for entry in report[name] if key in entry["history"]]
            first = f"{fmean(one[0] for one in values):.3g} to " if values else ""
            cells.append(first + mean_and_range([one[-1] for one in values], ".3g"))
        for key, form in (("spread", ".2f"), ("motion", ".2f"), ("size", ".2f"), ("w2", ".0f")):
            cells.append(mean_and_range([entry["measures"][key][-1] for entry in report[name]], form))
        rows.append([name, *cells])
    header = ["run", "loss", "of the fake score", "gradient norm", "spread", "motion", "size", "distance"]
    return markdown_table(header, rows)


def mean_and_range(values: list[float], form: str) -> str:
    """The mean (largest - smallest) as text; of no values an empty one."""
    return f"{fmean(values):{form}} ({max(values) - min(values):{form}})" if values else ""


def student_of(kind: str) -> str:
    """The name of the role that is sampled."""
    return "teacher" if kind == "teacher" else "student"


def main(argv: list[str] | None = None) -> int:
    """Train, draw and print the table; returns the exit status."""
    parser = cli.Parser("python -m benchmarks.healthy", description=__doc__)
    parser.add_argument("--output", default="outputs/healthy", help="folder (default: outputs/healthy)")
    print(table(run(parser.parse_args(argv).output)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
