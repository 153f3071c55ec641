"""The claim in one run: flow maps and consistency maps race from the same noise against the exact answer.

Every student has the same network, data, exact teacher and number of evaluations; several seeds train as one network.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from minianyflow.batch import batches
from minianyflow.consistency import ConsistencyLoss
from minianyflow.interpolant import interpolate
from minianyflow.measures import even_noise, path_error, sliced_w2, sobol_noise
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.plane.costs import counted, spent, step_cost
from minianyflow.plane.learnt import learn
from minianyflow.plane.students import METHODS, Budget, load_student, sample, save_copies  # noqa: F401 (of the course)
from minianyflow.samplers import sample_consistency, sample_ode
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import rounded, write_report
from minianyflow.support.reports import text_table as table  # noqa: F401 (of the course)
from minianyflow.times import generator, time_grid
from minianyflow.training import Role, train
from toy_data import plane
from toy_data.own import Target

NFE = (1, 2, 4, 8, 16, 32, 64, 128)
POINTS = 8192  # of the measure: fewer would measure the sampling noise
DRAWS = 8  # of noise for a sampler that re-noises, pooled for a second reading: the floor then scatters by .1 x 1e-3
PIECE = 1024  # points sampled together: they stay in the processor's cache; a picture shows one piece
SHOWN = (1, 4, 16, 64)
SETTINGS = {  # one change at a time: docs/plane.md
    "lagrangian": {"shares": FLOW_MAPS["lagrangian"], "adaptive": 0.25},
    "teacher_step": {"shares": {"teacher_step": 1.0}, "diagonal": 0.25, "end": 0.4375},
    # a row has one time; ema: the target's and of what one samples from
    "consistency": {"form": "step", "grid": 16, "solver": "heun", "weight": torch.ones_like}
    | {"diagonal": 1.0, "end": 0.0, "ema": 0.5},
}
BUDGET = Budget()


def make_student(
    method: str, dataset: str, seeds: Sequence[int], budget: Budget, **changes
) -> tuple[Role, Callable, dict[str, EvaluationCounter]]:
    """The role of one method, `draw(step)`, the batches that it trains on, and the counters of its evaluations.

    changes: for the ablation, to SETTINGS, which are options of the loss and of the pairs of times drawn, and `ema`;
    or another class as `loss`. A loss that has an `average` gets the averaged student.
    """
    mixture = plane.load(dataset)
    choose("method", method, dict.fromkeys(METHODS[1:]))
    velocity, teacher = counted(lambda z, t, copy=None: mixture.velocity(z, t))  # exact, the same for every copy
    network = EvaluationCounter(MLP(mixture.shape, budget.width, budget.depth, seeds, sharp=budget.sharp))
    settings = {"velocity": velocity} | SETTINGS.get(method, {"shares": FLOW_MAPS.get(method)}) | changes
    pairs = {name: settings.pop(name) for name in ("diagonal", "end", "shift") if name in settings}
    student = Role(network, lr=budget.lr, muon=budget.muon, ema=settings.pop("ema", budget.ema))
    kind = settings.pop("loss", ConsistencyLoss if method == "consistency" else FlowMapLoss)
    settings |= {"average": student.average} if hasattr(kind, "average") else {}
    student.loss = kind(**{"adaptive": 0.5} | settings)
    counters = {"student": network, "average": student.average.module, "teacher": teacher}
    return student, batches(mixture.sample, budget.rows, seeds, **pairs), counters


def train_method(
    method, dataset, seeds, budget, progress=True, log_every=100, **changes
) -> tuple[Role, list[dict], dict]:
    """Train one method until its budget is spent: the role, its history, and the cost in steps and evaluations.

    changes: as for `make_student`; and warp(batch, progress), of a batch, progress from 0 to 1.
    """
    warp = changes.pop("warp", lambda batch, progress: batch)
    student, draw, counters = make_student(method, dataset, seeds, budget, **changes)
    steps = max(1, round(budget.evaluations * len(seeds) / step_cost({"student": student}, draw, counters)))
    options = {"progress": progress, "log_every": log_every}
    history = train({"student": student}, lambda step: warp(draw(step), step / steps), steps, **options)
    return student, history, {"steps": steps, **spent(counters)}


def sample_all(
    method: str, network, dataset: str, copies: int, bar: dict, counts: Sequence[int] = NFE, draws: int = DRAWS
) -> tuple[dict, dict, dict]:
    """Sample at all step `counts`, all copies from the same noises, and measure against the data.

    Returns {nfe: ends (copies, POINTS, D)}; {"sliced_w2": {nfe: [value per copy]}}, with "sliced_w2_pooled" for a
    sampler that re-noises; and for SHOWN {nfe: paths (nfe + 1, PIECE, D) of the first copy}.
    """
    reference, _ = references(dataset)
    ends, paths, renoised = {}, {}, method == "consistency"
    size = POINTS if renoised else PIECE  # fresh noise is even over all points
    condition = {"copy": torch.arange(copies).repeat(size)} if copies > 1 else {}
    distances = {name: {} for name in ("sliced_w2", "sliced_w2_pooled")[: 1 + (renoised and draws > 1)]}

    def fresh(x):
        seed = int(torch.randint(2**31, (), generator=source))
        by_copy = [even_noise(ends, seed) for ends in rearrange(x, "(point copy) d -> copy point d", copy=copies)]
        return rearrange(by_copy, "copy point d -> (point copy) d")

    for nfe in tqdm(counts, unit="sampler", **bar):
        last = []
        for draw in range(draws if renoised else 1):
            source = generator(nfe, draw)
            for z in sobol_noise(POINTS, reference.shape[1:], draw).split(size):
                z = z.repeat_interleave(copies, 0)
                if renoised:
                    path = sample_consistency(network, z, time_grid(nfe), fresh=fresh, **condition)
                else:
                    path = sample(method, network, dataset, z, nfe, **condition)
                last.append(path[-1])
                if nfe in SHOWN and len(last) == 1:
                    paths[nfe] = path[:, : PIECE * copies : copies].numpy()
        pooled = rearrange(last, "piece (point copy) d -> copy (piece point) d", copy=copies)
        ends[nfe] = pooled[:, :POINTS].contiguous()
        for name, samples in zip(distances, (ends[nfe], pooled), strict=False):
            distances[name][nfe] = [sliced_w2(of_copy, reference) for of_copy in samples]
    return ends, distances, paths


def run_method(method, dataset, seeds, budget, changes, quiet, counts, draws, position=0) -> dict:
    """Train one method (Euler has nothing to train), sample and measure it; on one thread, in a process of its own."""
    torch.set_num_threads(1)
    bar = {"position": position, "disable": quiet or None}  # None: shown where there is a terminal
    network, cost, weights = None, {"train_seconds": 0.0, "steps": 0, "evaluations": 0}, None
    if method != "euler":
        start = time.process_time()
        student, _, cost = train_method(
            method, dataset, seeds, budget, {"desc": f"training {method}", **bar}, **changes
        )
        network, cost = student.average.module, {"train_seconds": round(time.process_time() - start, 1), **cost}
        weights = network.network.state_dict()
    bar |= {"desc": f"sampling {method}"}
    sampled = sample_all(method, network, dataset, len(seeds) if network else 1, bar, counts, draws)
    return {"sampled": sampled, "cost": cost, "weights": weights}


def exact_flow(dataset: str, position: int = 0) -> tuple[Tensor, Tensor]:
    """Where the exact flow carries the measure's noises, (POINTS, D), and its paths for a picture (65, PIECE, D)."""
    torch.set_num_threads(1)
    mixture = plane.load(dataset)
    pieces = sobol_noise(POINTS, mixture.shape).split(PIECE)
    ends = [mixture.flow(z, torch.ones(len(z)), torch.zeros(len(z))) for z in pieces]
    return torch.cat(ends), sample_ode(mixture.velocity, pieces[0], time_grid(64)).numpy()


def references(dataset: str) -> list[Tensor]:
    """Two independent stratified samples of the data; their distance is the floor of the measure."""
    source = generator(0)
    return [plane.load(dataset).sample_stratified(POINTS, source) for _ in range(2)]


def floors(dataset: str, position: int = 0) -> dict:
    """What the measure reads without any error, several times each, with other noises or other samples.

    The exact flow; a perfect re-noised sampler, one draw, and DRAWS of them pooled; data against data.
    """
    torch.set_num_threads(1)
    mixture, (reference, _) = plane.load(dataset), references(dataset)
    noises = [sobol_noise(POINTS, mixture.shape, seed) for seed in range(5)]
    half = torch.full((POINTS,), 0.5)

    def renoised(seed):  # the last of two steps
        x = mixture.sample_stratified(POINTS, generator(1, seed))
        z = interpolate(x, even_noise(x, seed), half)
        return sample_ode(mixture.velocity, z, torch.tensor([0.5, 0.0]))[-1]

    pools = [[renoised(DRAWS * pool + draw) for draw in range(DRAWS)] for pool in range(5)]
    samples = {
        "exact flow": [sample_ode(mixture.velocity, z, time_grid(1))[-1] for z in noises],
        "fresh noise": [pool[0] for pool in pools],
        "fresh noise, pooled": [torch.cat(pool) for pool in pools],
        "data": [mixture.sample_stratified(POINTS, generator(2, draw)) for draw in range(5)],
    }
    return {name: {"sliced_w2": [sliced_w2(one, reference) for one in many]} for name, many in samples.items()}


def in_report(result: dict, seeds: Sequence[int], exact_ends: Tensor) -> dict:
    """One method in the JSON: per measure a list over step counts for each seed, and its cost."""
    ends, distances, _ = result["sampled"]
    counts = list(ends)
    copies = [seed % len(ends[counts[0]]) for seed in range(len(seeds))]  # Euler has one copy, the same for all seeds
    measures = {name: [[by_nfe[nfe][copy] for nfe in counts] for copy in copies] for name, by_nfe in distances.items()}
    measures["path_error"] = [[path_error(ends[nfe][copy], exact_ends) for nfe in counts] for copy in copies]
    return {"nfe": counts, **measures, **result["cost"]}


def run(
    dataset: plane.What = "spiral",
    seeds: Sequence[int] = (0, 1, 2),
    budget: Budget = BUDGET,
    output: str | Path = "outputs/demo",
    workers: int = 2,
    quiet: bool = False,
    methods: Sequence[str] = METHODS,
) -> dict:
    """The whole race: returns the report; writes any_step.json, any_step.png and METHOD.safetensors, or nothing."""
    target = check(dataset, seeds, budget)
    with staging_folder(output) as folder:
        law = target.law
        if target.truth == "learnt":
            law = run_jobs({"teacher": (learn, (law, budget, quiet))})["teacher"]
        jobs = {
            name: (run_method, (name, law, tuple(seeds), budget, {}, quiet, NFE, DRAWS)) for name in reversed(methods)
        }
        jobs |= {"exact": (exact_flow, (law,)), "floors": (floors, (law,))}
        results = run_jobs(jobs, workers)  # the longest first
        exact_ends, exact_paths = results["exact"]
        measure = {"points": POINTS, "directions": 128, "noise": "scrambled Sobol", "reference": "stratified"}
        report = {
            **target.in_report(),
            "seeds": list(seeds),
            "measure": measure | {"pooled_draws": DRAWS},
            "budget": asdict(budget),
            "floors": results["floors"],
            "methods": {name: in_report(results[name], seeds, exact_ends) for name in methods},
        }
        report = rounded(report)
        from minianyflow.plane.race_figure import any_step_figure
        from minianyflow.support.figures import save_figure

        paths = {name: results[name]["sampled"][2] for name in methods}
        save_figure(any_step_figure(report, paths, exact_paths), folder / "any_step.png")
        write_report(report, folder / "any_step.json")
        for name in methods:
            if weights := results[name]["weights"]:
                save_copies(folder / f"{name}.safetensors", weights, budget, seeds, dataset=target.name)
    return report


def check(dataset: plane.What, seeds: Sequence[int], budget: Budget) -> Target:
    """The target; raises InputError for a dataset that there is not, and for seeds or a budget that train nothing."""
    target = plane.target(dataset)
    if not seeds or len(set(seeds)) < len(seeds) or min(budget.evaluations, budget.rows) < 1:
        raise InputError(f"seeds {list(seeds)}, {budget}; expected different seeds, at least one, and positive numbers")
    return target
