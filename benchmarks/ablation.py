"""What limits the flow map on the plane, what moves it, how the baseline was tuned; the choice on seeds of its own.

`python -m benchmarks.ablation`: twenty minutes on two cores, at a third of the demo's budget. Options: --help.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minianyflow.batch import Batch
from minianyflow.consistency import ConsistencyLoss
from minianyflow.interpolant import broadcast_time, interpolate
from minianyflow.measures import sliced_w2
from minianyflow.notation import Network
from minianyflow.objectives import DELTA, FlowMapLoss, adaptive_weight, eulerian_target
from minianyflow.plane.commands import race_options
from minianyflow.plane.race import (
    BUDGET,
    PIECE,
    SHOWN,
    Budget,
    check,
    exact_flow,
    in_report,
    references,
    run_method,
    table,
    train_method,
)
from minianyflow.samplers import sample_flow_map
from minianyflow.support import cli
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import rounded, write_report
from minianyflow.times import generator, time_grid
from toy_data import plane


def short_first(batch: Batch, progress: float) -> Batch:
    """A curriculum: jumps begin at a tenth of their length and are whole from half of the training on."""
    share = min(1.0, 0.1 + 1.8 * progress)
    return batch | {"r": batch["t"] - share * (batch["t"] - batch["r"])}


def more_ends(batch: Batch, progress: float, start: float = 0.7, share: float = 0.75) -> Batch:
    """From `start` of the training on, `share` of the rows 0 < r < t go to r = 0."""
    free = (batch["r"] < batch["t"]) & (batch["split"] < share) & (progress >= start)
    return batch | {"r": torch.where(free, 0.0, batch["r"])}


class ShortSteps(FlowMapLoss):
    """With a shorter step of the teacher."""

    longest_step = 1 / 32


@dataclass
class AverageJumps(FlowMapLoss):
    """With targets made by the averaged student."""

    average: Network | None = None

    def target(self, name, network, *rows):
        """As FlowMapLoss."""
        return super().target(name, self.average, *rows)


class LearntWeights(FlowMapLoss):
    """The loss of each row over the running mean of those of like t and t - r, in 8 x 8 cells: the learnt weight of
    EDM2 (arXiv 2312.02696, section 3.3) at its own minimum. Rows r = t are cells of their own.
    """

    means = torch.ones(9 * 8)

    def __call__(self, u, batch):
        """As FlowMapLoss."""
        losses, errors = super().__call__(u, batch)
        t, length = batch["t"], batch["t"] - batch["r"]
        cell = (8 * t).long().clamp(max=7) + 8 * torch.where(length > 0, 1 + (8 * length).long().clamp(max=7), 0)
        count = torch.bincount(cell, minlength=72)
        now = torch.bincount(cell, losses.detach(), minlength=72) / count.clamp(min=1)
        self.means = torch.where(count > 0, torch.lerp(self.means, now, 0.02), self.means)
        return losses / self.means[cell], errors


@torch.no_grad()
def continuous_target(
    u: Network, z: Tensor, t: Tensor, v: Tensor, now: Tensor, warm: float = 1.0, delta=DELTA
) -> Tensor:
    """u + g / (|g| + 0.1), with the tangent g = (v - u) - warm t du/dt, normalised per row (sCM, section 3).

    The limit of many steps. now: u(z, t, 0). warm grows from 0 to 1.
    """
    end = torch.zeros_like(t)
    tangent = (1 - warm) * v + warm * eulerian_target(u, z, t, end, v, delta) - now
    size = tangent.flatten(1).norm(dim=1) / tangent[0].numel() ** 0.5  # (B,), root mean square where sCM has the norm
    return now + tangent / broadcast_time(size + 0.1, z)


class ContinuousLoss(ConsistencyLoss):
    """Continuous consistency distillation, at any time; the tangent is warmed up over `warmup` steps."""

    calls, warmup = 0, 1000

    def __call__(self, u, batch):
        """As ConsistencyLoss."""
        self.calls += 1
        t, u = batch["t"], partial(u, **batch.get("condition", {}))
        z, warm = interpolate(batch["x"], batch["eps"], t), min(1.0, self.calls / self.warmup)
        out, v = u(z, t, torch.zeros_like(t)), self.velocity(z, t, **batch.get("condition", {}))
        error = (out - continuous_target(u, z, t, v, out.detach(), warm)).square().flatten(1).mean(1)
        loss = self.weight(t) * error * adaptive_weight(error, self.adaptive)
        return loss, {"consistency": error.detach().mean()}


# Factors on numbers of the budget, or values, and settings of the method (race.SETTINGS); all else as in the demo.
ADAMW, SHARP = ({"muon": None}, {}), {"sharp": True}
CHANGES = {
    "teacher_step": {
        "": ({}, {}),
        "AdamW": ADAMW,
        "Muon / 2": ({"muon": 1 / 2}, {}),
        "Muon x 2": ({"muon": 2}, {}),
        "256 rows": ({"rows": 2}, {}),
        "half the rows on r = t": ({}, {"diagonal": 0.5, "end": 0.25}),
        "steps of 1/32": ({}, {"loss": ShortSteps}),
        "half semigroup": ({}, {"shares": {"teacher_step": 0.5, "semigroup": 0.5}}),
        "short jumps first": ({}, {"warp": short_first}),
        "r = 0 for more rows, late": ({}, {"end": 0.375, "warp": more_ends}),
        "learnt weights": ({}, {"loss": LearntWeights, "adaptive": 0.0}),
        "weight 1": ({}, {"weight": torch.ones_like}),
        "squares": ({}, {"adaptive": 0.0}),
        "width x 2": ({"width": 2}, {}),
        "sharp": (SHARP, {}),
        "sharp, earlier times": (SHARP, {"diagonal": 0.35, "end": 0.35, "shift": 0.6}),
        "evaluations x 2": ({"evaluations": 2}, {}),
    },
    "mixed": {
        "": ({}, {}),
        "AdamW": ADAMW,
        "sharp": (SHARP, {}),
        "data velocity": ({}, {"velocity": None, "adaptive": 0.0}),
    },
    "semigroup": {"": ({}, {}), "the average jumps": ({}, {"loss": AverageJumps})},
    "lagrangian": {"": ({}, {}), "gradient through the end": ({}, {"shares": {"lagrangian_through_end": 1.0}})},
    "consistency": {
        "": ({}, {}),
        "AdamW": ADAMW,
        "sharp": (SHARP, {}),
        "Muon x 2": ({"muon": 2}, {}),
        "on a grid": ({}, {"form": "discrete"}),
        "squares": ({}, {"adaptive": 0.0}),
        "EMA .9": ({}, {"ema": 0.9}),
        "continuous": ({}, {"loss": ContinuousLoss, "adaptive": 0.0}),
    },
}


HELD_BACK = ("ring8", "checkerboard", "rings", "skewed_ring")
FRESH = {"spiral": ("teacher_step", "mixed", "consistency")} | dict.fromkeys(HELD_BACK, ("teacher_step",))


def run(
    dataset: str, seeds: Sequence[int], budget: Budget, output: str | Path, workers: int = 2, quiet: bool = False
) -> dict:
    """Train each method once for each of its CHANGES; writes `ablation.json`, in the form of the race's report.

    Re-noised samplers take one draw: read them at one step, where they draw none.
    """
    check(dataset, seeds, budget)
    with staging_folder(output) as folder:
        jobs = {"exact": (exact_flow, (dataset,))}
        for method, changes in CHANGES.items():
            for name, (factors, options) in changes.items():
                changed = {
                    key: type(old)(old * factor) if (old := getattr(budget, key)) and factor else factor
                    for key, factor in factors.items()
                }
                arguments = (method, dataset, tuple(seeds), replace(budget, **changed), options, quiet, SHOWN, 1)
                jobs[f"{method}, {name}" if name else method] = (run_method, arguments)
        results = run_jobs(jobs, workers)
        ends, _ = results.pop("exact")
        methods = {name: in_report(result, seeds, ends) for name, result in results.items()}
        report = rounded({"dataset": dataset, "seeds": list(seeds), "methods": methods})
        write_report(report, folder / "ablation.json")
    return report


def histogram_kl(truth: Tensor, samples: Tensor, bins: int = 60, limit: float = 2.5) -> float:
    """KL of the histogram of `truth` (n, 2) from that of `samples` (m, 2), bins x bins over +-limit.

    1e-10 is added to every share. Needs many samples: with 100,000 in 60 x 60 bins, two independent sets of the
    checkerboard read .02.
    """
    edges = [np.linspace(-limit, limit, bins + 1)] * 2
    p, q = (np.histogram2d(*points.numpy().T, edges)[0] / len(points) + 1e-10 for points in (truth, samples))
    return float((p * np.log(p / q)).sum())


def checkerboard_kl(
    seeds: Sequence[int] = range(10, 15), budget: Budget = BUDGET, points: int = 100_000, counts: Sequence[int] = SHOWN
) -> dict:
    """Histogram KL of the demo's flow map on the checkerboard, {steps: [value per seed]}; "data": of two samples."""
    mixture, copies = plane.load("checkerboard"), len(seeds)
    student, _, _ = train_method("teacher_step", "checkerboard", tuple(seeds), budget, progress=False)
    truth, other = (mixture.sample(points, generator(draw)) for draw in range(2))
    report = {"data": [histogram_kl(truth, other)]}
    for nfe in counts:
        ends = []  # of each piece, (copies, piece, 2)
        for z in torch.randn(points, 2, generator=generator(2)).split(PIECE):
            condition = {"copy": torch.arange(copies).repeat(len(z))} if copies > 1 else {}
            path = sample_flow_map(student.average.module, z.repeat_interleave(copies, 0), time_grid(nfe), **condition)
            ends.append(rearrange(path[-1], "(point copy) d -> copy point d", copy=copies))
        report[nfe] = [histogram_kl(truth, samples) for samples in torch.cat(ends, 1)]
    return report


def fresh(seeds: Sequence[int] = range(10, 15), output: str | Path = "outputs/fresh", workers: int = 2) -> dict:
    """What was chosen, trained as in the demo on seeds that it was not chosen on, and on all targets: `fresh.json`.

    Re-noised samplers take one draw, as in `run`.
    """
    names = [f"{method}, {dataset}" for dataset, methods in FRESH.items() for method in methods]
    with staging_folder(output) as folder:
        jobs = {f"exact, {dataset}": (exact_flow, (dataset,)) for dataset in FRESH}
        for name in names:
            jobs[name] = (run_method, (*name.split(", "), tuple(seeds), BUDGET, {}, True, SHOWN, 1))
        results = run_jobs(jobs, workers)
        ends = {dataset: results[f"exact, {dataset}"][0] for dataset in FRESH}
        methods = {name: in_report(results[name], seeds, ends[name.split(", ")[1]]) for name in names}
        floors = {f"exact flow, {name}": {"sliced_w2": sliced_w2(ends[name], references(name)[0])} for name in FRESH}
        report = rounded({"seeds": list(seeds), "methods": methods, "floors": floors})
        write_report(report, folder / "fresh.json")
    return report


def ablation(argv: list[str]) -> int:
    """Change one thing at a time, at a third of the demo's budget; writes ablation.json."""
    options = race_options(ablation, argv, "outputs/ablation", 2_000_000)
    report = run(**options)
    print(f"\n{table(report)}\n\n{table(report, 'path_error')}\n\nwritten: {options['output']}/ablation.json")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(lambda: ablation(sys.argv[1:])))
