"""Side by side with what one would pick instead: velocity models of `flow_matching` and of `torchcfm`.

All have the same network, optimiser, data and CPU seconds, and are measured on the same noise at equal evaluations.
The peers learn a velocity from data by their own losses, and are sampled by Euler and midpoint: flow_matching by its
ODESolver, torchcfm by torchdiffeq. Ours are flow maps that differ in the velocity that they learn from: the exact one;
or, from data alone as the peers: eps - x as it is or averaged over a larger batch, or a velocity learnt first, with or
without pairs by optimal transport.

`python -m benchmarks.peers` needs the extra `peers`: pip install 'minianyflow[peers]'. It takes about
(seconds + 40) x 8 / workers seconds per target: 13 minutes by default. The defaults are those of docs/peers.md.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torchdiffeq import odeint
from tqdm import tqdm

from minianyflow.batch import batches
from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.plane.race import BUDGET, PIECE, POINTS, Budget, exact_flow, references
from minianyflow.samplers import sample_flow_map
from minianyflow.support import cli
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.times import generator, time_grid
from minianyflow.training import Role, train
from toy_data import plane

NFE = (1, 2, 4, 8, 16, 32, 64)
SOLVERS = {"euler": 1, "midpoint": 2}  # evaluations per step
PEERS = {  # {peer: the packages it needs}
    "flow_matching": ("flow_matching",),
    "torchcfm": ("torchcfm",),
    "torchcfm, OT": ("torchcfm", "ot"),
}
OURS = ("exact velocity", "data velocity", "averaged velocity", "learnt velocity", "OT velocity")
LEARNT = {"learnt velocity": 0.5, "OT velocity": 0.65}  # the share of the seconds in which it is learnt
JUMPS = {"diagonal": 0.25, "end": 0.375}  # the shares of the rows where a map learns by steps of its teacher
POOL = 2048  # points of data that an averaged velocity is the mean over
STEPS = 10**9  # never reached: the clock ends a training


class TimeUp(Exception):
    """The seconds of a training are over."""


@dataclass
class TimedRole(Role):
    """A role whose learning rate falls to zero, by a cosine, over `seconds` of CPU time, not over steps."""

    seconds: float = 30.0
    start: float | None = None
    steps: int = 0

    def elapsed(self) -> float:
        """CPU seconds of this process since the first step."""
        self.start = time.process_time() if self.start is None else self.start
        return time.process_time() - self.start

    def schedule(self, step, steps, rate=None):
        """The learning rate of this step."""
        share = min(1.0, self.elapsed() / self.seconds)
        return super().schedule(step, steps, rate) * 0.5 * (1 + np.cos(np.pi * share))


def train_for(role: TimedRole, draw: Callable, progress: dict) -> nn.Module:
    """Train one role for its seconds; returns its averaged network."""
    with tqdm(total=round(role.seconds, 1), unit="s", bar_format="{l_bar}{bar}| {elapsed}", **progress) as bar:

        def on_step(step):
            role.steps, elapsed = step + 1, role.elapsed()
            bar.update(min(elapsed, bar.total) - bar.n)
            if elapsed >= role.seconds:
                raise TimeUp

        try:
            train({"student": role}, draw, STEPS, progress=False, on_step=on_step)
        except TimeUp:
            return role.average.module


class Forwards(nn.Module):
    """A network u(z, t, r) as a velocity in the peers' direction of time: 0 is noise, 1 is data."""

    def __init__(self, network, **condition):
        super().__init__()
        self.network, self.condition = network, condition

    def forward(self, x, t):
        """x (B, *shape); t () of a solver or (B,) of a loss; returns the shape of x."""
        t = (1 - t).to(x).expand(len(x))
        return -self.network(x, t, t, **self.condition)


def conditional_flow(peer: str) -> Callable:
    """The peer's own `(noise, data, times) -> (states, targets)`."""
    if choose("peer", peer, PEERS)[0] == "flow_matching":
        from flow_matching.path import CondOTProbPath

        def flow(noise, x, t):
            point = CondOTProbPath().sample(x_0=noise, x_1=x, t=t)
            return point.x_t, point.dx_t

        return flow
    from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

    kind = ExactOptimalTransportConditionalFlowMatcher if "ot" in PEERS[peer] else ConditionalFlowMatcher
    matcher = kind(sigma=0.0)
    return lambda noise, x, t: matcher.sample_location_and_conditional_flow(noise, x, t=t)[1:]


def velocity_loss(flow: Callable, copies: int) -> Callable:
    """The loss of a velocity model, for `train`: mean squares against the targets of `flow`, copy by copy."""

    def loss(network, batch):
        state, target = torch.empty_like(batch["x"]), torch.empty_like(batch["x"])
        for copy in range(copies):  # optimal transport pairs noise and data of one copy
            rows = slice(copy, None, copies)
            state[rows], target[rows] = flow(batch["eps"][rows], batch["x"][rows], 1 - batch["t"][rows])
        out = Forwards(network, **batch.get("condition", {}))(state, 1 - batch["t"])
        error = (out - target).square().flatten(1).mean(1)
        return error, {"velocity": error.detach().mean()}

    return loss


def solver_of(peer: str) -> Callable:
    """`solve(velocity, noise, times, method)`: the end points of that peer's solver; times rise from 0 to 1."""
    if peer == "flow_matching":
        from flow_matching.solver import ODESolver

        return lambda velocity, noise, times, method: ODESolver(velocity).sample(
            noise, step_size=None, method=method, time_grid=times
        )
    return torch.no_grad()(
        lambda velocity, noise, times, method: odeint(lambda t, x: velocity(x, t), noise, times, method=method)[-1]
    )


def velocity_sampler(network: nn.Module, solve: Callable, method: str) -> Callable:
    """`sample(z, nfe, **condition)` of a velocity model: its end points after `nfe` evaluations."""

    def sample(z, nfe, **condition):
        times = torch.linspace(0, 1, nfe // SOLVERS[method] + 1)
        return solve(Forwards(network, **condition), z, times, method)

    return sample


def measure(sample: Callable, dataset: str, copies: int = 1, nfe=NFE, progress=None) -> list[list[float]]:
    """Sliced W2 of `sample(z, nfe, **condition)` for the demo's noise: per copy, a list over `nfe`."""
    condition = {"copy": torch.arange(copies).repeat(PIECE)} if copies > 1 else {}
    reference, _ = references(dataset)
    by_steps = []
    for steps in tqdm(nfe, unit="sampler", **progress or {"disable": True}):
        pieces = sobol_noise(POINTS, (2,)).split(PIECE)
        ends = torch.cat([sample(z.repeat_interleave(copies, 0), steps, **condition) for z in pieces])
        by_steps.append([sliced_w2(end, reference) for end in rearrange(ends, "(n copy) xy -> copy n xy", copy=copies)])
    return [list(distances) for distances in zip(*by_steps, strict=True)]


def train_peer(peer, dataset, seeds, budget, seconds, progress) -> list[TimedRole]:
    """The trained role of a velocity model; sample from its `.average.module`."""
    np.random.seed(seeds[0])  # torchcfm draws its pairs from numpy's global state
    role = make_role(seeds, budget, seconds, velocity_loss(conditional_flow(peer), len(seeds)))
    train_for(role, batches(plane.load(dataset).sample, budget.rows, seeds, diagonal=1.0, end=0.0), progress)
    return [role]


def paired(draw: Callable, copies: int, times: int = 1) -> Callable:
    """`draw` with the noise of each copy's rows paired with its data by optimal transport, each pair `times` times."""

    @lru_cache(maxsize=1)
    def pairs(step):
        batch = draw(step)
        eps = torch.empty_like(batch["eps"])
        for copy in range(copies):
            rows = slice(copy, None, copies)
            cost = torch.cdist(batch["x"][rows], batch["eps"][rows]).square()
            eps[rows] = batch["eps"][rows][torch.from_numpy(linear_sum_assignment(cost)[1])]
        return {"x": batch["x"], "eps": eps}

    return lambda step: draw(step) | pairs(step - step % times)


class AveragedVelocity:
    """E[eps - x | z_t = z] over a pool of data, the rows of the batch among it: less noise than one row's eps - x.

    This is the target of the Stable Target Field (Xu et al. 2023). A softmax weights the points, as in attention.
    """

    def __init__(self, draw: Callable, sample: Callable, seeds, points: int = POOL):
        self.batch, self.sample, self.seeds, self.points = draw, sample, seeds, points

    def draw(self, step: int) -> dict:
        """The batch of a step; its pool, (copies, points, 2), is that of the velocities until the next."""
        batch = self.batch(step)
        own = rearrange(batch["x"], "(row copy) xy -> copy row xy", copy=len(self.seeds))
        others = [self.sample(self.points - own.shape[1], generator(seed, step, 1)) for seed in self.seeds]
        self.pool = torch.cat([own, torch.stack(others)], 1)
        return batch

    def __call__(self, z, t, copy=None):
        """z (B, 2), the copies in turn; t (B,), below .005 as if it were .005, where logits would lose their digits."""
        t = t.clamp(min=5e-3)[:, None]
        keys = torch.cat([self.pool, self.pool.square().sum(2, keepdim=True)], 2)[:, None]
        parts = torch.cat([(1 - t) * z, -((1 - t) ** 2) / 2], 1) / t**2  # times keys: log N(z; (1-t) x, t^2) + const
        queries = rearrange(parts, "(row copy) xyw -> copy 1 row xyw", copy=len(self.seeds))
        mean = scaled_dot_product_attention(queries, keys, keys, scale=1.0)  # E[x | z], and a third column, unused
        return (z - rearrange(mean, "copy 1 row xyw -> (row copy) xyw")[:, :2]) / t


def train_ours(name, dataset, seeds, budget, seconds, progress) -> list[TimedRole]:
    """The trained roles of a flow map: first its teacher, if it learns one, last the map."""
    choose("velocity", name, dict.fromkeys(OURS))
    mixture, roles, learned, share = plane.load(dataset), [], None, LEARNT.get(name, 0.0)
    rows = mixture.sample, budget.rows, seeds
    draw = batches(*rows, **JUMPS)
    if name == "data velocity":  # too noisy for a teacher's steps
        draw, loss = batches(*rows), FlowMapLoss(FLOW_MAPS["mixed"])
    else:
        if name == "exact velocity":
            velocity = lambda z, t, copy=None: mixture.velocity(z, t)  # noqa: E731
        elif name == "averaged velocity":
            velocity = AveragedVelocity(draw, mixture.sample, seeds)
            draw = velocity.draw
        else:
            pair = paired if name == "OT velocity" else lambda draw, *_: draw
            roles = [make_role(seeds, budget, share * seconds, FlowMapLoss({}, weight=torch.ones_like))]
            learned = train_for(roles[0], pair(batches(*rows, diagonal=1.0, end=0.0), len(seeds)), progress)
            velocity = lambda z, t, **condition: learned(z, t, t, **condition)  # noqa: E731
            draw = pair(draw, len(seeds), 16)
        loss = FlowMapLoss({"teacher_step": 1.0}, velocity, adaptive=0.5)
    roles.append(make_role(seeds, budget, (1 - share) * seconds, loss, learned))
    train_for(roles[-1], draw, progress)
    return roles


def make_role(seeds, budget: Budget, seconds: float, loss: Callable, start: nn.Module | None = None) -> TimedRole:
    """One network for all seeds, with the weights of `start` if it is given."""
    network = EvaluationCounter(MLP(width=budget.width, depth=budget.depth, seeds=seeds))
    if start is not None:
        network.load_state_dict(start.state_dict())
    return TimedRole(network, loss, lr=budget.lr, cosine=False, seconds=seconds)


def run_method(name, dataset, seeds, budget, seconds, quiet, position=0) -> dict[str, dict]:
    """Train one method, sample and measure it, on one thread: its part of the report, {label: ...}."""
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
        solve = solver_of(name)
        samplers = {f"{name}, {method}": (velocity_sampler(network, solve, method), n) for method, n in SOLVERS.items()}
    else:
        samplers = {f"flow map, {name}": (lambda z, nfe, **c: sample_flow_map(network, z, time_grid(nfe), **c)[-1], 1)}
    report = {}
    for label, (sample, evaluations) in samplers.items():
        nfe = [count for count in NFE if count % evaluations == 0]
        distances = measure(sample, dataset, len(seeds), nfe, progress | {"desc": f"{dataset}, sampling {label}"})
        rounded = [[round(distance, 6) for distance in copy] for copy in distances]
        report[label] = {"nfe": nfe, "sliced_w2": rounded, **cost}
    return report


def check_peers(peers: tuple[str, ...]) -> None:
    """Raise InputError for a peer that is unknown or not installed."""
    for peer in peers:
        for package in choose("peer", peer, PEERS):
            if importlib.util.find_spec(package) is None:
                raise InputError(
                    f"{package} is not installed here; pip install 'minianyflow[peers]', or leave {peer!r} out"
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
                jobs[dataset, name] = (run_method, arguments)
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


def target_report(dataset: str, results: dict) -> dict:
    """The part of the report for one target: the floors, and the methods by label."""
    reference, other = references(dataset)
    parts = [result for (target, name), result in results.items() if target == dataset and name != "exact"]
    return {
        "exact_flow": {"sliced_w2": round(sliced_w2(results[dataset, "exact"][0], reference), 6)},
        "reference_floor": {"sliced_w2": round(sliced_w2(reference, other), 6)},
        "methods": {label: method for part in parts for label, method in part.items()},
    }


def by_nfe(method: dict) -> dict[int, tuple[float, ...]]:
    """{nfe: the distances of all seeds}."""
    return dict(zip(method["nfe"], zip(*method["sliced_w2"], strict=True), strict=True))


def ratios(target: dict, ours: str, nfe: int = 4) -> dict[str, float]:
    """How many times closer `ours` is than each peer at equal evaluations: {label: ratio of means over the seeds}."""
    methods = {label: by_nfe(method) for label, method in target["methods"].items()}
    mine = methods[f"flow map, {ours}"][nfe]
    peers = {
        label: method[nfe] for label, method in methods.items() if not label.startswith("flow map") and nfe in method
    }
    return {label: round(sum(theirs) / len(theirs) / (sum(mine) / len(mine)), 1) for label, theirs in peers.items()}


def markdown(head: str, columns, rows) -> str:
    """A table in Markdown."""
    lines = [f"| {head} | {' | '.join(map(str, columns))} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def table(target: dict) -> str:
    """A target as Markdown: a row per method, a column per number of evaluations; mean over the seeds (range)."""
    rows = []
    for label, method in target["methods"].items():
        seeds = by_nfe(method)
        cells = [(1000 * np.mean(seeds[nfe]), 1000 * np.ptp(seeds[nfe])) if nfe in seeds else None for nfe in NFE]
        texts = ["{:.1f} ({:.1f})".format(*cell) if cell else "-" for cell in cells]
        rows.append([label, *texts, method["steps"]])
    return markdown("sliced W2 x 1000, mean (range)", [*NFE, "steps"], rows)


def ratio_table(target: dict, nfe: int = 4) -> str:
    """How many times closer each of ours is than each peer at `nfe` evaluations, as Markdown."""
    by_ours = {ours: ratios(target, ours, nfe) for ours in OURS if f"flow map, {ours}" in target["methods"]}
    rows = [[peer, *(of_peers[peer] for of_peers in by_ours.values())] for peer in by_ours[OURS[0]]]
    return markdown(f"times closer at {nfe} evaluations than", by_ours, rows)


def main(argv: list[str] | None = None) -> int:
    """Compare and print the tables; returns the exit status."""
    parser = cli.Parser("python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--target", nargs="+", default=["spiral"], metavar="NAME", help="spiral, ring8, checkerboard (default: spiral)")
    add("--seconds", type=float, default=150.0, help="CPU seconds of training per method (default: 150)")
    add("--width", type=int, default=128, help="of every network (default: 128)")
    add(
        "--seeds",
        default="100,101,102,103,104",
        type=cli.whole_numbers,
        help="trained as one network (default: 100 to 104)",
    )
    names = "flow_matching, torchcfm, 'torchcfm, OT' (default: all; nothing after --peers: ours alone)"
    add("--peers", nargs="*", default=list(PEERS), metavar="PEER", help=names)
    add("--output", default="outputs/compare", help="folder (default: outputs/compare)")
    add("--workers", type=int, default=2, help="processes; each trains one method on one core (default: 2)")
    add("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    options = (arguments.seconds, tuple(arguments.peers), arguments.output, arguments.workers, arguments.quiet)
    budget = replace(BUDGET, width=arguments.width)
    report = run(tuple(arguments.target), arguments.seeds, *options, budget)
    for name, target in report["targets"].items():
        print(f"\n{name}\n\n{table(target)}\n\n{ratio_table(target)}")
    print(f"\nwritten: {arguments.output}/peers.json, {arguments.output}/peers.png")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
