"""What a run of scripts/distill.py will take, before anything is rented: memory by part, FLOP, hours, money.

Two counts meet. The stage's own losses run, on their own draws, with stand-ins for the networks, which write down who
is asked what, for how many rows, and with or without gradient. What one such question costs is counted on the meta
device (costs.py), with two and three blocks: every further block costs what the third does.
"""

import contextlib
import importlib.util
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from minianyflow.causal import causal_mask, chunk_partition
from minianyflow.costs import Live, kept_pairs, measure
from minianyflow.errors import InputError
from minianyflow.gpus import GPUS, find_gpu
from minianyflow.install import ROOT
from minianyflow.on_policy import draw_on_policy
from minianyflow.pairs import generator
from minianyflow.roles import TARGETS, add_role
from minianyflow.runs import ROLLOUTS, Networks, at_work, draws
from minianyflow.shards import LatentShards
from minianyflow.training import part_of
from minianyflow.wan_shapes import CLIP, SHAPES, build_transformer, latent_shape

STEPS = 16  # whose draws are counted, unless told which
SPARE = 0.05  # of a GPU's memory, for what is not counted: CUDA's own, workspaces, fragments
SMALL = 2  # high and wide: the latents that stand-ins are asked about
ADAM = 2  # numbers that AdamW keeps a weight


class ShapeNetworks(Networks):
    """The networks of a run around transformers of `shape` that are built (build_transformer), not loaded."""

    def __init__(self, config, frames, shape, device="meta", **changes):
        self.shape, self.changes = shape, changes
        super().__init__(replace(config, student=None, teacher=None), frames, device)
        if self.base is not None and config.teacher:
            options = {"rank": config.rank, "alpha": config.alpha, "targets": TARGETS}
            with torch.device(device):
                add_role(self.base, "teacher", **options)
            self.config = replace(self.config, teacher=config.teacher)  # which then is there, and not loaded

    def trained(self, role, start=None):
        """As Networks has it, from no start."""
        with torch.device(self.device):  # where peft then makes new weights, too
            return super().trained(role)

    def _load(self, source, frozen=False):
        config, changes = self.config, dict(self.changes)
        if config.architecture == "causal":
            changes["full_chunk_limit"] = config.causal.full_chunks
        half = config.precision == "bf16" and (frozen or config.trained == "lora")
        dtype = torch.bfloat16 if half else torch.float32
        transformer = build_transformer(self.shape, config.architecture, self.device, dtype, **changes)
        empty = transformer.device.type == "meta"  # nothing runs there that would be faster compiled
        return at_work(replace(config, compiled=config.compiled and not empty), transformer)


# Who is asked what


@dataclass(frozen=True)
class Question:
    """To whom, for how many rows, with gradient or not, with gradient to the state or not; and what the state is.

    kind: "all" frames, "whole", "forced" (chunks at once, with the clean ones), "read" or "remember" (of a cache).
    before: frames that are known, `past` or in the cache. cache: which one is read.
    """

    role: str
    rows: int
    grad: bool
    moved: bool
    kind: str
    frames: int
    before: int = 0
    cache: int | None = None

    @property
    def costs(self):
        """What decides the cost of a row: that of a forward is the same with a backward after it."""
        grad = self.role != "teacher" and (self.grad or self.kind != "remember")
        return replace(self, rows=1, cache=None, grad=grad, moved=self.moved and self.grad)


class StandIn(nn.Module):
    """Takes a network's place in its loss: writes down what it is asked in `asked`, and answers without computing."""

    def __init__(self, role, asked, whole=False):
        super().__init__()
        self.role, self.asked, self.whole, self.caches = role, asked, whole, []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, z, t, r, prompt, clean=None, past=None, cache=None, whole=None, remember=False):
        """States of the shape of z, with a gradient where a network's would have one; or something like a cache."""
        before, which = 0, None
        kind = "whole" if self.whole or whole is not None else "all"
        if clean is not None:
            kind, before = "forced", 0 if past is None else past.shape[1]
        if cache is not None:
            kind, before = "read", cache[0][0].shape[3] if cache else 0
        if remember:
            kind = "remember"
        grad = torch.is_grad_enabled() and self.weight.requires_grad
        made = torch.zeros(len(z), 1, 1, z.shape[1], 1) + self.weight if remember else z + self.weight
        if remember or cache:
            seen = made if remember else cache[0][0]
            which = id(seen)
            self.caches.append(seen)  # or another could get its number
        self.asked.append(Question(self.role, len(z), grad, z.requires_grad, kind, z.shape[1], before, which))
        return ((made, made),) if remember else made


class StandIns:
    """In place of runs.Networks, for the functions of distill.py that make the roles of a stage."""

    def __init__(self):
        self.asked = []

    def trained(self, role, start=None):
        """As Networks."""
        return StandIn(role, self.asked, whole=role == "fake")

    def teacher(self, whole=False):
        """As Networks."""
        return StandIn("teacher", self.asked, whole).requires_grad_(False)


class NoShards(LatentShards):
    """Draws as LatentShards does, but all samples are zeros."""

    def __init__(self, shape, length):
        self.shape, self.null = shape, torch.ones(1, length, 1)

    def __len__(self):
        return 1 << 20

    def _order(self, seed, epoch):
        return range(len(self))

    def rows(self, indices):
        """Zeros, as many as asked for."""
        count = len(list(indices))
        return torch.zeros(count, *self.shape), torch.zeros(count, *self.null.shape[1:])


def stages():
    """The functions of scripts/distill.py that make the roles of a stage: {stage: function}."""
    place = importlib.util.spec_from_file_location("distill", ROOT / "scripts/distill.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module.STAGES


@dataclass(frozen=True)
class Part:
    """What one process does at once: the questions of one role's loss."""

    step: int
    process: int
    role: str
    asked: tuple


def trace(config, shape, length, steps, processes=1, exact=False):
    """Every Part of these steps, in order, and bytes beside networks, {role: at most}.

    shape: (F, C, H, W) of a clip; length: numbers of a prompt. exact: rollouts are those of these very steps, not
    others like them, which takes as long as drawing their noise.
    """
    numbers = shape[2] * shape[3] / SMALL**2  # in place of each one there is here
    data = NoShards((*shape[:2], SMALL, SMALL), max(1, round(length / numbers)))
    networks = StandIns()
    quiet = replace(config, student=None, teacher=None)
    roles = stages()[config.stage](quiet, networks, {"prompt": data.null})
    draw, parts, beside = draws(config, data), [], Counter()
    for step in steps:
        batch = draw(step)
        if exact and config.stage == "on_policy":
            source = generator(config.seed, ROLLOUTS, step)  # the noise of a clip's size comes first
            drawn = draw_on_policy(shape, config.batch, source, tuple(config.on_policy.rollouts))
            batch |= {name: drawn[name] for name in ("lengths", "step")}
        for name, role in roles.items():
            for index in range(processes * config.accumulate):
                networks.asked.clear()
                part = part_of(batch, index, processes * config.accumulate)
                given = list(_tensors(part))
                live = Live([*given, data.null, *role.network.parameters()])
                with live if step == steps[0] else contextlib.nullcontext():  # it is slow, and all steps are alike
                    losses, _ = role.loss(role.network, part)
                there = live.now + sum(each.nbytes for each in given)  # when the backward begins
                losses.mean().backward()
                beside[name] = max(beside[name], numbers * there)
                parts.append(Part(step, index // config.accumulate, name, tuple(networks.asked)))
    return parts, beside


def _tensors(batch):
    for value in batch.values():
        yield from value.values() if isinstance(value, dict) else [value]


# What an answer costs


class Prices:
    """Cost of a Question, of a row of it, for a configuration and a clip; each counted once."""

    def __init__(self, config, shape, clip_shape, length, text_dim):
        self.config, self.clip, self.prompt = config, clip_shape, (length, text_dim)
        self.layers, self.known, self.caches = shape["num_layers"], {}, {}
        self.networks = [self._build(shape, count) for count in (2, 3)] if self.layers > 2 else []
        self.networks = self.networks or [self._build(shape, self.layers)]

    def _build(self, shape, layers):
        networks = ShapeNetworks(self.config, self.clip[0], shape, num_layers=layers)
        made = {"student": networks.trained("student")}
        if self.config.stage == "on_policy":
            made["fake"] = networks.trained("fake")
        made["teacher"] = networks.teacher(whole=self.config.stage == "on_policy")
        return {role: each.network for role, each in made.items()}

    def __call__(self, question):
        """Of all its rows."""
        one = self.one(question)
        if question.rows == 1:
            return one
        return one * question.rows + self.fixed(question) * (1 - question.rows)

    def fixed(self, question):
        """What does not grow with the rows, like the sines and cosines of positions."""
        key = question.costs
        if (key, "fixed") not in self.known:
            one, two = (self._measure(self.networks[0][key.role], replace(key, rows=rows)) for rows in (1, 2))
            self.known[key, "fixed"] = one * 2 + two * -1
        return self.known[key, "fixed"]

    def one(self, question):
        """Of one row."""
        key = question.costs
        if key not in self.known:
            fewer, *more = [self._measure(networks[key.role], key) for networks in self.networks]
            cost = fewer
            if more:
                cost = fewer + (more[0] + fewer * -1) * (self.layers - 2)
                cost = replace(cost, transient=more[0].transient, returning=more[0].returning)
            self.known[key] = cost
        return self.known[key]

    def _measure(self, network, question):
        one = torch.device("meta")
        z = torch.empty(question.rows, question.frames, *self.clip[1:], device=one, requires_grad=question.moved)
        prompt, t = torch.empty(question.rows, *self.prompt, device=one), torch.empty(question.rows, device=one)
        inputs = {"remember": (z, None, None, prompt)}.get(question.kind, (z, t, t, prompt))
        return measure(network, inputs, self._condition(network, question, z), question.grad, self._pairs(question))

    def _condition(self, network, question, z):
        known = torch.empty(len(z), question.before, *z.shape[2:], device="meta")
        if question.kind == "forced":
            return {"clean": torch.empty_like(z)} | ({"past": known} if question.before else {})
        if question.kind == "read":
            key = (network, question.before, len(z))
            if key not in self.caches:
                prompt = torch.empty(len(z), *self.prompt, device="meta")
                with torch.no_grad():
                    self.caches[key] = network(known, None, None, prompt, remember=True) if question.before else ()
            return {"cache": self.caches[key]}
        if question.kind == "remember":
            return {"remember": True}
        single = question.kind == "whole" and self.config.architecture == "causal"
        return {"whole": torch.empty(len(z))} if single else {}

    def _pairs(self, question):
        if question.kind not in ("forced", "remember"):
            return None
        chunks, (_, _, high, wide) = self.config.causal, self.clip
        partition = chunk_partition(question.before + question.frames, chunks.first, chunks.rest, True)
        full, coarse = (high // 2) * (wide // 2), (high // 4) * (wide // 4)
        clean, mode = (True, "train") if question.kind == "forced" else (False, "cache")
        causal_mask(partition, full, coarse, chunks.full_chunks, clean, mode, torch.device("meta"))  # made, and kept
        return kept_pairs(partition, full, coarse, chunks.full_chunks, clean, mode)


# Bytes that stay, and the plan


def resident(config, shape, frames, processes=1, sharded=False):
    """Bytes on one GPU that are there all the time, by part; and of the gradients of each role.

    With full weights "base weights" is the frozen teacher. sharded: FSDP2, else DDP where there are several processes.
    """
    layers = shape["num_layers"]
    fewer, *more = [_weights(config, shape, frames, count) for count in ((2, 3) if layers > 2 else (layers,))]
    held = {n: v + (layers - 2) * (more[0][n] - v) if more else v for n, v in fewer.items()}
    roles = ("student", "fake") if config.stage == "on_policy" else ("student",)
    learns = {role: held[f"{role} learns"] for role in roles}
    trained = sum(held[role] for role in roles)
    share = 1 / processes if sharded else 1
    parts = {
        "base weights": held["base"],
        "adapters" if config.trained == "lora" else "trained weights": trained + held["teacher"],
        "averages": share * held["student"],
        "optimiser": share * ADAM * sum(learns.values()),
    }
    if processes > 1:  # beside whole weights: buckets of DDP; of FSDP2 the shards, and what a gradient is reduced in
        parts["several GPUs"] = trained * share + max(learns.values()) if sharded else sum(learns.values())
    return parts, learns


def _weights(config, shape, frames, layers):
    networks = ShapeNetworks(config, frames, shape, num_layers=layers)
    count = Counter({"teacher": 0, "base": 0})
    for role in ("student", "fake")[: 1 + (config.stage == "on_policy")]:
        weights = list(networks.trained(role).parameters())
        count[role] = sum(each.nbytes for each in weights)
        count[f"{role} learns"] = sum(each.nbytes for each in weights if each.requires_grad)
    if config.trained == "lora":
        teacher = networks.teacher() if config.teacher else None
        count["teacher"] = sum(each.nbytes for each in teacher.parameters()) if teacher else 0
        plain = build_transformer(shape, config.architecture, dtype=networks.base.dtype, num_layers=layers)
        count["base"] = sum(each.nbytes for each in plain.parameters())
    elif config.stage == "on_policy" or config.velocity == "base":
        count["base"] = sum(each.nbytes for each in networks.teacher().parameters())
    return count


@dataclass(frozen=True)
class Plan:
    """What a run takes. memory: bytes of one GPU by part, at the moment when they are most.

    flop: of one GPU in one step, of the model alone; flop_with_recompute: what is really done with checkpointing;
    slowest: how much longer than the mean process the last one takes. evaluations: {role: (forwards, backwards)} a
    sample. roles: FLOP by role. short: what to change where it does not fit, {change: peak bytes}.
    """

    config: object
    gpu: object
    gpus: int
    sharded: bool
    memory: dict
    flop: float
    flop_with_recompute: float
    slowest: float
    evaluations: dict
    roles: dict
    outside: dict
    short: dict = field(default_factory=dict)

    @property
    def peak(self):
        """Bytes on one GPU."""
        return sum(self.memory.values())

    @property
    def fits(self):
        """Whether this GPU has them, with SPARE left."""
        return self.peak <= (1 - SPARE) * self.gpu.memory

    def seconds(self, share=0.5):
        """Of one step, where model FLOP reach `share` of the GPU's rate."""
        return self.slowest * self.flop / (share * self.gpu.rate)

    def hours(self, share=0.5):
        """Of all of the run's steps."""
        return self.seconds(share) * self.config.steps / 3600

    def money(self, price, share=0.5):
        """For all GPUs, at `price` an hour of one."""
        return price * self.gpus * self.hours(share)


_PRICES = {}


def prices_of(config, shape, clip_shape, length, text_dim):
    """The Prices of a configuration: kept, as what they cost does not depend on most of it."""
    kept = [
        getattr(config, name) for name in ("stage", "architecture", "trained", "checkpointing", "precision", "rank")
    ]
    policy = (bool(config.teacher), config.on_policy.forward_weight > 0, config.on_policy.context_gradient)
    policy += (repr(config.causal), config.velocity)
    key = (*kept, *policy, json.dumps(shape), clip_shape, length, text_dim)
    if key not in _PRICES:
        _PRICES[key] = Prices(config, shape, clip_shape, length, text_dim)
    return _PRICES[key]


def plan_run(config, clip=None, gpu=None, gpus=1, steps=None, sharded=False, advise=True):
    """The Plan of a configuration. clip: as wan_shapes.CLIP; None: that of its data, if there are any, or CLIP.

    gpu: a Gpu, or a name. steps: those whose draws are counted, these very ones; None: STEPS steps like them. sharded:
    FSDP2 where there are several GPUs, else DDP. advise: whether what would fit is worked out where this does not.
    Raises InputError for a base that is not known, a batch that does not divide.
    """
    if config.trained == "full" and config.precision == "bf16":
        raise InputError(
            "trained=full with precision=bf16 cannot be planned: it casts weights as it goes, which is not counted "
            "here; plan precision=fp32, which takes more, or trained=lora"
        )
    shape = shape_of(config.base)
    clip_shape, length = _clip(config, clip)
    gpu = gpu if hasattr(gpu, "rate") else find_gpu(gpu or "h200")
    if gpus < 1 or config.batch % (gpus * config.accumulate):
        raise InputError(
            f"batch={config.batch} on {gpus} GPUs with accumulate={config.accumulate}; expected parts of equal size: "
            "change one of them"
        )
    prices = prices_of(config, shape, clip_shape, length, shape["text_dim"])
    exact, steps = steps is not None, list(range(STEPS) if steps is None else steps)
    plan = _plan(config, prices, shape, gpu, gpus, steps, sharded, exact)
    return replace(plan, short=advice(plan, prices, shape, steps)) if advise and not plan.fits else plan


def _plan(config, prices, shape, gpu, gpus, steps, sharded=False, exact=False):
    numbers = prices.prompt[0] * prices.prompt[1]
    parts, beside = trace(config, prices.clip, numbers, steps, gpus, exact)
    kept, learns = resident(config, shape, prices.clip[0], gpus, sharded)
    every = (_memory(config, prices, part, learns[part.role]) | {"batch": beside[part.role]} for part in parts)
    memory = max(every, key=lambda each: sum(each.values()))
    work, slow = Counter(), Counter()
    evaluations, roles = {}, Counter()
    for part in parts:
        for question in part.asked:
            cost = prices(question)
            flop = cost.forward + question.grad * cost.backward
            work["model"] += flop
            work["done"] += flop + question.grad * cost.again
            slow[part.step, part.process] += flop
            roles[question.role] += flop
            rows = evaluations.setdefault(question.role, [0, 0])
            rows[0] += question.rows
            rows[1] += question.rows * question.grad
    count = len(steps)
    last = sum(max(v for (step, _), v in slow.items() if step == one) for one in {step for step, _ in slow})
    samples = count * config.batch
    return Plan(
        config,
        gpu,
        gpus,
        sharded,
        kept | memory,
        work["model"] / count / gpus,
        work["done"] / count / gpus,
        last * gpus / work["model"],
        {role: tuple(each / samples for each in rows) for role, rows in evaluations.items()},
        {role: flop / count / gpus for role, flop in roles.items()},
        outside(),
    )


def _memory(config, prices, part, gradients):
    """Bytes that come and go in a part, by what holds them, at the moment when they are most."""
    held, caches, moments = [], {}, []
    later = gradients if config.accumulate > 1 else 0
    for question in part.asked:
        cost = prices(question)
        mine = _cache(prices, question)
        alive = {**caches, **({question.cache: mine} if mine else {})}
        moments.append((held[:], alive, cost.transient + (cost.saved if question.grad else 0), later))
        if question.grad:
            held.append(cost.saved)
            if mine and config.checkpointing:  # what is computed again reads them again
                caches[question.cache] = mine
    # blocks that are computed again are let go one by one while their gradients come: a little more than there is
    later = gradients if config.accumulate > 1 or config.checkpointing else 0
    answered = [question for question in part.asked if question.grad]
    for index in reversed(range(len(answered))):
        returning = prices(answered[index]).returning
        moments.append((held[: index + 1], caches, returning, later))
        later = gradients
        moments.append((held[:index], caches, returning, gradients))  # its end: all gradients, of it nothing kept
    kept, alive, passing, there = max(moments, key=lambda each: sum(each[0]) + sum(each[1].values()) + sum(each[2:]))
    rollouts = config.stage == "on_policy" and part.role == "student"
    jumps = len(kept) - (config.on_policy.forward_weight > 0) if rollouts else 0
    again = "one block, computed again" if config.checkpointing else "in passing"
    return {
        "gradients": there,
        f"activations kept{' at blocks' * config.checkpointing}": sum(kept[jumps:]),
        "rollout jumps kept": sum(kept[:jumps]),
        f"activations {again}": passing,
        "causal cache": sum(alive.values()),
    }


def _cache(prices, question):
    """Bytes of the cache that a question makes or reads."""
    if question.cache is None:
        return 0
    frames = question.frames if question.kind == "remember" else question.before
    return prices(Question("student", question.rows, False, False, "remember", frames)).cache


@lru_cache
def outside():
    """Bytes of what is not loaded in training: the text encoder in bfloat16 and the VAE in float32, Wan2.1's."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        text = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
        vae = AutoencoderKLWan()
    count = {"text encoder, bfloat16": 2 * sum(each.numel() for each in text.parameters())}
    return count | {"VAE, float32": 4 * sum(each.numel() for each in vae.parameters())}


UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


# What a configuration says of sizes


HUB = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "14b",
    "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers": "1.3b",
    "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers": "14b",
    "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers": "1.3b",
    "nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers": "14b",
}


def shape_of(base):
    """The arguments of the transformer in `base`: a known name on the hub, or a folder with its config.json."""
    folder = Path(base)
    if not folder.is_dir():
        if base in HUB:
            return SHAPES[HUB[base]]
        raise InputError(f"the size of {base} is not known here; expected a folder of it, or one of {', '.join(HUB)}")
    for path in (folder / "transformer" / "config.json", folder / "config.json"):
        if path.is_file():
            break
    else:
        raise InputError(f"no transformer/config.json in {base}; expected a pipeline folder, or a transformer's own")
    try:
        said = json.loads(path.read_text())
        shape = {name: said.get(name, default) for name, default in SHAPES["14b"].items()}
        if not all(isinstance(value, int) for name, value in shape.items() if name.startswith("num_")):
            raise ValueError("no sizes in it")
    except (OSError, ValueError, AttributeError) as problem:
        raise InputError(f"{path} does not describe a transformer ({problem}); fetch or make it again") from None
    return shape


def _clip(config, clip):
    if clip is None and Path(config.data).is_dir():
        data = LatentShards(config.data)
        return tuple(data.shape), data.null.shape[1]
    clip = CLIP | (clip or {})
    return latent_shape(clip["frames"], clip["height"], clip["width"]), clip["length"]


# What to change


def advice(plan, prices, shape, steps):
    """{change: bytes of the peak} where a plan does not fit, in order of what they cost, until one does.

    Checkpointing and fewer clips at once add up; the others are tried one by one on top of both. That a lower rank
    makes activations a little smaller is not counted.
    """
    found, config, gpus = {}, plan.config, plan.gpus

    def fits(change, config, gpus=gpus, sharded=plan.sharded):
        each = _plan(config, prices, shape, plan.gpu, gpus, steps, sharded)
        found[change] = each.peak
        return each.fits

    if not config.checkpointing:
        config = replace(config, checkpointing=True)
        prices = prices_of(config, shape, prices.clip, *prices.prompt)
        if fits("checkpointing=true", config):
            return found
    most = config.batch // gpus
    if config.accumulate < most:
        if fits(f"accumulate={most}", replace(config, accumulate=most)):
            fewer = [n for n in range(config.accumulate + 1, most) if config.batch % (n * gpus) == 0]
            any(fits(f"accumulate={n}", replace(config, accumulate=n)) for n in fewer)
            return found
        config = replace(config, accumulate=most)
    for rank in (128, 64, 32) if config.trained == "lora" else ():
        if rank < config.rank and fits(f"rank={rank}", replace(config, rank=rank, alpha=rank)):
            return found
    if gpus < 8 and config.batch % 8 == 0:
        spread = replace(config, accumulate=config.batch // 8)
        if fits("8 GPUs, eight_gpus_fsdp2.yaml", spread, 8, True):
            return found
    alone = _plan(config, prices, shape, plan.gpu, gpus, steps, plan.sharded).peak
    larger = sorted((gpu for gpu in GPUS.values() if gpu.memory > plan.gpu.memory), key=lambda gpu: gpu.memory)
    enough = next((gpu.name for gpu in larger if alone <= (1 - SPARE) * gpu.memory), None)
    found[f"--gpu {enough}" if enough else "no GPU in the table is large enough for one clip at a time"] = alone
    return found
