"""The claim in one run: flow maps and consistency maps race from the same noise against the exact answer.

Every student has the same network, data, teacher (the exact velocity), evaluations; several seeds train as one.
"""

import json
import time
from dataclasses import asdict

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from minianyflow.batch import batches
from minianyflow.consistency import ConsistencyLoss
from minianyflow.measures import path_error, sliced_w2, sobol_noise
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.plane.students import METHODS, Budget, load_student, sample  # noqa: F401 (opens what `run` writes)
from minianyflow.samplers import sample_ode
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.times import generator, time_grid
from minianyflow.training import Role, train
from toy_data import plane

NFE = (1, 2, 4, 8, 16, 32, 64, 128)
POINTS = 8192  # of the measure: fewer would measure the sampling noise
DRAWS = 4  # of fresh noise for a sampler that re-noises, pooled for a second reading: one alone reads mostly that noise
PIECE = 1024  # of the points, carried together: they stay in the processor's cache; a picture shows one piece
SHOWN = (1, 4, 16, 64)

ADAPTIVE = {"lagrangian": 0.25}  # 0.5 for the others, who are worse with 1/4; 0 and 1 were tried for it


BUDGET = Budget()


def make_student(method, dataset, seeds, budget, **changes):
    """The role of one method and the batches it trains on; its loss, and the pairs that needs, are its own.

    changes: to the options of the loss, to the pairs drawn or to `ema`, for the ablation.
    """
    mixture = plane.load(dataset)
    choose("method", method, dict.fromkeys(METHODS[1:]))

    def velocity(z, t, copy=None):  # the exact teacher, the same for every copy
        return mixture.velocity(z, t)

    pairs = {"diagonal": changes.pop("diagonal", 0.5), "end": changes.pop("end", 0.25)}
    network = EvaluationCounter(MLP(width=budget.width, depth=budget.depth, seeds=seeds))
    ema = changes.pop("ema", 0.5 if method == "consistency" else 0.999)  # the target's, and of what one samples from
    student = Role(network, lr=budget.lr, ema=ema)
    if method == "consistency":  # one change at a time: docs/plane.md
        options = {"grid": 16, "solver": "heun", "weight": torch.ones_like, "adaptive": 0.5}
        student.loss = ConsistencyLoss(velocity, student.average, **options | changes)
        pairs = {"diagonal": 1.0, "end": 0.0}  # a row has one time
    else:
        shares = FLOW_MAPS[method]
        options = {"shares": shares, "velocity": velocity, "adaptive": ADAPTIVE.get(method, 0.5)}
        student.loss = FlowMapLoss(**options | changes)
    return student, batches(mixture.sample, budget.rows, seeds, **pairs)


def sample_all(method, network, dataset, copies, bar):
    """Sample at every step count, the copies from the same noises, and measure against the data.

    Returns {nfe: ends (copies, POINTS, 2)}, {"sliced_w2": {nfe: [one a copy]}}, with "sliced_w2_pooled" for a sampler
    that re-noises, and, for some, {nfe: (nfe + 1, PIECE, 2)}, the paths of the first copy.
    """
    condition = {"copy": torch.arange(copies).repeat(PIECE)} if copies > 1 else {}
    reference, _ = references(dataset)
    ends, paths, renoised = {}, {}, method == "consistency"
    distances = {name: {} for name in ("sliced_w2", "sliced_w2_pooled")[: 1 + renoised]}
    for nfe in tqdm(NFE, unit="sampler", **bar):
        pieces = [
            sample(method, network, dataset, z.repeat_interleave(copies, 0), nfe, draw * POINTS + start, **condition)
            for draw in range(DRAWS if renoised and nfe > 1 else 1)
            for start, z in enumerate(sobol_noise(POINTS, (2,)).split(PIECE))
        ]
        pooled = torch.cat([piece[-1] for piece in pieces]).reshape(-1, copies, 2).transpose(0, 1)
        ends[nfe] = pooled[:, :POINTS].contiguous()
        for name, samples in zip(distances, (ends[nfe], pooled), strict=False):
            distances[name][nfe] = [sliced_w2(each, reference) for each in samples]
        if nfe in SHOWN:
            paths[nfe] = pieces[0][:, ::copies].numpy()
    return ends, distances, paths


def run_method(method, dataset, seeds, budget, changes, quiet, position=0):
    """Train one method (Euler has nothing to train), sample and measure it; on one thread, in a process of its own."""
    torch.set_num_threads(1)
    bar = {"position": position, "disable": quiet or None}  # None: shown where there is a terminal
    if method == "euler":
        sampled = sample_all(method, None, dataset, 1, {"desc": "sampling euler", **bar})
        return {"sampled": sampled, "cost": {"train_seconds": 0.0, "network_evaluations": 0}}
    student, draw = make_student(method, dataset, seeds, budget, **changes)
    start = time.perf_counter()
    train(
        {"student": student},
        draw,
        budget.steps,
        progress={"desc": f"training {method}", **bar},
    )
    network = student.average.module
    cost = {
        "train_seconds": round(time.perf_counter() - start, 1),
        "network_evaluations": student.network.rows + network.rows,
    }
    return {
        "sampled": sample_all(method, network, dataset, len(seeds), {"desc": f"sampling {method}", **bar}),
        "cost": cost,
        "weights": network.network.state_dict(),
    }


def exact_flow(dataset, position=0):
    """Where the exact flow carries the measure's noises, (POINTS, 2), and its paths for a picture (65, PIECE, 2)."""
    torch.set_num_threads(1)
    mixture, pieces = plane.load(dataset), sobol_noise(POINTS, (2,)).split(PIECE)
    ends = [mixture.flow(z, torch.ones(len(z)), torch.zeros(len(z))) for z in pieces]
    return torch.cat(ends), sample_ode(mixture.velocity, pieces[0], time_grid(64)).numpy()


def references(dataset):
    """Two independent stratified samples of the data; how far apart they are is the floor of the measure."""
    source = generator(0)
    return [plane.load(dataset).sample_stratified(POINTS, source) for _ in range(2)]


def in_report(result, seeds, exact_ends):
    """One method as it stands in the JSON: a list over step counts for each seed, and what it cost."""
    ends, distances, _ = result["sampled"]
    copies = [seed % len(ends[1]) for seed in range(len(seeds))]  # Euler has one copy, the same for all seeds
    return {
        "nfe": list(NFE),
        **{name: [[round(by[nfe][copy], 6) for nfe in NFE] for copy in copies] for name, by in distances.items()},
        "path_error": [[round(path_error(ends[nfe][copy], exact_ends), 6) for nfe in NFE] for copy in copies],
        **result["cost"],
    }


def run(dataset="spiral", seeds=(0, 1, 2), budget=BUDGET, output="outputs/demo", workers=2, quiet=False):
    """The whole demo: train, sample, measure, draw. Writes `any_step.json` and `any_step.png`, whole or not at all.

    With them go the trained networks, `METHOD.safetensors`, which `load_student` opens.

    workers: processes; each trains one method at a time, on one core. Returns the report, the JSON.
    """
    mixture = plane.load(dataset)
    check(seeds, budget)
    with staging_folder(output) as folder:
        arguments = (dataset, tuple(seeds), budget, {}, quiet)
        jobs = {method: (run_method, (method, *arguments)) for method in reversed(METHODS)}  # the longest first
        results = run_jobs(jobs | {"exact": (exact_flow, (dataset,))}, workers)
        exact_ends, exact_paths = results["exact"]
        reference, other = references(dataset)
        fresh = [mixture.sample(DRAWS * POINTS, generator(1, draw)) for draw in range(8)]
        fresh_w2 = [[sliced_w2(each[:rows], reference) for each in fresh] for rows in (POINTS, DRAWS * POINTS)]
        report = {
            "dataset": dataset,
            "seeds": list(seeds),
            "measure": {
                "points": POINTS,
                "directions": 128,
                "noise": "scrambled Sobol",
                "reference": "stratified",
                "pooled_draws": DRAWS,
            },
            "budget": asdict(budget),
            "reference_floor": {"sliced_w2": round(sliced_w2(reference, other), 6)},
            "fresh_noise": {
                name: round(sum(each) / len(each), 6)
                for name, each in zip(("sliced_w2", "sliced_w2_pooled"), fresh_w2, strict=True)
            },
            "exact_flow": {"sliced_w2": round(sliced_w2(exact_ends, reference), 6)},
            "methods": {method: in_report(results[method], seeds, exact_ends) for method in METHODS},
        }
        from minianyflow.plane.race_figure import any_step_figure
        from minianyflow.support.figures import save_figure

        paths = {method: results[method]["sampled"][2] for method in METHODS}
        save_figure(any_step_figure(report, paths, exact_paths), folder / "any_step.png")
        (folder / "any_step.json").write_text(json.dumps(report, indent=1) + "\n")
        made = {"dataset": dataset, "budget": json.dumps(report["budget"]), "seeds": json.dumps(report["seeds"])}
        for method in METHODS[1:]:
            save_file(results[method]["weights"], folder / f"{method}.safetensors", made)
    return report


def check(seeds, budget):
    """Raise InputError for seeds or a budget that train nothing."""
    if not seeds or budget.steps < 1 or budget.rows < 1:
        raise InputError(f"{len(seeds)} seeds, {budget.steps} steps, {budget.rows} rows; expected at least one of each")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {list(seeds)}; expected different ones, each trains its own copy")


def table(report, figure="sliced_w2"):
    """One figure of a report as text: a row a method, a column a step count; mean over seeds, times 1000."""
    width = max(26, 10 + max(map(len, report["methods"])))
    rows = [f"{figure} x 1000".ljust(width) + "".join(f"{nfe:>8}" for nfe in NFE)]
    for name, method in report["methods"].items():
        for label, key in ((name, figure), (f"{name}, pooled", f"{figure}_pooled")):
            columns = zip(*method.get(key, []), strict=True)
            figures = "".join(f"{1000 * sum(each) / len(each):>8.1f}" for each in columns)
            rows += [label.ljust(width) + figures] if figures else []
    return "\n".join(rows)
