"""Small video latents, from a codec to any-step students: every stage, and how all are trained in their order.

    codec        a tiny AutoencoderKLWan (networks/codec.py)
    teacher      flow matching, bidirectional
    flow maps    from the teacher, by each objective of the plane; consistency, the baseline, from the same teacher
    on-policy    from a flow map; beside it the forward stage alone, continued at equal cost
    causal       from a flow map: teacher forcing, then on-policy, with and without gradient through the context
    inertia      a dense network that puts out the clean clip, teacher and flow map: balls that keep their velocity

This module has no mathematics: objectives, backward simulation, samplers and the loop are those of the plane.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minianyflow.consistency import ConsistencyLoss
from minianyflow.flow_map import velocity
from minianyflow.guidance import guided
from minianyflow.networks.causal import CausalNetwork, causal_backward_simulation, causal_from
from minianyflow.networks.dense import Dense, FromClean
from minianyflow.networks.known_frames import know_first_frames
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.networks.teacher_forcing import TeacherForced, cycle_context_lengths
from minianyflow.networks.wan import TINY_TIMESTEPS, TextEncoder, WanNetwork, tiny_transformer
from minianyflow.networks.weights import KINDS, describe, load_codec, load_network, read_weights, save_weights
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, draw_on_policy
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.times import draw_pairs, generator
from minianyflow.training import Role, train
from minianyflow.video.codec_training import train_codec
from toy_data import blobs

WEIGHTS = Path(blobs.__file__).parent / "video"  # of the committed run
CLIPS = 16384  # encoded once, for all stages
DENSE_CLIPS, TWO = 4, 0.65  # for dense networks: times as many, share of rows with two balls


@dataclass(frozen=True)
class Stage:
    """How one stage trains."""

    kind: str  # of BUILDERS
    parent: str = ""  # the stage that it starts from
    steps: int = 0
    rows: int = 128
    lr: float = 3e-3
    seeds: tuple[int, ...] = (0,)  # one student per seed, from seed 0 of the parent where that has fewer
    options: dict = field(default_factory=dict)  # of its loss
    stream: int = 1  # the number of its stream of batches, another one than that of its parent
    guidance: float = 1.0  # scale of its teacher's velocity, 1 for none


THREE = (0, 1, 2)
ALONE = ("codec", "teacher")  # nothing else can be trained beside them: they get two cores
CONSISTENCY_EMA, FAKE_RATE = 0.95, 5.0
DROPPED = 0.1  # share of a teacher's rows with the null prompt, so that it can be guided
GUIDANCE = 2.0  # for all students: the guided law is nearer to the data than the teacher's own, see docs/video.md
FLOW_MATCHING = {"diagonal": 1.0, "end": 0.0}  # shares of the pairs of times: r = t in all rows
FORWARD = {name: {"shares": shares, "adaptive": 0.5} for name, shares in FLOW_MAPS.items()}
EULERIAN = FORWARD["eulerian"]
GRADIENT = {"context_gradient": True}
STAGES = {
    "codec": Stage("codec", steps=1000, lr=6e-3),
    "teacher": Stage("teacher", "codec", 6000, lr=6e-3),
    "eulerian": Stage("flow_map", "teacher", 600, seeds=THREE, options=EULERIAN, guidance=GUIDANCE),
    "lagrangian": Stage("flow_map", "teacher", 600, options=FORWARD["lagrangian"], guidance=GUIDANCE),
    "semigroup": Stage("flow_map", "teacher", 600, options=FORWARD["semigroup"], guidance=GUIDANCE),
    "mixed": Stage("flow_map", "teacher", 600, options=FORWARD["mixed"], guidance=GUIDANCE),
    "consistency": Stage("consistency", "teacher", 600, seeds=THREE, guidance=GUIDANCE),
    "on_policy": Stage("on_policy", "eulerian", 100, 64, 1e-4, THREE, {"forward_weight": 24.0}, 3, GUIDANCE),
    "forward_only": Stage("flow_map", "eulerian", 187, seeds=THREE, options=EULERIAN, stream=5, guidance=GUIDANCE),
    "causal_teacher": Stage("causal_teacher", "teacher", 4000, stream=2),
    "causal": Stage("causal", "causal_teacher", 700, seeds=THREE, options=EULERIAN, stream=7, guidance=GUIDANCE),
    "causal_on_policy": Stage("causal_on_policy", "causal", 100, 64, 1e-4, THREE, stream=3, guidance=GUIDANCE),
    "causal_gradient": Stage("causal_on_policy", "causal", 100, 64, 1e-4, (0,), GRADIENT, 3, GUIDANCE),
    "causal_forward_only": Stage("causal", "causal", 227, options=EULERIAN, stream=6, guidance=GUIDANCE),
    "inertia_teacher": Stage("dense_teacher", "codec", 52500, 256, lr=3e-3),
    "inertia": Stage("dense", "inertia_teacher", 2000, 128, lr=2e-3, options=EULERIAN),
}


def path_of(folder: str | Path, name: str, seed: int = 0) -> Path:
    """The weights of a stage; those of seed 0 if it was trained with fewer seeds."""
    return Path(folder) / f"{name}-{seed if seed in STAGES[name].seeds else 0}.safetensors"


def latents_path(folder: str | Path, times: int = 1) -> Path:
    """The latents that stages train on; another codec or another number of clips has another file."""
    return Path(folder) / f"latents-{times * CLIPS}-{_digest(path_of(folder, 'codec'))}.safetensors"


def make_latents(folder: str | Path, times: int = 1) -> None:
    """Encode the clips that stages train on, `times` CLIPS, and write them with their numbers of balls."""
    clips = blobs.sample(times * CLIPS, generator(100))
    latents = load_codec(path_of(folder, "codec")).encode(clips.video)
    with staging_folder(folder) as unfinished:
        save_file({"latents": latents, "balls": clips.balls}, unfinished / latents_path(folder, times).name)


class Earlier:
    """What a stage finds in its folder: latents, networks to start from, `teachers` by their EvaluationCounter."""

    def __init__(self, folder: str | Path, times: int = 1):
        self.folder, self.teachers, data = folder, [], load_file(latents_path(folder, times))
        self.latents, self.balls = data["latents"], data["balls"]
        self.prompts = TextEncoder()(["", *blobs.PROMPTS])  # (3, L, D); number 0 is the null prompt

    def batch(self, rows: int, source: torch.Generator, drop: float = 0.0, two: float | None = None, **pairs):
        """x, eps (rows, 5, 4, 4, 4), pairs of times, and prompts, with probability `drop` the null prompt.

        two: share of clips of two balls, by default the data's. pairs: of `draw_pairs`; with `known`, that share of
        rows knows its first frame.
        """
        index = torch.randint(len(self.latents), (rows,), generator=source)
        if two is not None:  # clips of one ball and of two take turns
            index = index - index % 2 + (torch.rand(rows, generator=source) < two)
        dropped = torch.rand(rows, generator=source) < drop
        prompt = self.prompts[torch.where(dropped, 0, self.balls[index])]
        x = self.latents[index]
        eps = torch.randn(x.shape, generator=source)
        batch = {"x": x, "eps": eps, "condition": {"prompt": prompt}, "dropped": dropped}
        return know_first_frames(batch | draw_pairs(rows, source, **pairs))

    def draw(self, stage: Stage, seed: int, **options) -> Callable[[int], dict]:
        """draw(step): the batches of a stage, the same for all its roles. options: of `batch`."""
        return lambda step: self.batch(stage.rows, generator(seed, stage.stream, step), **options)

    def network(self, name: str, seed: int = 0):
        """A copy to train, of the network of an earlier stage."""
        return load_network(path_of(self.folder, name, seed)).requires_grad_(True)

    def causal(self, name: str, seed: int = 0) -> CausalNetwork:
        """A copy to train chunk by chunk, from a causal network or a bidirectional one."""
        network = self.network(name, seed)
        if isinstance(network, CausalNetwork):
            return network
        return CausalNetwork(causal_from(network.transformer), timesteps=network.timesteps)

    def velocity(self, name: str, guidance: float = 1.0) -> Callable:
        """The velocity(z, t, **condition) of a teacher, guided away from the null prompt if `guidance` is above 1."""
        self.teachers.append(EvaluationCounter(load_network(path_of(self.folder, name))))
        return guided(partial(velocity, self.teachers[-1]), {"prompt": TextEncoder()([""])}, guidance)

    def forward(self, stage: Stage, teacher: str = "teacher") -> FlowMapLoss:
        """The loss of the forward stage with a teacher's velocity; why not that of data, see docs/video.md."""
        return FlowMapLoss(**{"delta": 5e-3} | stage.options, velocity=self.velocity(teacher, stage.guidance))


# How each kind trains: build(stage, seed, earlier) returns the roles, the first of which is saved, and draw(step)
Built = tuple[dict[str, Role], Callable[[int], dict]]


def build_teacher(stage: Stage, seed: int, earlier: Earlier) -> Built:
    """Flow matching on data; a tenth of the rows without their prompt."""
    teacher = _role(WanNetwork(tiny_transformer(seed), TINY_TIMESTEPS), stage, FlowMapLoss({}, weight=torch.ones_like))
    return {"teacher": teacher}, lambda step: earlier.batch(stage.rows, generator(seed, step), DROPPED, **FLOW_MATCHING)


def build_flow_map(stage: Stage, seed: int, earlier: Earlier) -> Built:
    """The forward stage."""
    student = _role(earlier.network(stage.parent, seed), stage, earlier.forward(stage))
    return {"student": student}, earlier.draw(stage, seed)


def build_consistency(stage: Stage, seed: int, earlier: Earlier) -> Built:
    """Discrete consistency distillation, with the options that the baseline has on the plane."""
    student = _role(earlier.network(stage.parent, seed), stage, None, ema=CONSISTENCY_EMA)
    options = {"grid": 16, "solver": "heun", "weight": torch.ones_like, "adaptive": 0.5} | stage.options
    student.loss = ConsistencyLoss(earlier.velocity("teacher", stage.guidance), student.average, **options)
    return {"student": student}, earlier.draw(stage, seed, **FLOW_MATCHING)


def build_causal(stage: Stage, seed: int, earlier: Earlier) -> Built:
    """Teacher forcing: flow matching on data for the causal teacher, the forward stage with its velocity for others."""
    if stage.kind == "causal_teacher":
        loss, options = FlowMapLoss({}, weight=torch.ones_like), {"drop": DROPPED, **FLOW_MATCHING}
    else:
        loss, options = earlier.forward(stage, "causal_teacher"), {}
    network, whole = earlier.causal(stage.parent, seed), earlier.draw(stage, seed, **options)
    student = _role(network, stage, TeacherForced(loss))
    return {"student": student}, lambda step: cycle_context_lengths(whole(step), step, network)


def build_on_policy(stage: Stage, seed: int, earlier: Earlier) -> Built:
    """Distribution matching of whole clips, from a causal student chunk by chunk; beside it the parent's loss."""
    parent, options, simulation = STAGES[stage.parent], dict(stage.options), {}
    causal = stage.kind == "causal_on_policy"
    if causal:
        network, forward = earlier.causal(stage.parent, seed), TeacherForced(earlier.forward(parent, "causal_teacher"))
        gradient = options.pop("context_gradient", False)
        simulation["simulate"] = causal_backward_simulation(gradient, network.first, network.rest)
    else:
        network, forward = earlier.network(stage.parent, seed), earlier.forward(parent)
    student = _role(network, stage, None, betas=(0.0, 0.999))
    fake = _role(earlier.network("teacher"), stage, None, lr=FAKE_RATE * stage.lr, betas=(0.0, 0.999))
    real = earlier.velocity("teacher", stage.guidance)
    student.loss = OnPolicyLoss(real, fake.network, forward, **options, **simulation)
    fake.loss = FakeScoreLoss(student.network, **simulation)
    whole, shape = earlier.draw(stage, seed), earlier.latents.shape[1:]

    def draw(step):
        batch = cycle_context_lengths(whole(step), step, network) if causal else whole(step)
        return batch | draw_on_policy(shape, stage.rows, generator(seed, 4, step))

    return {"student": student, "fake": fake}, draw


def build_dense(stage: Stage, seed: int, earlier: Earlier) -> Built:
    """Flow matching on data, or the forward stage, of a dense network that puts out the clean clip."""
    options = {"two": TWO}
    if stage.kind == "dense":
        network, loss, share = earlier.network(stage.parent), earlier.forward(stage, stage.parent), 2 / 7
        loss.velocity = torch.autocast("cpu", torch.bfloat16)(loss.velocity)  # no difference of it is taken
        loss.weight, options = torch.ones_like, options | {"diagonal": 0.4, "end": 0.2}  # the first jump counts, too
    else:
        torch.manual_seed(seed)
        network = FromClean(Dense(256, 32, shape=earlier.latents.shape[1:], prompt=earlier.prompts.shape[1:]))
        loss, share = FlowMapLoss({}, weight=torch.ones_like), 3 / 4
        options |= FLOW_MATCHING | {"diagonal_time": "logit_normal"}  # most of motion is decided amid
    # each was stopped before its rate had fallen to zero, at these shares of the fall; its average is what is kept
    return {"dense": _role(network, stage, loss, ema=0.999, cosine=share)}, earlier.draw(stage, seed, **options)


def _role(network, stage, loss, lr=None, ema=0.99, **options):
    return Role(EvaluationCounter(network), loss, lr or stage.lr, warmup=50, ema=ema, clip=1.0, **options)


BUILDERS = {
    "teacher": build_teacher,
    "flow_map": build_flow_map,
    "consistency": build_consistency,
    "on_policy": build_on_policy,
    "causal_teacher": build_causal,
    "causal": build_causal,
    "causal_on_policy": build_on_policy,
    "dense_teacher": build_dense,
    "dense": build_dense,
}


def train_stage(name: str, seed: int, folder: str | Path, quiet: bool = False, position: int = 0) -> None:
    """Train one stage with one seed, and write it into `folder`, where its parents are, with its provenance."""
    torch.set_num_threads(2 if name in ALONE else 1)
    stage, path = STAGES[name], path_of(folder, name, seed)
    bar = {"desc": f"{name} {seed}", "position": position, "disable": quiet or None}
    start = time.perf_counter()
    if stage.kind == "codec":
        network, history, *counters = train_codec(stage.steps, seed, stage.lr, progress=bar)
    else:
        times = DENSE_CLIPS if stage.kind.startswith("dense") else 1
        if not latents_path(folder, times).exists():
            make_latents(folder, times)
        earlier = Earlier(folder, times)
        roles, draw = BUILDERS[stage.kind](stage, seed, earlier)
        history = train(roles, draw, stage.steps, progress=bar)
        network = next(iter(roles.values())).average.module.network
        counters = [counter for role in roles.values() for counter in (role.network, role.average.module)]
        counters += earlier.teachers
    cost = {
        "steps": stage.steps,
        "forwards": sum(counter.rows for counter in counters),
        "backwards": sum(counter.with_grad for counter in counters),
        "seconds": round(time.perf_counter() - start, 3),
    }
    provenance = {
        "command": "python -m minianyflow weights",
        "seeds": [seed],
        "stage": asdict(stage),
        "parent": _parent(folder, name, seed),
        "cost": cost,
        "losses": {kind: round(error, 5) for kind, error in history[-1].items()},
        "figures": {},
    }
    save_weights(path, network.state_dict(), describe(network) | provenance)


def train_all(folder: str | Path = "outputs/weights", workers: int = 2, quiet: bool = False) -> None:
    """Train every stage that `folder` does not have yet, after its parent; an interrupted run resumes.

    A stage with other settings or from another parent is trained again, latents of another codec are made again.
    """
    folder = Path(folder)
    if not _is_done(folder, "codec", 0):
        run_jobs({"codec": (train_stage, ("codec", 0, folder, quiet))}, workers)
    if not latents_path(folder).exists():
        make_latents(folder)
    jobs, after = {}, {}
    for name, stage in STAGES.items():  # parents stand before what starts from them
        for seed in stage.seeds:
            parent = stage.parent and (stage.parent, seed if seed in STAGES[stage.parent].seeds else 0)
            if parent in jobs or not _is_done(folder, name, seed):
                jobs[name, seed] = (train_stage, (name, seed, folder, quiet))
                after |= {(name, seed): parent} if parent in jobs else {}
    longest_first = sorted(jobs, key=lambda job: -STAGES[job[0]].steps)
    run_jobs({job: jobs[job] for job in longest_first}, workers, after)


def _is_done(folder, name, seed):
    """Whether this one is there, trained with today's settings from the parent that is there now."""
    path = path_of(folder, name, seed)
    provenance = read_weights(path, *KINDS)[2] if path.exists() else {}
    settings = json.loads(json.dumps(asdict(STAGES[name])))
    return provenance.get("stage") == settings and provenance.get("parent") == _parent(folder, name, seed)


def _parent(folder, name, seed):
    """A digest of the weights that a stage starts from."""
    parent = STAGES[name].parent
    return parent and _digest(path_of(folder, parent, seed))


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
