"""AnyFlow's choices against ours, one at a time: on the plane (the spiral) and on small video.

Both arms of a pair have the same networks, data, noise, optimiser and number of steps. Three seeds: on the plane three
copies trained as one network, on video three trainings from the committed networks of toy_data/video. Beside them
image to video, and Muon against AdamW on small video and on tiny Wan.

`python -m benchmarks.published` takes about 25 CPU minutes, `--only NAME ...` less; it writes choices.json, of which
docs/wan/choices.json is a copy.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from minianyflow.batch import batches
from minianyflow.guidance import Guidance, guided_velocity
from minianyflow.measures import path_error, sliced_w2, sobol_noise
from minianyflow.mixtures import GaussianMixture
from minianyflow.networks.causal import causal_rollout
from minianyflow.networks.lora_roles import COARSE_PATCHES, EMBEDDERS
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.networks.teacher_forcing import (
    TeacherForced,
    add_whole_clips,
    cycle_context_lengths,
    single_chunk_batch,
)
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
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
from minianyflow.wan.published import anyflow_weight
from minianyflow.wan.run_networks import RunNetworks
from toy_data import blobs, plane

SEEDS = (0, 1, 2)
SCALE, RATE = 3.0, 1e-2  # of guidance, of learning, on the plane
PLANE_NFE, VIDEO_NFE, TEACHER_NFE = (1, 4, 16, 64), (1, 4, 8), (8, 32, 128)
PLANE_STEPS, POLICY_STEPS = 5000, 500
VIDEO_ROWS, WARMUP, CLIPS = 64, 10, 512
SPIRAL = plane.load("spiral")
HALVES = [GaussianMixture(half, 0.05) for half in SPIRAL.means.split(50)]  # of the spiral, each the law of one label


# The plane: an arm returns the measures of three copies, [[value per step count] per seed]


def flow_map(velocity: str, diagonal_time: str = "uniform", rows: int = 128, by_step: bool = False) -> tuple:
    """A mixed flow map of the exact velocity, or of the data's."""
    exact = velocity == "exact"
    loss = FlowMapLoss(FLOW_MAPS["mixed"], exact_velocity if exact else None, adaptive=0.5 if exact else 0.0)
    draw = batches(SPIRAL.sample, rows, SEEDS, diagonal_time=diagonal_time)
    network, count = trained(MLP(seeds=SEEDS), loss, one_objective(draw) if by_step else draw)
    return PLANE_NFE, on_plane(network, PLANE_NFE), count


def teacher(diagonal_time: str, weight: Callable) -> tuple:
    """The velocity learnt from data, followed by Euler's method."""
    draw = batches(SPIRAL.sample, 128, SEEDS, diagonal=1.0, end=0.0, diagonal_time=diagonal_time)
    network, count = trained(MLP(seeds=SEEDS), FlowMapLoss({}, weight=weight), draw)
    return TEACHER_NFE, on_plane(network, TEACHER_NFE, euler=True), count


def one_objective(draw: Callable) -> Callable:
    """The same draws, with one objective for all rows of a step, as `wan.stages.draws` has it."""

    def drawn(step):
        batch = draw(step)
        return batch | {"objective_draw": torch.full_like(batch["t"], step * wan_stages.GOLDEN % 1)}

    return drawn


def exact_velocity(z, t, copy=None):
    """The same for every copy."""
    return SPIRAL.velocity(z, t)


def trained(network: nn.Module, loss: Callable, draw: Callable) -> tuple[nn.Module, int]:
    """The average of the network, and the evaluations that its training took."""
    role = Role(EvaluationCounter(network), loss, lr=RATE)
    train({"student": role}, draw, PLANE_STEPS, progress=False)
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


def on_policy(fake_time: str = "uniform", shared: bool = False) -> tuple:
    """The committed mixed flow maps, trained on their own rollouts; exact scores for the teacher's."""
    weights = {}
    for copy in range(len(SEEDS)):
        for name, value in read_copy(STUDENTS / "mixed.safetensors", copy)[0].items():
            weights.setdefault(name, []).append(value)
    student, fake = (EvaluationCounter(MLP(seeds=SEEDS)) for _ in range(2))
    for network in (student, fake):
        network.network.load_state_dict({name: torch.cat(value) for name, value in weights.items()})
    forward = FlowMapLoss(FLOW_MAPS["mixed"], exact_velocity, adaptive=0.5)
    slow = {"betas": (0.0, 0.999), "warmup": 50, "ema": 0.99}
    roles = {"student": Role(student, OnPolicyLoss(exact_velocity, fake, forward), lr=1e-3, **slow)}
    roles["fake"] = Role(fake, FakeScoreLoss(student), lr=5e-3, **slow)
    drawn = batches(SPIRAL.sample, 128, SEEDS)

    def draw(step):
        batch = drawn(step)
        return batch | draw_on_policy((2,), len(batch["x"]), generator(step, 1), fake_time=fake_time, shared=shared)

    train(roles, draw, POLICY_STEPS, progress=False)
    return PLANE_NFE, on_plane(roles["student"].average.module, PLANE_NFE), student.rows + fake.rows


# Small video: an arm returns (roles, draw) for one seed


def stage(kind: str, parent: str = "", **options) -> stages.Stage:
    """A stage of the committed run, but short."""
    options = {"rows": VIDEO_ROWS, "guidance": stages.GUIDANCE} | options
    return stages.Stage(kind, parent, **options)


def video_flow_map(earlier, seed, diagonal_time="uniform", lr=3e-3, muon=None, options=stages.EULERIAN):
    """A flow map, by default Eulerian, from the guided velocity of the teacher."""
    settings = stage("flow_map", "teacher", options=options)
    network, loss = EvaluationCounter(earlier.network("teacher")), earlier.forward(settings)
    role = Role(network, loss, lr=lr, muon=muon, ema=None, clip=1.0)
    return {"student": role}, earlier.draw(settings, seed, diagonal_time=diagonal_time)


def video_mixed(earlier, seed, by_step):
    """The mixture of Eulerian and semigroup rows."""
    roles, draw = video_flow_map(earlier, seed, options={"shares": FLOW_MAPS["mixed"]})
    return roles, one_objective(draw) if by_step else draw


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


def video_on_policy(earlier, seed, null_prompts="everywhere", fake_time="uniform", shared=False, embedders=True):
    """On-policy training of the Eulerian student; a tenth of the rows without their prompt.

    embedders: whether the fake score learns its embedders of time, too.
    """
    forward_weight = stages.STAGES["on_policy"].options
    settings = stage("on_policy", "eulerian", lr=1e-4, options=forward_weight, stream=3)
    roles, _ = stages.build_on_policy(settings, seed, earlier)
    if not embedders:
        fake = roles["fake"]
        for name, layer in fake.network.network.transformer.named_modules():
            layer.requires_grad_(False) if re.fullmatch(EMBEDDERS[0], name) else None
        options = {"lr": stages.FAKE_RATE * settings.lr, "betas": (0.0, 0.999), "ema": None, "clip": 1.0}
        roles["fake"] = Role(fake.network, fake.loss, **options)
    drawn, null = earlier.draw(settings, seed), TextEncoder()([""])

    def draw(step):
        batch, source = drawn(step), generator(seed, 4, step)
        batch |= draw_on_policy(batch["x"].shape[1:], VIDEO_ROWS, source, fake_time=fake_time, shared=shared)
        dropped = torch.rand(VIDEO_ROWS, generator=source)[:, None, None] < stages.DROPPED
        kept = {"prompt": torch.where(dropped, null, batch["condition"]["prompt"])}
        rollout = {"rollout_condition": batch["condition"]} if null_prompts == "forward" else {}
        return batch | rollout | {"condition": kept}

    return roles, draw


def video_on_policy_by_chunks(earlier, seed, whole):
    """On-policy training of the causal student; whole: a tenth of the steps have the forward loss of whole clips."""
    settings = stage("causal_on_policy", "causal", rows=VIDEO_ROWS // 2, lr=1e-4, stream=3)
    roles, drawn = stages.build_on_policy(settings, seed, earlier)
    roles["student"].loss.forward = TeacherForced(FlowMapLoss(FLOW_MAPS["mixed"], weight=anyflow_weight()))
    clips = earlier.draw(settings, seed)
    return roles, lambda step: drawn(step) | (single_chunk_batch(clips(step)) if whole and step % 10 == 9 else {})


def video_data(earlier, seed, causal=False, known=0.0, coarse="whole", whole=""):
    """The mixed objective on data, by teacher forcing if causal; known: share of rows that know their first frame.

    coarse: how the embedding of coarse patches learns; "lora" has the rank of its input, as Wan's has, and no bias.
    whole: on a tenth of the steps whole clips are learnt, "added" to the chunks or "instead" of them.
    """
    network = earlier.causal("causal_teacher") if causal else earlier.network("teacher")
    if coarse == "lora":
        rank = network.transformer.far_patch_embedding.weight[0].numel()
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[*COARSE_PATCHES])
        inject_adapter_in_model(config, network.transformer)
        for name, weight in network.named_parameters():
            weight.requires_grad_("base_layer" not in name)
    loss, drawn = (
        FlowMapLoss(FLOW_MAPS["mixed"], weight=anyflow_weight()),
        earlier.draw(stage("causal"), seed, known=known),
    )
    loss = TeacherForced(loss, FlowMapLoss({}, weight=torch.ones_like)) if causal else loss
    law = {"diagonal": 1.0, "end": 0.0, "diagonal_time": "logit_normal"}

    def draw(step):
        batch, clips = drawn(step), whole and step % 10 == 9
        if not causal or (clips and whole == "instead"):
            return single_chunk_batch(batch) if causal else batch
        cut = cycle_context_lengths(batch, step, network)
        t = draw_pairs(VIDEO_ROWS, generator(seed, 5, step), **law)["t"]
        return add_whole_clips(cut, batch, t) if clips else cut

    return {"student": Role(EvaluationCounter(network), loss, ema=None, clip=1.0)}, draw


@torch.no_grad()
def go_on(how: str, network: nn.Module, x: Tensor, prompt: Tensor, nfe: int) -> Tensor:
    """Clips (B, F, C, H, W) that go on from the first frames of the clips x."""
    z, times = sobol_noise(len(x), x.shape[1:]), time_grid(nfe)
    if how.startswith("causal"):
        return causal_rollout(network, z, times, prompt, network.first, network.rest, x[:, :1])[-1]
    known = torch.arange(x.shape[1]).expand(x.shape[:2]) < 1
    return sample_flow_map(network, torch.cat([x[:, :1], z[:, 1:]], 1), times, prompt=prompt, known=known)[-1]


WEIGHTED = {"diagonal_time": "uniform", "weight": anyflow_weight()}
NORMAL, OURS = {"diagonal_time": "logit_normal", "weight": torch.ones_like}, {"ours": {}}
LARGER, FORMS = OURS | {"t the larger of two": {"diagonal_time": "larger"}}, ({"published": False}, {"published": True})
TEACHERS = {"ours": WEIGHTED, "logit-normal t, no weight": NORMAL}
GUIDED = dict(zip(("ours", "published form"), FORMS, strict=True))
POLICIES = OURS | {"logit-normal t of the fake score": {"fake_time": "logit_normal"}}
POLICIES |= {"one N and g a step": {"shared": True}}
VIDEO_POLICIES = OURS | {"null prompts in the forward loss alone": {"null_prompts": "forward"}} | POLICIES
VIDEO_POLICIES |= {"embedders of time of the fake score frozen": {"embedders": False}}
MUON = {f"Muon {rate:g}": {"muon": rate} for rate in (0.01, 0.02, 0.04)}
RATES = {"AdamW 0.006": {"lr": 6e-3}} | MUON
OBJECTIVES = {"ours": {"by_step": True}, "an objective per row": {"by_step": False}}
KNOWN = {f"i2v_prob {share}": {"known": share} for share in (0.0, 0.25)}
PLANE = {  # {what is trained: (function, {arm: its options})}; "ours" and what differs from it
    "flow map, exact velocity": (partial(flow_map, "exact"), LARGER),
    "flow map, data velocity": (partial(flow_map, "data"), LARGER),
    "mixed flow map, 16 rows": (partial(flow_map, "exact", rows=16), OBJECTIVES),
    "guided flow map": (guidance, GUIDED),
    "teacher": (teacher, TEACHERS),
    "on-policy": (on_policy, POLICIES),
}
CHUNKS = partial(video_data, causal=True)
VIDEO = {  # {what is trained: ((steps, step counts, sampler, build), {arm: options of build})}
    "flow map": ((80, VIDEO_NFE, "flow_map", video_flow_map), LARGER | RATES),
    "mixed flow map": ((80, VIDEO_NFE, "flow_map", video_mixed), OBJECTIVES),
    "guided flow map": ((80, VIDEO_NFE, "flow_map", video_guidance), GUIDED),
    "teacher": ((150, TEACHER_NFE[:2], "euler", video_teacher), TEACHERS),
    "on-policy": ((25, VIDEO_NFE, "flow_map", video_on_policy), VIDEO_POLICIES),
    "causal": ((40, (1, 4), "causal", CHUNKS), {"ours": {"whole": "instead"}, "whole clips added": {"whole": "added"}}),
    "causal, coarse patches": ((40, (1, 4), "causal", CHUNKS), {"ours": {"coarse": "lora"}, "trained whole": {}}),
    "causal on-policy": (
        (25, (1, 4), "causal", video_on_policy_by_chunks),
        {"ours": {"whole": True}, "no whole clips": {"whole": False}},
    ),
    "image to video": ((80, VIDEO_NFE, "image", video_data), KNOWN),
    "causal image to video": ((40, (1, 4), "causal image", CHUNKS), KNOWN),
}
WAN_STEPS, WAN_KINDS = 100, ("tangent", "semigroup")
WAN = {"forward stage": (None, {f"AdamW {lr:g}": {"lr": lr} for lr in (1e-3, 3e-3, 1e-2)} | MUON)}  # of the role


def on_video(trained: str, arm: str, seed: int, folder: Path, clips: tuple[Tensor, Tensor]) -> tuple:
    """One arm of small video; clips: latents to measure against, and their numbers of balls.

    Image to video: by the law of the steps from the first latent frame, which is given, to the second.
    """
    (steps, nfes, how, build), arms = VIDEO[trained]
    earlier = stages.Earlier(folder)
    roles, draw = build(earlier, seed, **arms[arm])
    for role in roles.values():
        role.warmup = WARMUP
    train(roles, draw, steps, progress=False)
    network = next(iter(roles.values())).network.network  # the rate has fallen to zero
    count = sum(counter.rows for counter in [*(role.network for role in roles.values()), *earlier.teachers])
    x, balls = clips
    if how.endswith("image"):
        prompt = TextEncoder()(blobs.PROMPTS)[balls - 1]
        ends = [go_on(how, network, x, prompt, nfe) for nfe in nfes]
        return nfes, [[sliced_w2(end[:, 1] - end[:, 0], x[:, 1] - x[:, 0]) for end in ends]], count
    z, (prompt, _) = sobol_noise(CLIPS, x.shape[1:]), video.prompts_for(CLIPS)
    return nfes, [[sliced_w2(video.sample(how, network, z, prompt, nfe), x) for nfe in nfes]], count


def on_wan(trained: str, arm: str, seed: int, folder: Path) -> tuple:
    """The forward stage of tiny Wan, all weights: errors of the velocity and of the flow map on fresh noise."""
    places = [f"runs={folder}", f"base={folder}/wan", f"data={folder}/wan/latents"]
    options = [*places, "trained=full", "batch=16", f"steps={WAN_STEPS}", f"seed={seed}"]
    config = load_config(["bidirectional", "forward", "tiny"], options)
    data = LatentSet(config.data)
    networks = RunNetworks(config, data.shape[0])
    (role,) = wan_stages.forward(config, networks, {"prompt": data.null}).values()
    role = Role(role.network, role.loss, **wan_stages.optimiser(config) | WAN[trained][1][arm])
    draw = wan_stages.draws(config, data)
    train({"student": role}, draw, WAN_STEPS, progress=False)
    count = role.network.rows
    with torch.no_grad():
        errors = [role.loss(role.network, draw(step))[1] for step in range(WAN_STEPS, WAN_STEPS + 16)]
    return WAN_KINDS, [[float(mean(error[kind] for error in errors if kind in error)) for kind in WAN_KINDS]], count


TOYS = {  # {toy: (what trains and measures an arm, what is trained, seeds)}
    "plane": (lambda name, arm, _: PLANE[name][0](**PLANE[name][1][arm]), PLANE, (0,)),  # its copies are the seeds
    "video": (on_video, VIDEO, SEEDS),
    "wan": (on_wan, WAN, SEEDS),
}


def on_toy(toy: str, *arguments: object) -> dict:
    """One arm with one seed, and the CPU seconds that it took. The last argument is not used: `run_jobs`."""
    torch.set_num_threads(1)
    began = time.process_time()
    nfes, figures, count = TOYS[toy][0](*arguments[:-1])
    return {"at": nfes, "figures": figures, "evaluations": count, "seconds": time.process_time() - began}


def material(toy: str, folder: Path) -> tuple:
    """What the arms of a toy need beside their name and seed, made in `folder` if it is not there."""
    if toy == "plane":
        return ()
    if toy == "wan":
        if not folder.exists():
            make_tiny_wan(folder / "wan")
        return (folder,)
    folder.mkdir(parents=True, exist_ok=True)
    for path in stages.WEIGHTS.glob("*-?.*"):
        shutil.copy(path, folder)
    if not stages.latents_path(folder).exists():
        stages.make_latents(folder)
    clips, balls = video.held_out(load_codec(stages.path_of(folder, "codec")), count=CLIPS)
    return folder, (clips[0], balls)


def run(toys: list[str], only: list[str], output: str | Path, workers: int = 2) -> dict:
    """Train and measure every arm; writes and returns the report, choices.json. only: the rest of it stays."""
    output, jobs = Path(output), {}
    for toy in toys:
        _, groups, seeds = TOYS[toy]
        given = material(toy, output / toy)
        names = [(name, arm) for name, (_, arms) in groups.items() for arm in arms]
        names = [pair for pair in names if not only or {*pair} & {*only}]
        jobs |= {(toy, *pair, seed): (on_toy, (toy, *pair, seed, *given)) for pair in names for seed in seeds}
    path = output / "choices.json"
    report = json.loads(path.read_text()) if only and path.exists() else {}
    for toy, name, arm, _ in jobs:
        report.setdefault(toy, {}).setdefault(name, {})[arm] = {"figures": [], "seconds": 0.0}
    for (toy, name, arm, _), found in run_jobs(jobs, workers).items():
        entry = report[toy][name][arm]
        report[toy][name][arm] = found | {kind: entry[kind] + found[kind] for kind in ("figures", "seconds")}
    with staging_folder(output) as unfinished:
        write_report(rounded(report), unfinished / path.name)
    return report


def table(report: dict) -> str:
    """The choices as Markdown: a row each, beside ours; mean over seeds (range), times 1000."""
    rows = []
    for toy, name, arms in ((toy, name, arms) for toy, groups in report.items() for name, arms in groups.items()):
        for arm in [arm for arm in arms if "ours" in arms and arm not in ("ours", *RATES)]:
            entries = arms["ours"], arms[arm]
            costs = dict.fromkeys(f"{entry['evaluations'] / 1000:.0f} k" for entry in entries)
            rows.append([f"{toy}, {name}: {arm}", _line(entries[0]["at"]), *map(_cell, entries), _line(costs)])
    return markdown_table(["choice", "steps", "ours", "with it", "evaluations"], rows)


def _line(values):
    return " / ".join(map(str, values))


def _cell(entry):
    by_step = zip(*entry["figures"], strict=True)
    return _line(f"{1000 * mean(seeds):.1f} ({1000 * (max(seeds) - min(seeds)):.1f})" for seeds in by_step)


def main(argv: list[str] | None = None) -> int:
    """Train, measure and print the table; returns the exit status."""
    parser = cli.Parser("python -m benchmarks.published", description=__doc__)
    parser.add_argument("--toys", nargs="+", default=[*TOYS], metavar="TOY", help="(default: all)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="what is trained, or arms (default: all)")
    parser.add_argument("--output", default="outputs/published", help="folder (default: outputs/published)")
    parser.add_argument("--workers", type=int, default=2, help="processes; each takes one core (default: 2)")
    arguments = parser.parse_args(argv)
    print(table(run(arguments.toys, arguments.only, arguments.output, arguments.workers)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
