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
from minianyflow.measures import path_error, sliced_w2, sobol_noise
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.plane.learnt import learn
from minianyflow.plane.students import METHODS, Budget, load_student, sample, save_copies  # noqa: F401 (of the course)
from minianyflow.samplers import sample_ode
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import mean, rounded, write_report
from minianyflow.support.reports import text_table as table  # noqa: F401 (of the course)
from minianyflow.times import generator, time_grid
from minianyflow.training import Role, train
from toy_data import plane
from toy_data.own import Target

NFE = (1, 2, 4, 8, 16, 32, 64, 128)
POINTS = 8192  # of the measure: fewer would measure the sampling noise
DRAWS = 4  # of fresh noise for a sampler that re-noises, pooled for a second reading: one alone reads mostly that noise
PIECE = 1024  # points sampled together: they stay in the processor's cache; a picture shows one piece
SHOWN = (1, 4, 16, 64)
ADAPTIVE = {"lagrangian": 0.25}  # 0.5 for the others, who are worse with 1/4; 0 and 1 were tried for it
BUDGET = Budget()


def make_student(method: str, dataset: str, seeds: Sequence[int], budget: Budget, **changes) -> tuple[Role, Callable]:
    """The role of one method, and `draw(step)`, the batches that it trains on.

    changes: for the ablation, to the options of the loss, to the pairs of times (`diagonal`, `end`), or to `ema`.
    """
    mixture = plane.load(dataset)
    choose("method", method, dict.fromkeys(METHODS[1:]))

    def velocity(z, t, copy=None):  # the exact teacher, the same for every copy
        return mixture.velocity(z, t)

    pairs = {"diagonal": changes.pop("diagonal", 0.5), "end": changes.pop("end", 0.25)}
    network = EvaluationCounter(MLP(mixture.shape, budget.width, budget.depth, seeds))
    ema = changes.pop("ema", 0.5 if method == "consistency" else 0.999)  # the target's, and of what one samples from
    student = Role(network, lr=budget.lr, ema=ema)
    if method == "consistency":  # one change at a time: docs/plane.md
        options = {"grid": 16, "solver": "heun", "weight": torch.ones_like, "adaptive": 0.5}
        student.loss = ConsistencyLoss(velocity, student.average, **options | changes)
        pairs = {"diagonal": 1.0, "end": 0.0}  # a row has one time
    else:
        options = {"shares": FLOW_MAPS[method], "velocity": velocity, "adaptive": ADAPTIVE.get(method, 0.5)}
        student.loss = FlowMapLoss(**options | changes)
    return student, batches(mixture.sample, budget.rows, seeds, **pairs)


def sample_all(method: str, network, dataset: str, copies: int, bar: dict) -> tuple[dict, dict, dict]:
    """Sample at every step count, all copies from the same noises, and measure against the data.

    Returns {nfe: ends (copies, POINTS, D)}; {"sliced_w2": {nfe: [value per copy]}}, with "sliced_w2_pooled" for a
    sampler that re-noises; and for SHOWN {nfe: paths (nfe + 1, PIECE, D) of the first copy}.
    """
    condition = {"copy": torch.arange(copies).repeat(PIECE)} if copies > 1 else {}
    reference, _ = references(dataset)
    ends, paths, renoised = {}, {}, method == "consistency"
    distances = {name: {} for name in ("sliced_w2", "sliced_w2_pooled")[: 1 + renoised]}
    for nfe in tqdm(NFE, unit="sampler", **bar):
        pieces = [
            sample(method, network, dataset, z.repeat_interleave(copies, 0), nfe, draw * POINTS + start, **condition)
            for draw in range(DRAWS if renoised and nfe > 1 else 1)
            for start, z in enumerate(sobol_noise(POINTS, reference.shape[1:]).split(PIECE))
        ]
        last = [piece[-1] for piece in pieces]
        pooled = rearrange(last, "piece (point copy) d -> copy (piece point) d", copy=copies)
        ends[nfe] = pooled[:, :POINTS].contiguous()
        for name, samples in zip(distances, (ends[nfe], pooled), strict=False):
            distances[name][nfe] = [sliced_w2(of_copy, reference) for of_copy in samples]
        if nfe in SHOWN:
            paths[nfe] = pieces[0][:, ::copies].numpy()
    return ends, distances, paths


def run_method(method, dataset, seeds, budget, changes, quiet, position=0) -> dict:
    """Train one method (Euler has nothing to train), sample and measure it; on one thread, in a process of its own."""
    torch.set_num_threads(1)
    bar = {"position": position, "disable": quiet or None}  # None: shown where there is a terminal
    network, seconds, evaluations, weights = None, 0.0, 0, None
    if method != "euler":
        student, draw = make_student(method, dataset, seeds, budget, **changes)
        start = time.perf_counter()
        train({"student": student}, draw, budget.steps, progress={"desc": f"training {method}", **bar})
        seconds, network = time.perf_counter() - start, student.average.module
        evaluations, weights = student.network.rows + network.rows, network.network.state_dict()
    cost = {"train_seconds": round(seconds, 1), "network_evaluations": evaluations}
    sampled = sample_all(method, network, dataset, len(seeds) if network else 1, {"desc": f"sampling {method}", **bar})
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


def floors(dataset: str, exact_ends: Tensor) -> dict:
    """What the measure reads without any error: data against data, a perfect re-noised sampler, the exact flow."""
    mixture, (reference, other) = plane.load(dataset), references(dataset)
    fresh = [mixture.sample(DRAWS * POINTS, generator(1, draw)) for draw in range(8)]
    one, pooled = (mean(sliced_w2(sample[:n], reference) for sample in fresh) for n in (POINTS, DRAWS * POINTS))
    return {
        "reference_floor": {"sliced_w2": sliced_w2(reference, other)},
        "fresh_noise": {"sliced_w2": one, "sliced_w2_pooled": pooled},
        "exact_flow": {"sliced_w2": sliced_w2(exact_ends, reference)},
    }


def in_report(result: dict, seeds: Sequence[int], exact_ends: Tensor) -> dict:
    """One method in the JSON: per measure a list over step counts for each seed, and its cost."""
    ends, distances, _ = result["sampled"]
    copies = [seed % len(ends[NFE[0]]) for seed in range(len(seeds))]  # Euler has one copy, the same for all seeds
    measures = {name: [[by_nfe[nfe][copy] for nfe in NFE] for copy in copies] for name, by_nfe in distances.items()}
    measures["path_error"] = [[path_error(ends[nfe][copy], exact_ends) for nfe in NFE] for copy in copies]
    return {"nfe": list(NFE), **measures, **result["cost"]}


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
        jobs = {name: (run_method, (name, law, tuple(seeds), budget, {}, quiet)) for name in reversed(methods)}
        results = run_jobs(jobs | {"exact": (exact_flow, (law,))}, workers)  # the longest first
        exact_ends, exact_paths = results["exact"]
        measure = {"points": POINTS, "directions": 128, "noise": "scrambled Sobol", "reference": "stratified"}
        report = {
            **target.in_report(),
            "seeds": list(seeds),
            "measure": measure | {"pooled_draws": DRAWS},
            "budget": asdict(budget),
            **floors(law, exact_ends),
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
    if not seeds or len(set(seeds)) < len(seeds) or min(budget.steps, budget.rows) < 1:
        raise InputError(f"seeds {list(seeds)}, {budget}; expected different seeds, at least one, and positive numbers")
    return target
