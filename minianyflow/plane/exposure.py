"""Exposure bias where it is exact: a causal student of the circle process, trained on true pasts or on its own.

Trained on true pasts (teacher forcing) a student meets its own errors only when it runs free. On-policy training
(Self-Forcing, arXiv 2506.08009; AnyFlow, section 4) makes whole clips, a frame by three jumps, and matches their law.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from minianyflow.batch import batches
from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, draw_on_policy
from minianyflow.plane.circle_measures import LOST, exact_clips, measure_clips, radius_error
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
from minianyflow.plane.students import frozen, read_copy, save_copies
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import rounded, write_report
from minianyflow.times import generator, stratified_uniform
from minianyflow.training import Role, train
from toy_data import circle
from toy_data.circle import CircleProcess

STUDENTS = Path(circle.__file__).parent / "exposure" / "students.safetensors"  # of the committed run
FRESH = 1_000_000  # the first batch of an arm: no batch of the common start comes again
FORCING = {"teacher forcing": False, "teacher forcing, exact velocity": True}  # whether the velocity is the exact one
ON_POLICY = {  # weight of the forward loss, whether the past is detached
    "on-policy": (1.0, False),
    "on-policy, detached": (1.0, True),
    "on-policy, forward x 4": (4.0, False),
}
KEPT = ("teacher forcing", "on-policy", "on-policy, detached")  # arms whose weights are saved, for a scene
TURNED = "teacher forcing, turned student"  # on the exact velocity; it has a start of its own, and Muon
ARMS = tuple(FORCING | ON_POLICY)  # each continues from the same start, until it has cost the same
COLOURS = ("#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7")
NFE, CLIPS, TRUE = (1, 4, 16), 4096, 1024  # of the measure: step counts, clips sampled, true contexts
LONG, LONG_NFE, LONG_CLIPS = (16, 32, 64, 160, 320, 640), (1, 4), 1024  # of the measure of long clips


@dataclass(frozen=True)
class Budget:
    """What a seed spends."""

    start: int = 1_280_000  # evaluations (see `spent`) on the start, teacher forcing
    after: int = 2_560_000  # and on every arm after it
    rows: int = 128  # per batch and seed, of teacher forcing
    clips: int = 32  # the same of on-policy training
    simulated: tuple[int, ...] = (1, 2, 4, 16)  # lengths of rollouts
    lr: float = 1e-2
    muon: float = 0.02  # of TURNED
    lr_on_policy: float = 1e-3
    lr_fake: float = 3e-3
    width: int = 64
    points: int = 3  # of a curve


BUDGET = Budget()


def draw_clips(process: CircleProcess, rows: int, seeds: Sequence[int], simulated=None) -> Callable[[int], dict]:
    """`draw(step)` for `train`: clips and one frame of each; with `simulated` also what on-policy training draws."""
    data, shape = batches(process.clips.sample, rows, seeds), (process.frames, 2)

    def draw(step):
        shared, own = {"frame": (process.frames * stratified_uniform(rows, generator(step, 1))).long()}, {}
        if simulated is not None:
            by_seed = [draw_on_policy(shape, rows, generator(seed, step, 2), simulated) for seed in seeds]
            for name in ("noise", "score_eps"):
                own[name] = rearrange([drawn.pop(name) for drawn in by_seed], "seed row ... -> (row seed) ...")
            shared |= by_seed[0]
        return data(step) | own | {name: value.repeat_interleave(len(seeds)) for name, value in shared.items()}

    return draw


def make_arm(arm: str, network: CausalMLP, process: CircleProcess, seeds: Sequence[int], budget: Budget):
    """The roles, `draw(step)` and the evaluation counters of an arm. The real score is that of the joint law, exact."""
    student, mixed = EvaluationCounter(network), FLOW_MAPS["mixed"]
    if arm in FORCING or arm == TURNED:
        counters, exact = {"student": student}, None
        if FORCING.get(arm, True):
            exact, counters["exact"] = counted(conditional_velocity(process))
        loss = FrameLoss(FlowMapLoss(mixed, exact, adaptive=0.5 if exact else 0.0))
        role = Role(student, loss, lr=budget.lr, muon=budget.muon if arm == TURNED else None)
        return {"student": role}, draw_clips(process, budget.rows, seeds), counters
    forward_weight, detach = ON_POLICY[arm]
    real, counter = counted(lambda z, t, copy=None: process.clips.velocity(z, t))
    fake = EvaluationCounter(ClipScore(real, (process.frames, 2), seeds=seeds))
    simulation, options = {"simulate": simulate(detach)}, {"betas": (0.0, 0.999), "warmup": 50}
    loss = OnPolicyLoss(real, fake, FrameLoss(FlowMapLoss(mixed)), forward_weight, **simulation)
    roles = {
        "student": Role(student, loss, lr=budget.lr_on_policy, ema=0.99, **options),
        "fake_score": Role(fake, FakeScoreLoss(student, **simulation), lr=budget.lr_fake, **options),
    }
    draw = draw_clips(process, budget.clips, seeds, budget.simulated)
    return roles, draw, {"student": student, "fake_score": fake, "exact": counter}


@torch.no_grad()
def measure(network, process: CircleProcess, copies: int, nfe: Sequence[int] = NFE) -> dict:
    """By NFE: radius errors, free-running and with true context (copies, F); share of clips LOST; their sliced W2."""
    z = sobol_noise(CLIPS, (process.frames, 2)).repeat_interleave(copies, 0)  # the same for all copies
    truth = process.clips.sample(TRUE, generator(1)).repeat_interleave(copies, 0)
    reference = process.clips.sample_stratified(CLIPS, generator(0))

    def sample(z, steps, truth=None):
        condition = {"copy": torch.arange(len(z)) % copies} if copies > 1 else {}
        clips = sample_clips(network, z, steps, truth, **condition)
        return rearrange(clips, "(clip copy) frame xy -> clip copy frame xy", copy=copies)

    figures = {}
    for steps in nfe:
        free, with_truth = sample(z, steps), sample(z[: len(truth)], steps, truth)
        error = radius_error(free)
        figures[str(steps)] = {
            "free_running": rounded(error.mean(0), 4),
            "true_context": rounded(radius_error(with_truth).mean(0), 4),
            "lost": rounded((error[..., -1] > LOST).float().mean(0), 4),
            "sliced_w2": [round(sliced_w2(free[:, copy], reference), 4) for copy in range(copies)],
        }
    return figures


@torch.no_grad()
def measure_long(
    path: str | Path, arms: Sequence[str], seeds: int, frames: Sequence[int], nfe: Sequence[int] = LONG_NFE
) -> dict:
    """Free-running clips of saved students far beyond training's 16 frames: `measure_clips` by arm, NFE and seed.

    "exact" is the floor: each frame from its exact law, given the WINDOW frames before it.
    """
    process, z = CircleProcess(), sobol_noise(LONG_CLIPS, (max(frames), 2))
    floor = exact_clips(CircleProcess(phases=128), LONG_CLIPS, max(frames), WINDOW)  # phases one sigma apart

    def by_seed(arm, steps):
        students = [load_student(arm, copy, path) for copy in range(seeds)]
        return [measure_clips(sample_clips(u, z, steps), process, frames) for u in students]

    measured = {arm: {str(steps): by_seed(arm, steps) for steps in nfe} for arm in arms}
    return {"frames": list(frames), "exact": measure_clips(floor, process, frames), "arms": measured}


def train_arm(arm, start, evaluations, seeds, budget, quiet, position=0) -> tuple[list[dict], dict[str, Tensor]]:
    """Train one arm from the weights `start` (None: from scratch) until it has cost so many `evaluations` per seed.

    Returns its curve, [{"cost", "nfe"}] at equal distances, and the averaged weights.
    """
    torch.set_num_threads(1)
    process, network = CircleProcess(), CausalMLP(budget.width, seeds=seeds, turned=arm == TURNED)
    if start is not None:
        network.load_state_dict(start)
    roles, draw, counters = make_arm(arm, network, process, seeds, budget)
    steps = max(1, round(evaluations * len(seeds) / step_cost(roles, draw, counters)))
    stops = {round(steps * (point + 1) / budget.points) for point in range(budget.points)}
    average, curve, measuring, began = roles["student"].average.module.network, [], 0.0, time.process_time()

    def measure_at_stops(step):
        nonlocal measuring
        if step + 1 in stops:
            now = time.process_time()
            cost = {"steps": step + 1, "cpu_seconds": round(now - began - measuring, 1), **spent(counters)}
            nfe = NFE if step + 1 == steps else NFE[:-1]
            curve.append({"cost": cost, "nfe": measure(average, process, len(seeds), nfe)})
            measuring += time.process_time() - now

    bar = {"desc": arm, "position": position, "disable": quiet or None}
    first = 0 if start is None else FRESH
    train(roles, lambda step: draw(first + step), steps, progress=bar, on_step=measure_at_stops)
    return curve, average.state_dict()


def run(
    seeds: Sequence[int] = (0, 1, 2),
    budget: Budget = BUDGET,
    arms: Sequence[str] = ARMS,
    output: str | Path = "outputs/exposure",
    workers: int = 2,
    quiet: bool = False,
) -> dict:
    """The whole experiment: returns the report; writes exposure.json, exposure.png, students of KEPT, or nothing."""
    if not seeds or len(set(seeds)) < len(seeds) or min(budget.start, budget.after, budget.points) < 1:
        raise InputError(f"seeds {list(seeds)}, {budget}; expected different seeds, one at least, and positive numbers")
    for arm in arms:
        choose("arm", arm, dict.fromkeys(ARMS))
    clips, common = CircleProcess().clips, (tuple(seeds), budget, quiet)
    reference, other = (clips.sample_stratified(CLIPS, generator(seed)) for seed in range(2))
    data = {
        "radius_error": radius_error(reference).mean(),
        "sliced_w2": sliced_w2(other, reference),
        "sliced_w2_fresh": sliced_w2(clips.sample(CLIPS, generator(2)), reference),
    }
    with staging_folder(output) as folder:
        first = (train_arm, ("teacher forcing", None, budget.start, *common))
        start, weights = run_jobs({"start": first}, workers)["start"]
        jobs = {arm: (train_arm, (arm, weights, budget.after, *common)) for arm in reversed(arms)}
        jobs[TURNED] = (train_arm, (TURNED, None, budget.start + budget.after, *common))  # in all as much
        results = run_jobs(jobs, workers)
        report = {
            "seeds": list(seeds),
            "budget": asdict(budget),
            "measure": {"clips": CLIPS, "true_contexts": TRUE, "lost": LOST, "window": WINDOW},
            "data": rounded(data, 4),
            "start": start,
            "arms": {arm: results[arm][0] for arm in arms},
        }
        from minianyflow.plane.exposure_figure import exposure_figure
        from minianyflow.support.figures import save_figure

        trained = {arm: results[arm][1] for arm in (*KEPT, TURNED) if arm in results}
        halves = {f"{arm}/{name}": value.half() for arm, state in trained.items() for name, value in state.items()}
        save_copies(folder / STUDENTS.name, halves, budget, seeds)
        save_figure(exposure_figure(report), folder / "exposure.png")
        report["long"] = measure_long(folder / STUDENTS.name, list(trained), len(seeds), LONG)
        report["turned"] = results[TURNED][0]
        write_report(report, folder / "exposure.json")
    return report


def load_student(arm: str, copy: int = 0, path: str | Path = STUDENTS) -> CausalMLP:
    """The network of an arm (of KEPT, or TURNED) and of one seed, as `run` wrote it; by default the committed one."""
    choose("arm", arm, dict.fromkeys((*KEPT, TURNED)))
    weights, seeds, budget = read_copy(path, copy, f"{arm}/")
    return frozen(CausalMLP(budget["width"], seeds=seeds, turned=arm == TURNED), weights)
