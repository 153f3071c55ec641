"""AnyFlow's choices against ours, one at a time: on the plane (the spiral) and on small video.

Both arms of a pair have the same networks, data, noise, optimiser and number of steps. Three seeds: on the plane three
copies trained as one network, on video three trainings from the committed networks of toy_data/video. Beside them
Muon against AdamW, on small video and on tiny Wan.

`python -m benchmarks.published` takes about 25 CPU minutes, `--only NAME ...` less; it writes choices.json, of which
docs/wan/choices.json is a copy.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from minianyflow.batch import batches
from minianyflow.guidance import Guidance, guided_velocity
from minianyflow.measures import path_error, sliced_w2, sobol_noise
from minianyflow.mixtures import GaussianMixture
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.networks.teacher_forcing import (
    TeacherForced,
    add_whole_clips,
    cycle_context_lengths,
    single_chunk_batch,
)
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss, anyflow_weight
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, draw_on_policy
from minianyflow.plane.race import POINTS, references
from minianyflow.plane.students import STUDENTS, read_copy
from minianyflow.samplers import sample_euler, sample_flow_map, sample_ode
from minianyflow.support import cli
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import markdown_table, mean, rounded, write_report
from minianyflow.times import draw_pairs, generator, time_grid
from minianyflow.training import Role, train
from minianyflow.video import report as video
from minianyflow.video import stages
from minianyflow.wan import stages as wan_stages
from minianyflow.wan.config import load_config
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.folders import make_tiny_wan
from minianyflow.wan.run_networks import RunNetworks
from toy_data import plane

SEEDS = (0, 1, 2)
SCALE, RATE = 3.0, 1e-2  # of guidance, of learning, on the plane
PLANE_NFE, VIDEO_NFE, TEACHER_NFE = (1, 4, 16, 64), (1, 4, 8), (8, 32, 128)
PLANE_STEPS, POLICY_STEPS = 5000, 500
VIDEO_ROWS, WARMUP, CLIPS = 64, 10, 512
SPIRAL = plane.load("spiral")
HALVES = [GaussianMixture(half, 0.05) for half in SPIRAL.means.split(50)]  # of the spiral, each the law of one label


# The plane: an arm returns the measures of three copies, [[value per step count] per seed]


def flow_map(velocity: str, diagonal_time: str = "uniform") -> tuple:
    """A mixed flow map of the exact velocity, or of the data's."""
    exact = velocity == "exact"
    loss = FlowMapLoss(FLOW_MAPS["mixed"], exact_velocity if exact else None, adaptive=0.5 if exact else 0.0)
    network, count = trained(MLP(seeds=SEEDS), loss, batches(SPIRAL.sample, 128, SEEDS, diagonal_time=diagonal_time))
    return PLANE_NFE, on_plane(network, PLANE_NFE), count


def teacher(diagonal_time: str, weight: Callable) -> tuple:
    """The velocity learnt from data, followed by Euler's method."""
    draw = batches(SPIRAL.sample, 128, SEEDS, diagonal=1.0, end=0.0, diagonal_time=diagonal_time)
    network, count = trained(MLP(seeds=SEEDS), FlowMapLoss({}, weight=weight), draw)
    return TEACHER_NFE, on_plane(network, TEACHER_NFE, euler=True), count


def exact_velocity(z, t, copy=None):
    """The same for every copy."""
    return SPIRAL.velocity(z, t)


def trained(network: nn.Module, loss: Callable, draw: Callable, steps: int = PLANE_STEPS) -> tuple[nn.Module, int]:
    """The average of the network, and the evaluations that its training took."""
    role = Role(EvaluationCounter(network), loss, lr=RATE)
    train({"student": role}, draw, steps, progress=False)
    return role.average.module, role.network.rows + role.average.module.rows


def on_plane(network: nn.Module, nfes: tuple, euler: bool = False) -> list:
    """Sliced W2 of every copy at every step count."""
    reference, _ = references("spiral")
    by_nfe = [[sliced_w2(end, reference) for end in copies(network, nfe, euler)] for nfe in nfes]
    return [list(of_copy) for of_copy in zip(*by_nfe, strict=True)]


def copies(network: nn.Module, nfe: int, euler: bool = False, **condition: Tensor) -> Tensor:
    """Where all copies end from the same noise, (S, POINTS, 2). condition: (POINTS,) each, the same for all copies."""
    z = sobol_noise(POINTS, (2,)).repeat_interleave(len(SEEDS), 0)
    condition = {name: value.repeat_interleave(len(SEEDS)) for name, value in condition.items()}
    condition["copy"] = torch.arange(len(SEEDS)).repeat(POINTS)
    if euler:
        path = sample_euler(lambda z, t, **given: network(z, t, t, **given), z, time_grid(nfe), **condition)
    else:
        path = sample_flow_map(network, z, time_grid(nfe), **condition)
    return rearrange(path[-1], "(point copy) d -> copy point d", copy=len(SEEDS))


class Labelled(nn.Module):
    """u(z, t, r, label, copy): the label, 1 or -1 for half of the spiral, 0 for all, is the MLP's third number."""

    def __init__(self):
        super().__init__()
        self.network = MLP((3,), seeds=SEEDS)

    def forward(self, z, t, r, label, copy):
        """(B, 2); label (B,)."""
        return self.network(torch.cat([z, label[:, None]], 1), t, r, copy)[:, :2]


def labelled_velocity(z, t, label, copy=None):
    """The exact velocity of the half that `label` names, of the whole spiral for 0."""
    both = [SPIRAL.velocity(z, t), *(half.velocity(z, t) for half in HALVES)]
    return torch.stack(both)[torch.where(label == 0, 0, torch.where(label > 0, 1, 2)), torch.arange(len(z))]


def guidance(published: bool) -> tuple:
    """Eulerian flow maps of the exact velocity under guidance: distance of their ends from those of the guided ODE."""
    drawn = batches(SPIRAL.sample, 128, SEEDS, drop=0.1)

    def draw(step):
        batch = drawn(step)
        near = [torch.cdist(batch["x"], half.means).min(1).values for half in HALVES]
        label = torch.where(batch["dropped"], 0.0, (near[0] < near[1]) * 2.0 - 1)
        return batch | {"condition": batch["condition"] | {"label": label}}

    form = Guidance(SCALE, {"label": torch.zeros(1)}, published)
    network, count = trained(Labelled(), FlowMapLoss({"eulerian": 1.0}, labelled_velocity, form, adaptive=0.5), draw)
    label = (torch.arange(POINTS) % 2) * 2.0 - 1

    def guided(z, t):
        null = labelled_velocity(z, t, torch.zeros(len(z)))
        return guided_velocity(labelled_velocity(z, t, label), null, SCALE)

    target = sample_ode(guided, sobol_noise(POINTS, (2,)), torch.tensor([1.0, 0.0]))[-1]
    ends = zip(*(copies(network, nfe, label=label) for nfe in PLANE_NFE), strict=True)
    return PLANE_NFE, [[path_error(end, target) for end in of_copy] for of_copy in ends], count


def on_policy(fake_time: str) -> tuple:
    """The committed mixed flow maps, trained on their own rollouts; exact scores for the teacher's."""
    weights = {}
    for copy in range(len(SEEDS)):
        for name, value in read_copy(STUDENTS / "mixed.safetensors", copy)[0].items():
            weights.setdefault(name, []).append(value)
    student, fake = (EvaluationCounter(MLP(seeds=SEEDS)) for _ in range(2))
    for each in (student, fake):
        each.network.load_state_dict({name: torch.cat(value) for name, value in weights.items()})
    forward = FlowMapLoss(FLOW_MAPS["mixed"], exact_velocity, adaptive=0.5)
    slow = {"betas": (0.0, 0.999), "warmup": 50, "ema": 0.99}
    roles = {"student": Role(student, OnPolicyLoss(exact_velocity, fake, forward), lr=1e-3, **slow)}
    roles["fake"] = Role(fake, FakeScoreLoss(student), lr=5e-3, **slow)
    drawn = batches(SPIRAL.sample, 128, SEEDS)

    def draw(step):
        batch = drawn(step)
        return batch | draw_on_policy((2,), len(batch["x"]), generator(step, 1), fake_time=fake_time)

    train(roles, draw, POLICY_STEPS, progress=False)
    return PLANE_NFE, on_plane(roles["student"].average.module, PLANE_NFE), student.rows + fake.rows


# Small video: an arm returns (roles, draw) for one seed


def stage(kind: str, parent: str = "", **options) -> stages.Stage:
    """A stage of the committed run, but short."""
    options = {"rows": VIDEO_ROWS, "guidance": stages.GUIDANCE} | options
    return stages.Stage(kind, parent, **options)


def video_flow_map(earlier, seed, diagonal_time="uniform", lr=3e-3, muon=None):
    """The Eulerian stage, from the guided velocity of the teacher."""
    settings = stage("flow_map", "teacher", options=stages.EULERIAN)
    network, loss = EvaluationCounter(earlier.network("teacher")), earlier.forward(settings)
    role = Role(network, loss, lr=lr, muon=muon, ema=None, clip=1.0)
    return {"student": role}, earlier.draw(settings, seed, diagonal_time=diagonal_time)


def video_teacher(earlier, seed, diagonal_time, weight):
    """A teacher from random weights."""
    settings = stage("teacher", lr=6e-3)
    roles, _ = stages.build_teacher(settings, seed, earlier)
    roles["teacher"].loss = FlowMapLoss({}, weight=weight)
    pairs = stages.FLOW_MATCHING | {"drop": stages.DROPPED, "diagonal_time": diagonal_time}
    return roles, earlier.draw(settings, seed, **pairs)


def video_guidance(earlier, seed, published):
    """The Eulerian stage, guided by the student's own null branch."""
    null = TextEncoder()([""])
    settings = stage("flow_map", "teacher", options=stages.EULERIAN, guidance=1.0)
    roles, _ = stages.build_flow_map(settings, seed, earlier)
    roles["student"].loss.guidance = Guidance(stages.GUIDANCE, {"prompt": null}, published)
    drawn = earlier.draw(settings, seed, drop=stages.DROPPED)

    def draw(step):
        batch = drawn(step)
        return batch | {"dropped": (batch["condition"]["prompt"] == null).flatten(1).all(1)}

    return roles, draw


def video_on_policy(earlier, seed, null_prompts="everywhere", fake_time="uniform"):
    """On-policy training of the Eulerian student; a tenth of the rows without their prompt."""
    forward_weight = stages.STAGES["on_policy"].options
    settings = stage("on_policy", "eulerian", lr=1e-4, options=forward_weight, stream=3)
    roles, _ = stages.build_on_policy(settings, seed, earlier)
    drawn, null = earlier.draw(settings, seed), TextEncoder()([""])

    def draw(step):
        batch, source = drawn(step), generator(seed, 4, step)
        batch |= draw_on_policy(batch["x"].shape[1:], VIDEO_ROWS, source, fake_time=fake_time)
        dropped = torch.rand(VIDEO_ROWS, generator=source)[:, None, None] < stages.DROPPED
        kept = {"prompt": torch.where(dropped, null, batch["condition"]["prompt"])}
        rollout = {"rollout_condition": batch["condition"]} if null_prompts == "forward" else {}
        return batch | rollout | {"condition": kept}

    return roles, draw


def video_causal(earlier, seed, adds):
    """Teacher forcing with the mixed objective on data; on a tenth of the steps whole clips, added or instead."""
    settings = stage("causal", "causal_teacher")
    network, loss = earlier.causal("causal_teacher"), FlowMapLoss(FLOW_MAPS["mixed"], weight=anyflow_weight())
    forced = TeacherForced(loss, FlowMapLoss({}, weight=torch.ones_like))
    role = Role(EvaluationCounter(network), forced, ema=None, clip=1.0)
    drawn, law = earlier.draw(settings, seed), {"diagonal": 1.0, "end": 0.0, "diagonal_time": "logit_normal"}

    def draw(step):
        batch, whole = drawn(step), step % 10 == 9
        if whole and not adds:
            return single_chunk_batch(batch)
        cut = cycle_context_lengths(batch, step, network)
        times = draw_pairs(VIDEO_ROWS, generator(seed, 5, step), **law)
        return add_whole_clips(cut, batch, times["t"]) if whole else cut

    return {"student": role}, draw


NORMAL, WEIGHTED = {"diagonal_time": "logit_normal"}, {"diagonal_time": "uniform", "weight": anyflow_weight()}
UNWEIGHTED = NORMAL | {"weight": torch.ones_like}
PLANE = {  # {what is trained: {arm: function}}; "ours" and what differs from it
    "flow map, exact velocity": {
        "ours": partial(flow_map, "exact"),
        "t the larger of two": partial(flow_map, "exact", "larger"),
    },
    "flow map, data velocity": {
        "ours": partial(flow_map, "data"),
        "t the larger of two": partial(flow_map, "data", "larger"),
    },
    "guided flow map": {"ours": partial(guidance, False), "published form": partial(guidance, True)},
    "teacher": {"ours": partial(teacher, **WEIGHTED), "logit-normal t, no weight": partial(teacher, **UNWEIGHTED)},
    "on-policy": {
        "ours": partial(on_policy, "uniform"),
        "logit-normal t of the fake score": partial(on_policy, "logit_normal"),
    },
}
RATES = {"AdamW 0.006": partial(video_flow_map, lr=6e-3)}
RATES |= {f"Muon {rate:g}": partial(video_flow_map, muon=rate) for rate in (0.01, 0.02, 0.04)}
VIDEO = {  # {what is trained: (steps, step counts, sampler, {arm: build})}
    "flow map": (
        80,
        VIDEO_NFE,
        "flow_map",
        {"ours": video_flow_map, "t the larger of two": partial(video_flow_map, diagonal_time="larger"), **RATES},
    ),
    "guided flow map": (
        80,
        VIDEO_NFE,
        "flow_map",
        {"ours": partial(video_guidance, published=False), "published form": partial(video_guidance, published=True)},
    ),
    "teacher": (
        150,
        TEACHER_NFE[:2],
        "euler",
        {"ours": partial(video_teacher, **WEIGHTED), "logit-normal t, no weight": partial(video_teacher, **UNWEIGHTED)},
    ),
    "on-policy": (
        25,
        VIDEO_NFE,
        "flow_map",
        {
            "ours": video_on_policy,
            "null prompts in the forward loss alone": partial(video_on_policy, null_prompts="forward"),
            "logit-normal t of the fake score": partial(video_on_policy, fake_time="logit_normal"),
        },
    ),
    "causal": (
        40,
        (1, 4),
        "causal",
        {"ours": partial(video_causal, adds=False), "whole clips added": partial(video_causal, adds=True)},
    ),
}


WAN_STEPS, WAN_KINDS = 100, ("tangent", "semigroup")
WAN = {f"AdamW {lr:g}": {"lr": lr} for lr in (1e-3, 3e-3, 1e-2)}  # {arm: options of the role}
WAN |= {f"Muon {rate:g}": {"muon": rate} for rate in (0.01, 0.02, 0.04)}


def on_plane_alone(trained: str, arm: str, position: int = 0) -> dict:
    """One arm of the plane, its copies the seeds."""
    torch.set_num_threads(1)
    began = time.process_time()
    nfe, figures, count = PLANE[trained][arm]()
    return {"at": nfe, "figures": figures, "evaluations": count, "seconds": time.process_time() - began}


def on_video(trained: str, arm: str, seed: int, folder: Path, reference: Tensor, position: int = 0) -> dict:
    """One arm of small video, trained with one seed and measured by sliced W2 from the latents `reference`."""
    torch.set_num_threads(1)
    steps, nfes, how, arms = VIDEO[trained]
    earlier, began = stages.Earlier(folder), time.process_time()
    roles, draw = arms[arm](earlier, seed)
    for role in roles.values():
        role.warmup = WARMUP
    train(roles, draw, steps, progress=False)
    seconds = time.process_time() - began
    network = next(iter(roles.values())).network.network  # the rate has fallen to zero
    counters = [*(role.network for role in roles.values()), *earlier.teachers]
    count = sum(counter.rows for counter in counters)
    z, (prompt, _) = sobol_noise(CLIPS, earlier.latents.shape[1:]), video.prompts_for(CLIPS)
    figures = [[sliced_w2(video.sample(how, network, z, prompt, nfe), reference) for nfe in nfes]]
    return {"at": nfes, "figures": figures, "evaluations": count, "seconds": seconds}


def on_wan(arm: str, seed: int, folder: Path, position: int = 0) -> dict:
    """The forward stage of tiny Wan, all weights: errors of the velocity and of the flow map on fresh noise."""
    torch.set_num_threads(1)
    places = [f"runs={folder}", f"base={folder}/wan", f"data={folder}/wan/latents"]
    options = [*places, "trained=full", "batch=16", f"steps={WAN_STEPS}", f"seed={seed}"]
    config = load_config(["bidirectional", "forward", "tiny"], options)
    data = LatentSet(config.data)
    networks = RunNetworks(config, data.shape[0])
    (role,) = wan_stages.forward(config, networks, {"prompt": data.null}).values()
    role = Role(role.network, role.loss, **wan_stages.optimiser(config) | WAN[arm])
    draw, began = wan_stages.draws(config, data), time.process_time()
    train({"student": role}, draw, WAN_STEPS, progress=False)
    seconds, count = time.process_time() - began, role.network.rows
    with torch.no_grad():
        errors = [role.loss(role.network, draw(step))[1] for step in range(WAN_STEPS, WAN_STEPS + 16)]
    figures = [[float(mean(error[kind] for error in errors)) for kind in WAN_KINDS]]
    return {"at": WAN_KINDS, "figures": figures, "evaluations": count, "seconds": seconds}


def run(toys: list[str], only: list[str], output: str | Path, workers: int = 2) -> dict:
    """Train and measure every arm; writes and returns the report, choices.json. only: the rest of it stays."""
    output = Path(output)
    jobs = {}
    if "plane" in toys:
        jobs |= {("plane", name, arm, 0): (on_plane_alone, (name, arm)) for name in PLANE for arm in PLANE[name]}
    if "video" in toys:
        folder = output / "networks"
        folder.mkdir(parents=True, exist_ok=True)
        for path in stages.WEIGHTS.glob("*-?.*"):
            shutil.copy(path, folder)
        if not stages.latents_path(folder).exists():
            stages.make_latents(folder)
        reference = video.held_out(load_codec(stages.path_of(folder, "codec")), count=CLIPS)[0][0]
        each = [(name, arm, seed) for name, (*_, arms) in VIDEO.items() for arm in arms for seed in SEEDS]
        jobs |= {("video", *job): (on_video, (*job, folder, reference)) for job in each}
    if "wan" in toys:
        folder = output / "tiny"
        if not folder.exists():
            make_tiny_wan(folder / "wan")
        jobs |= {("wan", "forward stage", arm, seed): (on_wan, (arm, seed, folder)) for arm in WAN for seed in SEEDS}
    jobs = {key: job for key, job in jobs.items() if not only or key[1] in only}
    path = output / "choices.json"
    report = json.loads(path.read_text()) if only and path.exists() else {}
    for toy, name, *_ in jobs:
        report.get(toy, {}).pop(name, None)
    for (toy, name, arm, _), found in run_jobs(jobs, workers).items():
        entry = report.setdefault(toy, {}).setdefault(name, {}).setdefault(arm, found | {"figures": [], "seconds": 0.0})
        entry["figures"] += found["figures"]
        entry["seconds"] += found["seconds"]
    with staging_folder(output) as unfinished:
        write_report(rounded(report), unfinished / path.name)
    return report


def table(report: dict) -> str:
    """The choices as Markdown: a row each, beside ours; mean over seeds (range), times 1000."""
    rows = []
    for toy, groups in report.items():
        for name, arms in groups.items():
            for arm in [arm for arm in arms if "ours" in arms and arm not in ("ours", *RATES)]:
                both = [f"{arms[each]['evaluations'] / 1000:.0f} k" for each in ("ours", arm)]
                rows.append(
                    [f"{toy}, {name}: {arm}", _line(arms["ours"]["at"]), *map(_cell, (arms["ours"], arms[arm]))]
                )
                rows[-1].append(" / ".join(both) if both[0] != both[1] else both[0])
    header = ["published choice", "steps", "ours", "published", "evaluations"]
    return markdown_table(header, rows)


def rates_table(report: dict) -> str:
    """The optimisers as Markdown: errors and CPU seconds of all seeds."""
    groups = {
        "video": report.get("video", {}).get("flow map", {}),
        "wan": report.get("wan", {}).get("forward stage", {}),
    }
    rows = [
        [toy, arm, _line(entry["at"]), _cell(entry), f"{entry['seconds']:.0f}"]
        for toy, arms in groups.items()
        for arm, entry in arms.items()
        if arm in ("ours", *RATES, *WAN)
    ]
    return markdown_table(["toy", "optimiser", "steps, or error of", "x 1000, mean (range)", "CPU seconds"], rows)


def _line(values):
    return " / ".join(map(str, values))


def _cell(entry):
    by_step = zip(*entry["figures"], strict=True)
    return _line(f"{1000 * mean(seeds):.1f} ({1000 * (max(seeds) - min(seeds)):.1f})" for seeds in by_step)


def main(argv: list[str] | None = None) -> int:
    """Train, measure and print the table; returns the exit status."""
    parser = cli.Parser("python -m benchmarks.published", description=__doc__)
    parser.add_argument("--toys", nargs="+", default=["plane", "video", "wan"], metavar="TOY", help="(default: both)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="what is trained (default: everything)")
    parser.add_argument("--output", default="outputs/published", help="folder (default: outputs/published)")
    parser.add_argument("--workers", type=int, default=2, help="processes; each takes one core (default: 2)")
    arguments = parser.parse_args(argv)
    report = run(arguments.toys, arguments.only, arguments.output, arguments.workers)
    print(f"{table(report)}\n\n{rates_table(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
