"""Small video latents, from a codec to any-step students: every stage, and how all are trained in their order.

    codec        a tiny AutoencoderKLWan (codec.py)
    teacher      flow matching, bidirectional
    flow maps    from the teacher, by each objective of the plane; consistency, the baseline, from the same teacher
    on-policy    from a flow map; beside it the forward stage alone, continued at equal cost
    causal       from a flow map: teacher forcing, then on-policy, with and without gradient through the context

No mathematics stands here: objectives, backward simulation, samplers and the loop are those of the plane.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from minianyflow.causal import CausalNetwork, causal_backward_simulation, causal_from, chunk_partition
from minianyflow.codec import train_codec
from minianyflow.consistency import ConsistencyLoss
from minianyflow.flow_map import velocity
from minianyflow.networks import EvaluationCounter
from minianyflow.objectives import FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, backward_simulation, draw_on_policy
from minianyflow.pairs import draw_pairs, generator
from minianyflow.running import run_jobs, staged
from minianyflow.training import Role, train
from minianyflow.wan import TextEncoder, WanNetwork, tiny_transformer
from minianyflow.weights import KINDS, describe, load_codec, load_network, read_weights, save_weights
from toy_data import blobs

WEIGHTS = Path(blobs.__file__).parent / "video"  # of the committed run
CLIPS = 16384  # encoded once, for all stages
MIXED = {"eulerian": 0.5, "semigroup": 0.5}


@dataclass(frozen=True)
class Stage:
    """kind: how it trains (`BUILDERS`). parent: the stage that it starts from. steps, rows, lr: of the loop.

    options: of its loss. One student a seed; seed 0 of the parent where that has fewer.
    """

    kind: str
    parent: str = ""
    steps: int = 0
    rows: int = 128
    lr: float = 2e-3
    seeds: tuple[int, ...] = (0,)
    options: dict = field(default_factory=dict)


THREE = (0, 1, 2)
CONSISTENCY_EMA, FAKE_RATE = 0.95, 2.0
STAGES = {
    "codec": Stage("codec", steps=1000, lr=6e-3),
    "teacher": Stage("teacher", "codec", 3500, lr=6e-3),
    "eulerian": Stage("flow_map", "teacher", 800, options={"shares": {"eulerian": 1.0}}),
    "lagrangian": Stage("flow_map", "teacher", 800, options={"shares": {"lagrangian": 1.0}}),
    "semigroup": Stage("flow_map", "teacher", 800, options={"shares": {"semigroup": 1.0}}),
    "mixed": Stage("flow_map", "teacher", 800, seeds=THREE, options={"shares": MIXED}),
    "consistency": Stage("consistency", "teacher", 800, seeds=THREE),
    "on_policy": Stage("on_policy", "mixed", 200, 64, 3e-4, THREE),
    "forward_only": Stage("flow_map", "mixed", 800, seeds=THREE, options={"shares": MIXED}),
    "causal": Stage("causal", "mixed", 1000, seeds=THREE, options={"shares": MIXED}),
    "causal_on_policy": Stage("causal_on_policy", "causal", 100, 64, 3e-4, THREE),
    "causal_gradient": Stage("causal_on_policy", "causal", 100, 64, 3e-4, options={"context_gradient": True}),
    "causal_forward_only": Stage("causal", "causal", 800, seeds=THREE, options={"shares": MIXED}),
}


# What the stages train on


def sample_videos(count, source, frames):
    """Videos (count, frames, 16, 16) of bouncing blobs."""
    return blobs.sample(count, source, frames).video


def make_latents(folder):
    """The latents that every stage trains on and their numbers of balls, encoded once, kept in `folder`."""
    clips = blobs.sample(CLIPS, generator(100))
    latents = load_codec(folder / "codec-0.safetensors").encode(clips.video)
    with staged(folder) as unfinished:
        save_file({"latents": latents, "balls": clips.balls}, unfinished / "latents.st")


class Latents:
    """Batches of latents and prompts. draw(step) of any role: the same batch for whoever asks.

    Rows drop their prompt with probability `drop` (then it is the null prompt). `pairs` goes to `draw_pairs`.
    """

    def __init__(self, folder):
        held = load_file(Path(folder) / "latents.st")
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


def in_chunks(batch, step, network):
    """The part of a batch of whole clips that teacher forcing trains on at `step`: cut after each chunk in turn.

    The frames that the network sees at full resolution are x, and, as clean `context`, `clean`; older ones are `past`.
    """
    partition = chunk_partition(batch["x"].shape[1], network.first, network.rest)
    full = min(network.transformer.config.full_chunk_limit, len(partition))
    chunks = len(partition) - step % (len(partition) - full + 1)  # step 0 has all, and trains every weight
    old, end = sum(partition[: chunks - full]), sum(partition[:chunks])
    clean, past = batch["x"][:, old:end], batch["x"][:, :old]
    context = {"clean": clean} | ({"past": past} if old else {})
    return batch | {"x": clean, "eps": batch["eps"][:, old:end], "context": context}


@dataclass
class TeacherForced:
    """A loss whose network sees clean earlier chunks: the batch's `context` joins its condition."""

    loss: FlowMapLoss

    def __call__(self, u, batch):
        """As the loss."""
        return self.loss(u, batch | {"condition": batch["condition"] | batch["context"]})


# How each kind trains: build(stage, seed, folder, teacher) gives roles, the first of which is kept, and draw(step)


def build_teacher(stage, seed, folder, teacher):
    """Flow matching on data; a tenth of the rows without their prompt."""
    data = Latents(folder)
    teacher = _role(WanNetwork(tiny_transformer(seed)), stage, FlowMapLoss({}, weight=torch.ones_like))
    return {"teacher": teacher}, lambda step: data.batch(stage.rows, generator(seed, step), 0.1, diagonal=1.0, end=0.0)


def build_flow_map(stage, seed, folder, teacher):
    """The forward stage."""
    data = Latents(folder)
    student = _role(_network(folder, stage.parent, seed), stage, _forward(stage, teacher))
    return {"student": student}, lambda step: data.batch(stage.rows, generator(seed, 1, step))


def build_consistency(stage, seed, folder, teacher):
    """Discrete consistency distillation, with the options that the baseline has on the plane."""
    data = Latents(folder)
    student = _role(_network(folder, stage.parent, seed), stage, None, ema=CONSISTENCY_EMA)
    options = {"grid": 16, "solver": "heun", "weight": torch.ones_like, "adaptive": 0.5} | stage.options
    student.loss = ConsistencyLoss(partial(velocity, teacher), student.average, **options)
    return {"student": student}, lambda step: data.batch(stage.rows, generator(seed, 1, step), diagonal=1.0, end=0.0)


def build_on_policy(stage, seed, folder, teacher):
    """Backward simulation and distribution matching, with the parent's forward loss beside it."""
    return _on_policy(stage, seed, folder, teacher, _forward(STAGES[stage.parent], teacher), lambda batch, step: batch)


def build_causal(stage, seed, folder, teacher):
    """Teacher forcing: the forward stage on clips in chunks, from a bidirectional flow map or a causal one."""
    data, network = Latents(folder), _causal(folder, stage.parent, seed)
    student = _role(network, stage, TeacherForced(_forward(stage, teacher)))
    return {"student": student}, lambda step: in_chunks(data.batch(stage.rows, generator(seed, 2, step)), step, network)


def build_causal_on_policy(stage, seed, folder, teacher):
    """Chunk by chunk from its own context; scores see the whole clip; teacher forcing beside it."""
    network = _causal(folder, stage.parent, seed)
    forward = TeacherForced(_forward(STAGES[stage.parent], teacher))
    simulate = causal_backward_simulation(stage.options.get("context_gradient", False), network.first, network.rest)
    return _on_policy(
        stage, seed, folder, teacher, forward, lambda batch, step: in_chunks(batch, step, network), simulate
    )


def _on_policy(stage, seed, folder, teacher, forward, cut, simulate=backward_simulation):
    data = Latents(folder)
    network = _causal if isinstance(forward, TeacherForced) else _network
    student = _role(network(folder, stage.parent, seed), stage, None, betas=(0.0, 0.999))
    fake = _role(_network(folder, "teacher"), stage, None, lr=FAKE_RATE * stage.lr, betas=(0.0, 0.999))
    student.loss = OnPolicyLoss(partial(velocity, teacher), fake.network, forward, simulate=simulate)
    fake.loss = FakeScoreLoss(student.network, simulate=simulate)

    def draw(step):
        batch, source = data.batch(stage.rows, generator(seed, 3, step)), generator(seed, 4, step)
        return cut(batch, step) | draw_on_policy(batch["x"].shape[1:], stage.rows, source)

    return {"student": student, "fake": fake}, draw


def _role(network, stage, loss, lr=None, ema=0.99, **options):
    return Role(EvaluationCounter(network), loss, lr or stage.lr, warmup=50, ema=ema, clip=1.0, **options)


def _network(folder, name, seed=0):
    """What an earlier stage trained, to train on."""
    return load_network(path_of(folder, name, seed)).requires_grad_(True)


def _causal(folder, name, seed):
    network = _network(folder, name, seed)
    if isinstance(network, CausalNetwork):
        return network
    return CausalNetwork(causal_from(network.transformer), timesteps=network.timesteps)


def _forward(stage, teacher):
    """The forward stage's loss. Velocities are those of data, whose mistakes nobody has to unlearn, unless asked."""
    options = {"adaptive": 0.0, "delta": 5e-3} | stage.options
    taught = options.pop("taught", "lagrangian" in stage.options["shares"])
    return FlowMapLoss(**options, velocity=partial(velocity, teacher) if taught else None)


BUILDERS = {
    "teacher": build_teacher,
    "flow_map": build_flow_map,
    "consistency": build_consistency,
    "on_policy": build_on_policy,
    "causal": build_causal,
    "causal_on_policy": build_causal_on_policy,
}


# One stage, and all of them


def path_of(folder, name, seed=0):
    """Where the weights of a stage are; seed 0 if it was trained with fewer seeds."""
    return Path(folder) / f"{name}-{seed if seed in STAGES[name].seeds else 0}.safetensors"


def train_stage(name, seed, folder, quiet=False, position=0):
    """Train one stage with one seed and keep it in `folder` with its provenance; it needs its parents there."""
    torch.set_num_threads(1)
    stage, path = STAGES[name], path_of(folder, name, seed)
    bar = {"desc": f"{name} {seed}", "position": position, "disable": quiet or None}
    accelerator, start = Accelerator(cpu=True), time.perf_counter()
    if stage.kind == "codec":
        network, history = train_codec(
            sample_videos, stage.steps, seed, stage.lr, accelerator=accelerator, progress=bar
        )
        counters = []
    else:
        teacher = None if stage.kind == "teacher" else EvaluationCounter(load_network(path_of(folder, "teacher")))
        roles, draw = BUILDERS[stage.kind](stage, seed, folder, teacher)
        history = train(roles, draw, stage.steps, accelerator=accelerator, progress=bar)
        network = next(iter(roles.values())).average.module.network
        counters = [each for role in roles.values() for each in (role.network, role.average.module)]
        counters += [teacher] if teacher else []
    cost = {
        "steps": stage.steps,
        "forwards": sum(each.rows for each in counters),
        "backwards": sum(each.with_grad for each in counters),
        "seconds": round(time.perf_counter() - start, 1),
    }
    made = {"command": f"python -m minianyflow weights --only {name}", "seeds": [seed], "stage": asdict(stage)}
    made |= {"cost": cost, "losses": {kind: round(error, 5) for kind, error in history[-1].items()}, "figures": {}}
    save_weights(path, network.state_dict(), describe(network) | made)
    if stage.kind == "codec":
        make_latents(folder)


def train_all(folder="outputs/weights", workers=2, quiet=False):
    """Train every stage that `folder` does not have yet, parents first, `workers` at a time, one core each.

    A stage is kept as soon as it is done: an interrupted run goes on from there. One that is there with other settings
    is trained again, and what came from it.
    """
    folder = Path(folder)
    done = {name for name in STAGES if _is_done(folder, name)}
    for names in _waves():
        done -= {name for name in names if STAGES[name].parent and STAGES[name].parent not in done}
        missing = [name for name in names if name not in done]
        arguments = {(name, seed): (name, seed, folder, quiet) for name in missing for seed in STAGES[name].seeds}
        run_jobs({job: (train_stage, each) for job, each in arguments.items()}, workers)


def _waves():
    """The names of the stages, those that need no other first, then those that need these, and so on."""
    waves, left = [], dict(STAGES)
    while left:
        waves.append([name for name, stage in left.items() if stage.parent not in left])
        left = {name: stage for name, stage in left.items() if name not in waves[-1]}
    return waves


def _is_done(folder, name):
    """Whether all seeds of a stage are there, trained with the settings of today."""
    paths = [path_of(folder, name, seed) for seed in STAGES[name].seeds]
    same = json.loads(json.dumps(asdict(STAGES[name])))
    return all(path.exists() and read_weights(path, *KINDS)[2].get("stage") == same for path in paths)
