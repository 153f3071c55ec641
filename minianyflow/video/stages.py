"""Small video latents, from a codec to any-step students: every stage, and how all are trained in their order.

    codec        a tiny AutoencoderKLWan (codec.py)
    teacher      flow matching, bidirectional
    flow maps    from the teacher, by each objective of the plane; consistency, the baseline, from the same teacher
    on-policy    from a flow map; beside it the forward stage alone, continued at equal cost
    causal       from a flow map: teacher forcing, then on-policy, with and without gradient through the context

No mathematics stands here: objectives, backward simulation, samplers and the loop are those of the plane.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minianyflow.consistency import ConsistencyLoss
from minianyflow.flow_map import velocity
from minianyflow.guidance import guided
from minianyflow.networks.causal import CausalNetwork, causal_backward_simulation, causal_from
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
from minianyflow.video.codec_training import codec_cost, train_codec
from toy_data import blobs

WEIGHTS = Path(blobs.__file__).parent / "video"  # of the committed run
LATENTS = "latents.safetensors"
CLIPS = 16384  # encoded once, for all stages


@dataclass(frozen=True)
class Stage:
    """kind: how it trains (`BUILDERS`). parent: the stage that it starts from. steps, rows, lr: of the loop.

    options: of its loss. guidance: scale of its teacher's velocity, 1 is none. stream: the number of its stream of
    batches; what goes on from a student has another than that student. One student a seed; seed 0 of the parent where
    that has fewer.
    """

    kind: str
    parent: str = ""
    steps: int = 0
    rows: int = 128
    lr: float = 3e-3
    seeds: tuple[int, ...] = (0,)
    options: dict = field(default_factory=dict)
    stream: int = 1
    guidance: float = 1.0


THREE = (0, 1, 2)
ALONE = ("codec", "teacher")  # nothing else can be trained beside them: they get two cores
CONSISTENCY_EMA, FAKE_RATE = 0.95, 5.0
DROPPED = 0.1  # of a teacher's rows, that it may be guided
GUIDANCE = 2.0  # for all students: what they learn is then a better law than the teacher's own, see docs/video.md
FORWARD = {name: {"shares": shares, "adaptive": 0.5} for name, shares in FLOW_MAPS.items()}
EULERIAN = FORWARD["eulerian"]
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
    "causal_gradient": Stage(
        "causal_on_policy", "causal", 100, 64, 1e-4, (0,), {"context_gradient": True}, 3, GUIDANCE
    ),
    "causal_forward_only": Stage("causal", "causal", 227, options=EULERIAN, stream=6, guidance=GUIDANCE),
}


# What the stages train on


def sample_videos(count, source, frames):
    """Videos (count, frames, 16, 16) of bouncing blobs."""
    return blobs.sample(count, source, frames).video


def make_latents(folder):
    """The latents that every stage trains on and their numbers of balls, encoded once, kept in `folder`."""
    clips = blobs.sample(CLIPS, generator(100))
    latents = load_codec(folder / "codec-0.safetensors").encode(clips.video)
    with staging_folder(folder) as unfinished:
        save_file({"latents": latents, "balls": clips.balls}, unfinished / LATENTS, _made_from(folder))


def _made_from(folder):
    """What decides the latents, as their file says it: the codec that is there today, and how many clips."""
    return {"codec": _digest(folder / "codec-0.safetensors"), "clips": str(CLIPS)}


def _has_latents(folder):
    """Whether the latents are there, of the codec and as many clips as today."""
    if not (folder / LATENTS).exists():
        return False
    with safe_open(folder / LATENTS, "pt") as file:
        return file.metadata() == _made_from(folder)


class Latents:
    """Batches of latents and prompts. draw(step) of any role: the same batch for whoever asks.

    Rows drop their prompt with probability `drop` (then it is the null prompt). `pairs` goes to `draw_pairs`.
    """

    def __init__(self, folder):
        held = load_file(Path(folder) / LATENTS)
        self.latents, self.balls = held["latents"], held["balls"]
        self.prompts = TextEncoder()(["", *blobs.PROMPTS])  # (3, L, D); number 0 is the null prompt

    def batch(self, rows, source, drop=0.0, **pairs):
        """x, eps (rows, 5, 4, 4, 4), the pairs of times, and the prompts as the condition."""
        index = torch.randint(len(self.latents), (rows,), generator=source)
        dropped = torch.rand(rows, generator=source) < drop
        prompt = self.prompts[torch.where(dropped, 0, self.balls[index])]
        x = self.latents[index]
        eps = torch.randn(x.shape, generator=source)
        return {"x": x, "eps": eps, "condition": {"prompt": prompt}} | draw_pairs(rows, source, **pairs)


# How each kind trains: build(stage, seed, earlier) gives roles, the first of which is kept, and draw(step)


class Earlier:
    """What earlier stages left in a folder: to train on, to ask (counted), and the latents."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def network(self, name, seed=0):
        """A copy to train on."""
        return load_network(path_of(self.folder, name, seed)).requires_grad_(True)

    def causal(self, name, seed=0):
        """A copy to train on chunk by chunk, from a causal network or a bidirectional one."""
        network = self.network(name, seed)
        if isinstance(network, CausalNetwork):
            return network
        return CausalNetwork(causal_from(network.transformer), timesteps=network.timesteps)

    def velocity(self, name, guidance=1.0):
        """The velocity(z, t, **condition) of a teacher, guided away from the null prompt if `guidance` is above 1."""
        self.asked.append(EvaluationCounter(load_network(path_of(self.folder, name))))
        return guided(partial(velocity, self.asked[-1]), {"prompt": TextEncoder()([""])}, guidance)

    def forward(self, stage, teacher="teacher"):
        """The forward stage's loss with a teacher's velocity: why not that of data, see docs/video.md."""
        return FlowMapLoss(**{"delta": 5e-3} | stage.options, velocity=self.velocity(teacher, stage.guidance))


def build_teacher(stage, seed, earlier):
    """Flow matching on data; a tenth of the rows without their prompt."""
    data = Latents(earlier.folder)
    network = WanNetwork(tiny_transformer(seed), TINY_TIMESTEPS)
    teacher = _role(network, stage, FlowMapLoss({}, weight=torch.ones_like))
    return {"teacher": teacher}, lambda step: data.batch(
        stage.rows, generator(seed, step), DROPPED, diagonal=1.0, end=0.0
    )


def build_flow_map(stage, seed, earlier):
    """The forward stage."""
    data = Latents(earlier.folder)
    student = _role(earlier.network(stage.parent, seed), stage, earlier.forward(stage))
    return {"student": student}, lambda step: data.batch(stage.rows, generator(seed, stage.stream, step))


def build_consistency(stage, seed, earlier):
    """Discrete consistency distillation, with the options that the baseline has on the plane."""
    data = Latents(earlier.folder)
    student = _role(earlier.network(stage.parent, seed), stage, None, ema=CONSISTENCY_EMA)
    options = {"grid": 16, "solver": "heun", "weight": torch.ones_like, "adaptive": 0.5} | stage.options
    student.loss = ConsistencyLoss(earlier.velocity("teacher", stage.guidance), student.average, **options)
    return {"student": student}, lambda step: data.batch(
        stage.rows, generator(seed, stage.stream, step), diagonal=1.0, end=0.0
    )


def build_on_policy(stage, seed, earlier):
    """Backward simulation and distribution matching, with the parent's forward loss beside it."""
    student = earlier.network(stage.parent, seed)
    return _on_policy(stage, seed, earlier, student, earlier.forward(STAGES[stage.parent]), stage.options)


def build_causal_teacher(stage, seed, earlier):
    """Flow matching on data by teacher forcing, from the bidirectional teacher."""
    loss = FlowMapLoss({}, weight=torch.ones_like)
    return _teacher_forcing(stage, seed, earlier, loss, drop=DROPPED, diagonal=1.0, end=0.0)


def build_causal(stage, seed, earlier):
    """The forward stage by teacher forcing, with the velocity of the causal teacher."""
    return _teacher_forcing(stage, seed, earlier, earlier.forward(stage, "causal_teacher"))


def _teacher_forcing(stage, seed, earlier, loss, **pairs):
    data, network = Latents(earlier.folder), earlier.causal(stage.parent, seed)

    def draw(step):
        return cycle_context_lengths(
            data.batch(stage.rows, generator(seed, stage.stream, step), **pairs), step, network
        )

    return {"student": _role(network, stage, TeacherForced(loss))}, draw


def build_causal_on_policy(stage, seed, earlier):
    """Chunk by chunk from its own context; scores see the whole clip; teacher forcing beside it."""
    student = earlier.causal(stage.parent, seed)
    forward = TeacherForced(earlier.forward(STAGES[stage.parent], "causal_teacher"))
    options = dict(stage.options)
    simulate = causal_backward_simulation(options.pop("context_gradient", False), student.first, student.rest)
    cut = partial(cycle_context_lengths, network=student)
    return _on_policy(stage, seed, earlier, student, forward, options, cut, simulate=simulate)


def _on_policy(stage, seed, earlier, network, forward, options, cut=None, **how):
    data = Latents(earlier.folder)
    student = _role(network, stage, None, betas=(0.0, 0.999))
    fake = _role(earlier.network("teacher"), stage, None, lr=FAKE_RATE * stage.lr, betas=(0.0, 0.999))
    student.loss = OnPolicyLoss(earlier.velocity("teacher", stage.guidance), fake.network, forward, **options, **how)
    fake.loss = FakeScoreLoss(student.network, **how)

    def draw(step):
        batch = data.batch(stage.rows, generator(seed, stage.stream, step))
        rollouts = draw_on_policy(batch["x"].shape[1:], stage.rows, generator(seed, 4, step))
        return (cut(batch, step) if cut else batch) | rollouts

    return {"student": student, "fake": fake}, draw


def _role(network, stage, loss, lr=None, ema=0.99, **options):
    return Role(EvaluationCounter(network), loss, lr or stage.lr, warmup=50, ema=ema, clip=1.0, **options)


BUILDERS = {
    "teacher": build_teacher,
    "flow_map": build_flow_map,
    "consistency": build_consistency,
    "on_policy": build_on_policy,
    "causal_teacher": build_causal_teacher,
    "causal": build_causal,
    "causal_on_policy": build_causal_on_policy,
}


# One stage, and all of them


def path_of(folder, name, seed=0):
    """Where the weights of a stage are; seed 0 if it was trained with fewer seeds."""
    return Path(folder) / f"{name}-{seed if seed in STAGES[name].seeds else 0}.safetensors"


def train_stage(name, seed, folder, quiet=False, position=0):
    """Train one stage with one seed and keep it in `folder` with its provenance; it needs its parents there."""
    torch.set_num_threads(2 if name in ALONE else 1)
    stage, path = STAGES[name], path_of(folder, name, seed)
    bar = {"desc": f"{name} {seed}", "position": position, "disable": quiet or None}
    start = time.perf_counter()
    if stage.kind == "codec":
        network, history = train_codec(sample_videos, stage.steps, seed, stage.lr, progress=bar)
        counters = [codec_cost(stage.steps)]
    else:
        earlier = Earlier(folder)
        roles, draw = BUILDERS[stage.kind](stage, seed, earlier)
        history = train(roles, draw, stage.steps, progress=bar)
        network = next(iter(roles.values())).average.module.network
        counters = [each for role in roles.values() for each in (role.network, role.average.module)] + earlier.asked
    cost = {
        "steps": stage.steps,
        "forwards": sum(each.rows for each in counters),
        "backwards": sum(each.with_grad for each in counters),
        "seconds": round(time.perf_counter() - start, 1),
    }
    made = {"command": "python -m minianyflow weights", "seeds": [seed], "stage": asdict(stage)}
    made["parent"] = _parent(folder, name, seed)
    made |= {"cost": cost, "losses": {kind: round(error, 5) for kind, error in history[-1].items()}, "figures": {}}
    save_weights(path, network.state_dict(), describe(network) | made)


def train_all(folder="outputs/weights", workers=2, quiet=False):
    """Train every stage that `folder` does not have yet, each once its parent is there, `workers` at a time.

    Each is kept as soon as it is done: an interrupted run goes on from there. One that is there with other settings, or
    from another parent, is trained again; so are the latents of another codec made again.
    """
    folder = Path(folder)
    if not _is_done(folder, "codec", 0):
        run_jobs({"codec": (train_stage, ("codec", 0, folder, quiet))}, workers)
    if not _has_latents(folder):
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
    """Whether this one is there, trained with the settings of today from the parent that is there today."""
    path = path_of(folder, name, seed)
    if not path.exists():
        return False
    made = read_weights(path, *KINDS)[2]
    same = json.loads(json.dumps(asdict(STAGES[name])))
    return made.get("stage") == same and made.get("parent") == _parent(folder, name, seed)


def _parent(folder, name, seed):
    """A digest of the weights that a stage starts from."""
    parent = STAGES[name].parent
    return parent and _digest(path_of(folder, parent, seed))


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
