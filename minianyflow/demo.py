"""The claim in one run: flow maps and consistency maps race from the same noise against the exact answer.

Every student has the same network, data, teacher (the exact velocity) and number of steps; three seeds train as one.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from minianyflow.consistency import ConsistencyLoss
from minianyflow.errors import InputError, choose
from minianyflow.measures import path_error, sliced_w2, sobol_noise
from minianyflow.networks import MLP, EvaluationCounter
from minianyflow.objectives import FlowMapLoss
from minianyflow.pairs import generator
from minianyflow.samplers import sample_consistency, sample_euler, sample_flow_map, sample_ode
from minianyflow.schedules import time_grid
from minianyflow.training import Role, batches, train
from toy_data import plane

NFE = (1, 2, 4, 8, 16, 32, 64, 128)
POINTS = 8192      # of the measure: fewer would measure the sampling noise
SHOWN = 1200       # of them that a picture shows

FLOW_MAPS = {
    "eulerian": {"eulerian": 1.0},
    "lagrangian": {"lagrangian": 1.0},
    "semigroup": {"semigroup": 1.0},
    "mixed": {"eulerian": 0.5, "semigroup": 0.5},
}
METHODS = ("euler", *FLOW_MAPS, "consistency")


def make_student(method, dataset, seeds):
    """The role of one method: network, loss, optimiser. Its loss is all that differs between methods."""
    mixture = plane.load(dataset)

    def velocity(z, t, copy=None):                                         # the exact teacher, the same for every copy
        return mixture.velocity(z, t)

    student = Role(EvaluationCounter(MLP(seeds=seeds)), lr=6e-3)
    if method == "consistency":
        student.loss = ConsistencyLoss(velocity, student.average)
    else:
        student.loss = FlowMapLoss(choose("method", method, FLOW_MAPS), velocity, adaptive=0.5)
    return student


def sample(method, network, dataset, z, steps, copy):
    """The trajectory (steps + 1, B, 2) of one method from noise `z` (B, 2) in `steps` evaluations."""
    if method == "euler":
        return sample_euler(plane.load(dataset).velocity, z, time_grid(steps))
    condition = {} if copy is None else {"copy": copy}
    if method == "consistency":
        return sample_consistency(network, z, time_grid(steps), generator(steps), **condition)
    return sample_flow_map(network, z, time_grid(steps), **condition)


def run_method(method, dataset, seeds, steps, rows=192, position=0, quiet=False):
    """Train one method (Euler has nothing to train) and sample it; runs in a process of its own, on one thread."""
    torch.set_num_threads(1)
    noise, count = sobol_noise(POINTS, (2,)), len(seeds)
    network, copy, cost = None, None, {"train_seconds": 0.0, "network_evaluations": 0}
    if method != "euler":
        student, start = make_student(method, dataset, seeds), time.perf_counter()
        pairs = {"diagonal": 1.0, "end": 0.0} if method == "consistency" else {}
        draw = batches(plane.load(dataset).sample, rows, seeds, **pairs)
        progress = {"desc": f"{method:>11}", "position": position, "leave": True, "disable": quiet or None}
        train({"student": student}, draw, steps, accelerator=Accelerator(cpu=True), progress=progress)
        network = student.average.module
        cost = {"train_seconds": round(time.perf_counter() - start, 1),
                "network_evaluations": student.network.rows + network.rows}
        copy = torch.arange(count).repeat_interleave(POINTS) if count > 1 else None
        noise = noise.repeat(count, 1)                                     # the same noises for every seed
    ends, paths = {}, {}
    for nfe in NFE:
        trajectory = sample(method, network, dataset, noise, nfe, copy)
        ends[nfe] = trajectory[-1].reshape(-1, POINTS, 2)                  # (seeds, POINTS, 2)
        paths[nfe] = trajectory[:, :SHOWN].numpy()
    return {"ends": ends, "paths": paths, "cost": cost}


def exact_flow(dataset):
    """Where the exact flow carries the measure's noises, (POINTS, 2), and its paths for a picture (33, SHOWN, 2)."""
    torch.set_num_threads(1)
    mixture, z = plane.load(dataset), sobol_noise(POINTS, (2,))
    ends = mixture.flow(z, torch.ones(POINTS), torch.zeros(POINTS))
    paths = sample_ode(mixture.velocity, z[:SHOWN], time_grid(32))
    return ends, paths.numpy()


def references(dataset):
    """Two independent stratified samples of the data; how far apart they are is the floor of the measure."""
    source = generator(0)
    return [plane.load(dataset).sample_stratified(POINTS, source) for _ in range(2)]


def measure(dataset, ends, exact_ends):
    """The measures of one method, {"nfe", "sliced_w2", "path_error"}, the last two a list a seed."""
    torch.set_num_threads(1)
    reference = references(dataset)[0]
    seeds = range(len(ends[NFE[0]]))
    return {
        "nfe": list(NFE),
        "sliced_w2": [[round(sliced_w2(ends[nfe][seed], reference), 6) for nfe in NFE] for seed in seeds],
        "path_error": [[round(path_error(ends[nfe][seed], exact_ends), 6) for nfe in NFE] for seed in seeds],
    }


def _race(dataset, seeds, steps, workers, quiet):
    """Every method and the exact flow, in `workers` processes; {method: results with measures}, (ends, paths)."""
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=tqdm.set_lock, initargs=(context.RLock(),)) as pool:
        try:
            exact = pool.submit(exact_flow, dataset)
            trained = {
                method: pool.submit(run_method, method, dataset, seeds, steps, position=position, quiet=quiet)
                for position, method in enumerate(METHODS)
            }
            results = {method: job.result() for method, job in trained.items()}
            ends = exact.result()[0]
            measured = {method: pool.submit(measure, dataset, results[method]["ends"], ends) for method in METHODS}
            for method, job in measured.items():
                results[method]["measures"] = job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(pool._processes.values()):
                process.terminate()
            raise
    return results, exact.result()


@contextlib.contextmanager
def staged(output):
    """A folder to write into that takes the place of `output`'s files only when everything went well."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output))
    except OSError as problem:
        why = f"cannot write to {output} ({problem.strerror})"
        raise InputError(f"{why}; name a folder you may write to with --output") from None
    try:
        yield folder
        for file in folder.iterdir():
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(dataset="spiral", seeds=(0, 1, 2), steps=12000, output="outputs/demo", workers=None, quiet=False):
    """The whole demo: train, sample, measure, draw. Writes `any_step.json` and `any_step.png` whole, or nothing.

    workers: processes, one method each, two by default where there are two cores. Returns the report, the JSON.
    """
    plane.load(dataset)
    if not seeds or steps < 1:
        raise InputError(f"seeds {list(seeds)} and {steps} training steps; expected at least one of each")
    with staged(Path(output)) as folder:
        results, exact = _race(dataset, tuple(seeds), steps, workers or min(2, os.cpu_count() or 1), quiet)
        reference, other = references(dataset)
        report = {
            "dataset": dataset,
            "seeds": list(seeds),
            "measure": {"points": POINTS, "directions": 128, "noise": "scrambled Sobol", "reference": "stratified"},
            "training": {"steps": steps},
            "reference_floor": {"sliced_w2": round(sliced_w2(reference, other), 6)},
            "exact_flow": {"sliced_w2": round(sliced_w2(exact[0], reference), 6)},
            "methods": {method: results[method]["measures"] | results[method]["cost"] for method in METHODS},
        }
        (folder / "any_step.json").write_text(json.dumps(report, indent=1) + "\n")
        from minianyflow.pictures import any_step_figure, save_figure

        paths = {method: results[method]["paths"] for method in METHODS}
        save_figure(any_step_figure(report, paths, exact[1]), folder / "any_step.png")
    return report


def table(report, figure="sliced_w2"):
    """One figure of a report as text: a row a method, a column a step count; mean over seeds, times 1000."""
    rows = [f"{figure} x 1000".ljust(18) + "".join(f"{nfe:>8}" for nfe in NFE)]
    for name, method in report["methods"].items():
        columns = zip(*method[figure], strict=True)
        rows.append(name.ljust(18) + "".join(f"{1000 * sum(each) / len(each):>8.1f}" for each in columns))
    return "\n".join(rows)
