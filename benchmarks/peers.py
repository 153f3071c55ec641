"""Side by side with what one would pick instead: velocity models of `flow_matching` and of `torchcfm`.

All have the same network, optimiser, data and CPU seconds, and are measured from the same noises at equal evaluations.
The peers learn a velocity from data by their own losses, and are sampled by Euler and midpoint: flow_matching by its
ODESolver, torchcfm by torchdiffeq. Ours are mixed flow maps, told apart by the velocity that they learn from: the exact
one; the data's, which is all that the peers have; or one that they learnt from the data in the first half of the time.
"""

import importlib.util
import json
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from torchdiffeq import odeint
from tqdm import tqdm

from minianyflow.batch import batches
from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.plane.race import PIECE, POINTS, Budget, exact_flow, references
from minianyflow.samplers import sample_flow_map
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.times import time_grid
from minianyflow.training import Role, train
from toy_data import plane

NFE = (1, 2, 4, 8, 16, 32, 64)
SOLVERS = {"euler": 1, "midpoint": 2}  # evaluations a step
PEERS = {  # each with the packages it takes
    "flow_matching": ("flow_matching",),
    "torchcfm": ("torchcfm",),
    "torchcfm, OT": ("torchcfm", "ot"),
}
OURS = ("exact velocity", "data velocity", "learnt velocity")
DEADLINE = 10**9  # steps: it is the clock that ends a training


class Over(Exception):
    """The seconds of a training are up."""


@dataclass
class TimedRole(Role):
    """A role whose learning rate comes down to zero over `seconds` of CPU time, whatever the number of steps."""

    seconds: float = 30.0
    start: float | None = None
    steps: int = 0

    def elapsed(self):
        """CPU seconds of this process since the first step."""
        self.start = time.process_time() if self.start is None else self.start
        return time.process_time() - self.start

    def schedule(self, step, steps):
        """The learning rate of this step."""
        share = min(1.0, self.elapsed() / self.seconds)
        return super().schedule(step, steps) * 0.5 * (1 + np.cos(np.pi * share))


def train_for(role, draw, progress):
    """Train one role until its seconds are up; returns its averaged network."""
    with tqdm(total=round(role.seconds, 1), unit="s", bar_format="{l_bar}{bar}| {elapsed}", **progress) as bar:

        def on_step(step):
            role.steps, elapsed = step + 1, role.elapsed()
            bar.update(min(elapsed, bar.total) - bar.n)
            if elapsed >= role.seconds:
                raise Over

        try:
            train({"student": role}, draw, DEADLINE, progress=False, on_step=on_step)
        except Over:
            return role.average.module


class Forwards(nn.Module):
    """A network u(z, t, r) as a velocity the way the peers have time: 0 is noise, 1 is data."""

    def __init__(self, network, **condition):
        super().__init__()
        self.network, self.condition = network, condition

    def forward(self, x, t):
        """x (B, *shape); t () or (B,), as solvers and losses have it; returns the shape of x."""
        t = (1 - t).to(x).expand(len(x))
        return -self.network(x, t, t, **self.condition)


def conditional_flow(peer):
    """`(noise, data, times) -> (states, targets)` of a peer, its own."""
    if choose("peer", peer, PEERS)[0] == "flow_matching":
        from flow_matching.path import CondOTProbPath

        def flow(noise, x, t):
            drawn = CondOTProbPath().sample(x_0=noise, x_1=x, t=t)
            return drawn.x_t, drawn.dx_t

        return flow
    from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

    matcher = (ExactOptimalTransportConditionalFlowMatcher if "ot" in PEERS[peer] else ConditionalFlowMatcher)(
        sigma=0.0
    )
    return lambda noise, x, t: matcher.sample_location_and_conditional_flow(noise, x, t=t)[1:]


def velocity_loss(flow, copies):
    """The loss of a velocity model, for `train`: mean squares against what `flow` says, copy by copy."""

    def loss(network, batch):
        state, target = torch.empty_like(batch["x"]), torch.empty_like(batch["x"])
        for copy in range(copies):  # a plan pairs noise and data of one copy
            rows = slice(copy, None, copies)
            state[rows], target[rows] = flow(batch["eps"][rows], batch["x"][rows], 1 - batch["t"][rows])
        out = Forwards(network, **batch.get("condition", {}))(state, 1 - batch["t"])
        error = (out - target).square().flatten(1).mean(1)
        return error, {"velocity": error.detach().mean()}

    return loss


def solver_of(peer):
    """`solve(velocity, noise, times, method)`: where that peer's solver ends; times rise from 0 to 1."""
    if peer == "flow_matching":
        from flow_matching.solver import ODESolver

        return lambda velocity, noise, times, method: ODESolver(velocity).sample(
            noise, step_size=None, method=method, time_grid=times
        )
    return torch.no_grad()(
        lambda velocity, noise, times, method: odeint(lambda t, x: velocity(x, t), noise, times, method=method)[-1]
    )


def velocity_sampler(network, solve, method):
    """`sample(z, nfe, **condition)` of a velocity model: its ends, in `nfe` evaluations."""

    def sample(z, nfe, **condition):
        times = torch.linspace(0, 1, nfe // SOLVERS[method] + 1)
        return solve(Forwards(network, **condition), z, times, method)

    return sample


def measure(sample, dataset, copies=1, nfe=NFE, progress=None):
    """Sliced W2 of what `sample(z, nfe, **condition)` makes of the demo's noises: over `nfe`, for each copy."""
    condition = {"copy": torch.arange(copies).repeat(PIECE)} if copies > 1 else {}
    reference, _ = references(dataset)
    by_steps = []
    for steps in tqdm(nfe, unit="sampler", **progress or {"disable": True}):
        pieces = sobol_noise(POINTS, (2,)).split(PIECE)
        ends = torch.cat([sample(z.repeat_interleave(copies, 0), steps, **condition) for z in pieces])
        by_steps.append([sliced_w2(each, reference) for each in ends.reshape(-1, copies, 2).transpose(0, 1)])
    return [list(each) for each in zip(*by_steps, strict=True)]


def train_peer(peer, dataset, seeds, budget, seconds, progress):
    """The role of a velocity model, trained; `.average.module` is what one samples from."""
    np.random.seed(seeds[0])  # torchcfm draws its plans from numpy's own state
    role = make_role(seeds, budget, seconds, velocity_loss(conditional_flow(peer), len(seeds)))
    train_for(role, batches(plane.load(dataset).sample, budget.rows, seeds, diagonal=1.0, end=0.0), progress)
    return [role]


def train_ours(velocity, dataset, seeds, budget, seconds, progress):
    """The roles of a mixed flow map, the last one it; before it its teacher, if it has one of its own."""
    mixture, mixed = plane.load(dataset), FLOW_MAPS["mixed"]
    if choose("velocity", velocity, dict.fromkeys(OURS, velocity)) == "data velocity":
        roles = [make_role(seeds, budget, seconds, FlowMapLoss(mixed))]
    elif velocity == "exact velocity":
        loss = FlowMapLoss(mixed, lambda z, t, copy=None: mixture.velocity(z, t), adaptive=0.5)
        roles = [make_role(seeds, budget, seconds, loss)]
    else:
        teacher = make_role(seeds, budget, seconds / 2, FlowMapLoss({}, weight=torch.ones_like))
        taught = train_for(teacher, batches(mixture.sample, budget.rows, seeds, diagonal=1.0, end=0.0), progress)
        loss = FlowMapLoss(mixed, lambda z, t, **condition: taught(z, t, t, **condition), adaptive=0.5)
        roles = [teacher, make_role(seeds, budget, seconds / 2, loss, taught)]
    train_for(roles[-1], batches(mixture.sample, budget.rows, seeds), progress)
    return roles


def make_role(seeds, budget, seconds, loss, start=None):
    """One network for all seeds, from the weights of `start` if there is one."""
    network = EvaluationCounter(MLP(width=budget.width, depth=budget.depth, seeds=seeds))
    if start is not None:
        network.load_state_dict(start.state_dict())
    return TimedRole(network, loss, lr=budget.lr, cosine=False, seconds=seconds)


def run_contestant(name, dataset, seeds, budget, seconds, quiet, position=0):
    """Train one contestant, sample and measure it, on one thread: its part of the report, {label: ...}."""
    torch.set_num_threads(1)
    progress = {"desc": f"{dataset}, {name}", "position": position, "disable": quiet or None, "leave": False}
    trains = train_peer if name in PEERS else train_ours
    roles = trains(name, dataset, seeds, budget, seconds, progress)
    network = roles[-1].average.module
    cost = {
        "train_seconds": round(sum(role.seconds for role in roles), 1),
        "steps": sum(role.steps for role in roles),
        "network_evaluations": sum(role.network.rows + role.average.module.rows for role in roles),
    }
    if name in PEERS:
        samplers = {
            f"{name}, {method}": (velocity_sampler(network, solver_of(name), method), each)
            for method, each in SOLVERS.items()
        }
    else:
        samplers = {f"flow map, {name}": (flow_map_sampler(network), 1)}
    report = {}
    for label, (sample, evaluations) in samplers.items():
        nfe = [steps for steps in NFE if steps % evaluations == 0]
        distances = measure(sample, dataset, len(seeds), nfe, progress | {"desc": f"{dataset}, sampling {label}"})
        report[label] = {"nfe": nfe, "sliced_w2": [[round(each, 6) for each in copy] for copy in distances], **cost}
    return report


def flow_map_sampler(network):
    """`sample(z, nfe, **condition)` of a flow map: one jump an evaluation."""
    return lambda z, nfe, **condition: sample_flow_map(network, z, time_grid(nfe), **condition)[-1]


def check_peers(peers):
    """Raise InputError for a peer that is unknown or not installed."""
    for peer in peers:
        for package in choose("peer", peer, PEERS):
            if importlib.util.find_spec(package) is None:
                raise InputError(
                    f"{package} is not installed here; pip install 'minianyflow[peers]', or leave {peer!r} out: --peers"
                )


def run(
    datasets=("spiral",),
    seeds=(0, 1, 2),
    seconds=20.0,
    peers=tuple(PEERS),
    output="outputs/compare",
    workers=2,
    quiet=False,
    budget=Budget(),  # noqa: B008, frozen
):
    """The whole comparison; writes `peers.json` and `peers.png`, whole or not at all. Returns the report, the JSON."""
    check_peers(peers)
    for dataset in datasets:
        plane.load(dataset)
    if budget.width < 1:
        raise InputError(f"width {budget.width}; expected at least 1")
    if not (seeds and datasets and seconds > 0) or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {list(seeds)}, {seconds} seconds; expected different seeds, and seconds above 0")
    with staging_folder(output) as folder:
        jobs = {(dataset, "exact"): (exact_flow, (dataset,)) for dataset in datasets}
        for dataset in datasets:
            for name in (*OURS, *peers):
                arguments = (name, dataset, tuple(seeds), budget, seconds, quiet)
                jobs[dataset, name] = (run_contestant, arguments)
        results = run_jobs(jobs, workers)
        report = {
            "seeds": list(seeds),
            "budget": {"cpu_seconds": seconds}
            | {key: value for key, value in asdict(budget).items() if key != "steps"},
            "targets": {dataset: target_report(dataset, results) for dataset in datasets},
        }
        from benchmarks.peers_figure import peers_figure
        from minianyflow.support.figures import save_figure

        save_figure(peers_figure(report), folder / "peers.png")
        (folder / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def target_report(dataset, results):
    """One target as it stands in the JSON: floors, methods, and how many times closer ours are."""
    reference, other = references(dataset)
    parts = [result for (target, name), result in results.items() if target == dataset and name != "exact"]
    methods = {label: method for part in parts for label, method in part.items()}
    return {
        "exact_flow": {"sliced_w2": round(sliced_w2(results[dataset, "exact"][0], reference), 6)},
        "reference_floor": {"sliced_w2": round(sliced_w2(reference, other), 6)},
        "methods": methods,
    }


def means(method):
    """{nfe: mean over the seeds}."""
    return {
        nfe: sum(each) / len(each)
        for nfe, each in zip(method["nfe"], zip(*method["sliced_w2"], strict=True), strict=True)
    }


def ratios(target, ours, nfe=4):
    """How many times closer `ours` is than each peer at equal evaluations: {label: ratio of means over the seeds}."""
    mine = means(target["methods"][f"flow map, {ours}"])[nfe]
    return {
        label: round(means(method)[nfe] / mine, 1)
        for label, method in target["methods"].items()
        if not label.startswith("flow map") and nfe in method["nfe"]
    }


def table(target):
    """One target as Markdown: a row a method, a column for each number of evaluations; mean over the seeds (range)."""
    rows = [
        "| sliced W2 x 1000, mean (range) | " + " | ".join(map(str, NFE)) + " | steps |",
        "|---" * (len(NFE) + 2) + "|",
    ]
    for label, method in target["methods"].items():
        seeds = dict(zip(method["nfe"], zip(*method["sliced_w2"], strict=True), strict=True))
        cells = [
            f"{1000 * sum(each) / len(each):.1f} ({1000 * (max(each) - min(each)):.1f})" if each else "-"
            for each in (seeds.get(nfe) for nfe in NFE)
        ]
        rows.append(f"| {label} | {' | '.join(cells)} | {method['steps']} |")
    return "\n".join(rows)


def ratio_table(target, nfe=4):
    """How many times closer each of ours is than each peer at `nfe` evaluations, as Markdown."""
    by_ours = {ours: ratios(target, ours, nfe) for ours in OURS}
    rows = [f"| times closer at {nfe} evaluations than | " + " | ".join(OURS) + " |", "|---" * (len(OURS) + 1) + "|"]
    rows += [f"| {peer} | " + " | ".join(f"{by_ours[ours][peer]}" for ours in OURS) + " |" for peer in by_ours[OURS[0]]]
    return "\n".join(rows)
