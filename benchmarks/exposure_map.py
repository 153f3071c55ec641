"""Where a cure of exposure bias pays: starts x recipes x evaluations on the circle, at equal cost.

The figures are those that cannot be flattered (circle_measures.py), at frames far beyond training. All recipes of a
start have cost the same in the end, its own cost included: half an hour in all.

    python -m benchmarks.exposure_map --output docs/video
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minianyflow.measures import sobol_noise
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.on_policy import OnPolicyLoss, draw_on_policy
from minianyflow.plane import exposure
from minianyflow.plane.circle_measures import exact_clips, measure_clips
from minianyflow.plane.circle_student import (
    WINDOW,
    CausalMLP,
    ClipScore,
    FrameLoss,
    conditional_velocity,
    sample_clips,
    simulate,
)
from minianyflow.plane.costs import counted, spent, step_cost
from minianyflow.plane.exposure import FRESH, TURNED, draw_clips, make_arm
from minianyflow.support import cli
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import rounded, write_report
from minianyflow.times import generator
from minianyflow.training import Role, train
from toy_data.circle import CircleProcess

FORCING, EXACT, ON_POLICY = "teacher forcing", "teacher forcing, exact velocity", "on-policy"  # recipes of exposure.py
WINDOWS, DAGGER = "on-policy, windows of two", "own past, exact velocity"
AHEAD, FAKE_UPDATES = 2, 4  # frames of a window of WINDOWS; updates of its fake score per step
CLIPS, FRAMES = 1024, (16, 64, 160, 320)
NFE = (1, 2, 4, 16)


STAGES = (FORCING, EXACT, ON_POLICY, DAGGER, WINDOWS)  # they go on from a start; TURNED begins anew
STARTS = {"weak": FORCING, "strong": EXACT}  # the recipe of each


@dataclass(frozen=True)
class Budget(exposure.Budget):
    """What a seed spends, in evaluations: on a weak and on a strong start, and on each recipe after it."""

    weak: int = 1_280_000
    strong: int = 8_960_000
    after: int = 1_280_000


BUDGET = Budget()


class Chains:
    """Clips that a student makes as it learns, which last from batch to batch: pasts of its own.

    past: the last WINDOW frames of each (B, WINDOW, 2), without gradient. A clip begins with frames of data, one in
    five with the student's own; after `life` more frames it begins anew. lengths: the steps of its rollouts (B,).
    """

    def __init__(self, u: Callable, process: CircleProcess, count: int, seeds, steps, life: int = 16):
        self.u, self.process, self.life, self.draw = u, process, life, generator(*seeds, 6)
        rows = torch.arange(count * len(seeds))
        row, self.condition = rows // len(seeds), {"copy": rows % len(seeds)} if len(seeds) > 1 else {}
        self.lengths = torch.tensor(steps)[row % len(steps)]
        self.left = 1 + row // len(steps) % life  # ages differ
        self.past = self.begin(rows)

    def rollout(self, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Noise of `count` frames and the step g of a backward simulation of these lengths."""
        step = torch.rand(len(lengths), generator=self.draw) * lengths
        return torch.randn(len(lengths), count, 2, generator=self.draw), step.long()

    @torch.no_grad()
    def make(self, rows: Tensor, count: int, past: Tensor) -> Tensor:
        """The next frames (B, count, 2) of the clips with these numbers, after the frames `past`."""
        z, step = self.rollout(self.lengths[rows], count)
        condition = {name: value[rows] for name, value in self.condition.items()}
        return simulate(True)(self.u, z, self.lengths[rows], step, past=past, **condition)[-1]

    def begin(self, rows: Tensor) -> Tensor:
        """The first WINDOW frames of clips with these numbers."""
        past = self.process.clips.sample(len(rows), self.draw)[:, :WINDOW]
        own = torch.rand(len(rows), generator=self.draw) < 0.2
        if own.any():
            past[own] = self.make(rows[own], WINDOW, past[own, :0])
        return past

    def add(self, frames: Tensor) -> None:
        """Go on with `frames` (B, n, 2)."""
        self.past = torch.cat([self.past, frames.detach()], 1)[:, -WINDOW:]
        self.left -= frames.shape[1]
        over = (self.left <= 0).nonzero().squeeze(1)
        if len(over):
            self.past[over], self.left[over] = self.begin(over), self.life


def make_recipe(recipe: str, network: CausalMLP, process: CircleProcess, seeds: Sequence[int], budget: Budget):
    """As `exposure.make_arm`, with two recipes more; both have the exact velocity of the next frame."""
    if recipe not in (WINDOWS, DAGGER):
        return make_arm(recipe, network, process, seeds, budget)
    student, (exact, counter) = EvaluationCounter(network), counted(conditional_velocity(process))
    counters = {"student": student, "exact": counter}
    draw = draw_clips(process, budget.rows, seeds)
    forward = FrameLoss(FlowMapLoss(FLOW_MAPS["mixed"], exact, adaptive=0.5))
    if recipe == DAGGER:
        draw = on_own_pasts(draw, Chains(student, process, budget.rows // 2, seeds, budget.simulated), process)
        return {"student": Role(student, forward, lr=budget.lr)}, draw, counters
    clip = CircleProcess(WINDOW + AHEAD, phases=128)
    law = clip.after(WINDOW)
    real, counter = counted(lambda z, t, past, **others: law.velocity(z, t, clip.log_weights(past)))
    fake = EvaluationCounter(ClipScore(real, (AHEAD, 2), seeds=seeds, context=2 * WINDOW + 1))
    windows, options = Windows(Chains(student, process, budget.rows, seeds, budget.simulated)), {"betas": (0.0, 0.999)}
    loss = OnPolicyLoss(real, fake, forward, simulate=windows.simulate)
    score = Role(fake, windows.fake_loss, lr=budget.lr_fake, warmup=50, **options)
    roles = {"student": Role(student, loss, lr=budget.lr_on_policy, ema=0.99, warmup=50, **options)}
    roles |= {f"fake_score_{update}": score for update in range(FAKE_UPDATES)}
    return roles, windows.drawn(draw), counters | {"fake_score": fake, "score": counter}


def on_own_pasts(draw: Callable, chains: Chains, process: CircleProcess) -> Callable[[int], dict]:
    """`draw` with every other clip a student's own past, and the frame after it drawn from its exact law (DAgger)."""

    def drawn(step):
        batch, rows = draw(step), torch.arange(len(chains.past))
        chains.add(chains.make(rows, 1, chains.past))
        component = torch.multinomial(process.log_weights(chains.past).exp(), 1, generator=chains.draw).squeeze(1)
        law, eps = process.frame(WINDOW), torch.randn(len(rows), 2, generator=chains.draw)
        batch["x"][rows, :WINDOW], batch["frame"][rows] = chains.past, WINDOW
        batch["x"][rows, WINDOW] = law.means[component] + law.sigma * eps
        return batch

    return drawn


@dataclass
class Windows:
    """On-policy training on windows of AHEAD frames, each after WINDOW own frames, which its score is conditional on.

    The windows go on along `chains`; the fake score learns from those that the student has just made.
    """

    chains: Chains
    made: Tensor | None = None

    def drawn(self, draw: Callable) -> Callable[[int], dict]:
        """`draw` with what `OnPolicyLoss` needs; the chains go on with the windows made since."""

        def batch(step):
            chains = self.chains
            if self.made is not None:
                chains.add(self.made)
            noise, g = chains.rollout(chains.lengths, AHEAD)
            own = draw_on_policy((AHEAD, 2), len(noise), chains.draw)
            own |= {"noise": noise, "lengths": chains.lengths, "step": g}
            condition = {"past": chains.past, "length": chains.lengths}
            return draw(step) | own | {"rollout_condition": condition | chains.condition}

        return batch

    def simulate(self, u: Callable, z: Tensor, *rollout, length: Tensor, **condition) -> Tensor:
        """The windows of a batch; gradient passes from the second frame to the first, and not to the past."""
        windows = simulate(False)(u, z, *rollout, **condition)
        self.made = windows[-1].detach()
        return windows

    def fake_loss(self, u: Callable, batch: dict):
        """Flow matching on the windows just made, at new times and noises per update."""
        draw = {"generator": self.chains.draw}
        eps, t = torch.randn(self.made.shape, **draw), torch.rand(len(self.made), **draw)
        fresh = {"x": self.made, "eps": eps, "t": t, "r": t, "condition": batch["rollout_condition"]}
        return FlowMapLoss({}, weight=torch.ones_like)(u, fresh)


def train_recipe(recipe, turned, start, evaluations, seeds, budget, quiet, position=0) -> tuple[dict, dict, dict]:
    """Train by `recipe` from the weights `start` (None: from scratch): averaged weights, their cost, their figures."""
    torch.set_num_threads(1)
    process, network = CircleProcess(), CausalMLP(budget.width, seeds=seeds, turned=turned)
    if start is not None:
        network.load_state_dict(start)
    roles, draw, counters = make_recipe(recipe, network, process, seeds, budget)
    steps = max(1, round(evaluations * len(seeds) / step_cost(roles, draw, counters)))
    bar = {"desc": recipe, "position": position, "disable": quiet or None}
    train(roles, lambda step: draw(step + (start is not None) * FRESH), steps, progress=bar)
    average = roles["student"].average.module.network
    return average.state_dict(), {"steps": steps, **spent(counters)}, measure(average, len(seeds))


@torch.no_grad()
def measure(network: CausalMLP, copies: int) -> dict:
    """By NFE the figures of `measure_clips` of each copy."""
    process, z = CircleProcess(), sobol_noise(CLIPS, (max(FRAMES), 2)).repeat_interleave(copies, 0)
    condition, figures = {"copy": torch.arange(len(z)) % copies} if copies > 1 else {}, {}
    for steps in NFE:
        made = sample_clips(network, z, steps, **condition)
        figures[str(steps)] = [measure_clips(made[copy::copies], process, FRAMES) for copy in range(copies)]
    return figures


def run(
    seeds: Sequence[int] = (0, 1, 2),
    budget: Budget = BUDGET,
    output: str | Path = "outputs/exposure_map",
    workers: int = 2,
    quiet: bool = False,
) -> dict:
    """The whole map: returns the report; writes exposure_map.json and .png, or nothing."""
    common, fresh, jobs = (tuple(seeds), budget, quiet), {}, {}
    with staging_folder(output) as folder:
        for start, recipe in STARTS.items():
            before = getattr(budget, start)
            fresh[start, TURNED] = (train_recipe, (TURNED, True, None, before + budget.after, *common))
            fresh[start, recipe] = (train_recipe, (recipe, False, None, before, *common))
        results = run_jobs(dict(reversed(fresh.items())), workers)
        starts = {start: results.pop((start, recipe)) for start, recipe in STARTS.items()}
        for start, stage in product(STARTS, STAGES):
            jobs[start, stage] = (train_recipe, (stage, False, starts[start][0], budget.after, *common))
        results |= run_jobs(jobs, workers)
        floor = exact_clips(CircleProcess(phases=128), CLIPS, max(FRAMES), WINDOW)
        report = {
            "seeds": list(seeds),
            "budget": asdict(budget),
            "frames": list(FRAMES),
            "exact": measure_clips(floor, CircleProcess(), FRAMES),
            "starts": {start: _entry(result) for start, result in starts.items()},
            "cells": {start: {name: _entry(results[start, name]) for name in (*STAGES, TURNED)} for start in STARTS},
        }
        from minianyflow.plane.exposure_figure import map_figure
        from minianyflow.support.figures import save_figure

        save_figure(map_figure(report), folder / "exposure_map.png")
        write_report(report, folder / "exposure_map.json")
    return report


def _entry(result):
    return {"cost": result[1], "nfe": rounded(result[2], 3)}


def exposure_map(argv):
    """What cures exposure bias, and when; writes exposure_map.json and .png."""
    options = vars(cli.experiment_parser(exposure_map, "outputs/exposure_map", seeds="0,1,2").parse_args(argv))
    run(**options)
    print(f"\nwritten: {options['output']}/exposure_map.json, {options['output']}/exposure_map.png")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(lambda: exposure_map(sys.argv[1:])))
