"""What a run of scripts/distill.py will take, before anything is rented: memory by part, FLOP, hours, money.

Two counts meet: who is asked what in a step (questions.py), and what an answer costs (prices.py).
"""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from minianyflow.planner.call_costs import ShapeNetworks, prices_of
from minianyflow.planner.forward_calls import Question, trace
from minianyflow.planner.gpus import GPUS, find_gpu
from minianyflow.support.errors import InputError
from minianyflow.wan.data.shards import LatentShards
from minianyflow.wan.data.videos import WAN_CLIP
from minianyflow.wan.shapes import SHAPES, build_transformer, latent_shape

STEPS = 16  # whose draws are counted, unless told which
SPARE = 0.05  # of a GPU's memory, for what is not counted: CUDA's own, workspaces, fragments
ADAM = 2  # numbers that AdamW keeps a weight


# Bytes that stay


def resident(config, shape, frames, processes=1, sharded=False):
    """Bytes on one GPU that are there all the time, by part; and of each role's gradients: all, and those of a block.

    With full weights "base weights" is the frozen teacher. sharded: FSDP2, else DDP where there are several processes.
    """
    layers = shape["num_layers"]
    fewer, *more = [_weights(config, shape, frames, count) for count in ((2, 3) if layers > 2 else (layers,))]
    block = {n: more[0][n] - v if more else v / layers for n, v in fewer.items()}
    held = {n: v + (layers - 2) * block[n] if more else v for n, v in fewer.items()}
    roles = ("student", "fake") if config.stage == "on_policy" else ("student",)
    learns = {role: (held[f"{role} learns"], block[f"{role} learns"]) for role in roles}
    every = [whole for whole, _ in learns.values()]
    trained = sum(held[role] for role in roles)
    share = 1 / processes if sharded else 1
    parts = {
        "base weights": held["base"] + held["tables"],
        "adapters" if config.trained == "lora" else "trained weights": trained + held["teacher"],
        "averages": share * held["student"],
        "optimiser": share * ADAM * sum(every),
    }
    if processes > 1:  # beside whole weights: buckets of DDP; of FSDP2 the shards, and what a gradient is reduced in
        parts["several GPUs"] = trained * share + max(every) if sharded else sum(every)
    return parts, learns


def _weights(config, shape, frames, layers):
    networks = ShapeNetworks(config, frames, shape, num_layers=layers)
    count = Counter({"teacher": 0, "base": 0, "tables": 0})  # of sines and cosines, one a transformer
    every = [networks.base] if networks.base is not None else []
    for role in ("student", "fake")[: 1 + (config.stage == "on_policy")]:
        network = networks.trained(role).network
        weights = list(network.parameters())
        every += [] if networks.base is not None else [network.transformer]
        count[role] = sum(each.nbytes for each in weights)
        count[f"{role} learns"] = sum(each.nbytes for each in weights if each.requires_grad)
    if config.trained == "lora":
        teacher = networks.teacher() if config.teacher else None
        count["teacher"] = sum(each.nbytes for each in teacher.parameters()) if teacher else 0
        plain = build_transformer(shape, config.architecture, dtype=networks.base.dtype, num_layers=layers)
        count["base"] = sum(each.nbytes for each in plain.parameters())
    elif config.stage == "on_policy" or config.velocity == "base":
        network = networks.teacher().network
        count["base"] = sum(each.nbytes for each in network.parameters())
        every.append(network.transformer)
    count["tables"] = sum(each.rope._build_freqs(torch.device("meta")).nbytes for each in every)
    return count


@dataclass(frozen=True)
class Plan:
    """What a run takes. memory: bytes of one GPU by part, at the moment when they are most.

    flop: of one GPU in one step, of the model alone; flop_with_recompute: what is really done with checkpointing;
    slowest: how much longer than the mean process the last one takes. evaluations: {role: (forwards, backwards)} a
    sample. roles: FLOP by role. short: what to change where it does not fit, {changes: peak bytes}, each line whole.
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

    def enough(self, change):
        """Whether a change in `short` is all that it takes; where it names a larger GPU, it is."""
        return change.startswith("--gpu ") or self.short[change] <= (1 - SPARE) * self.gpu.memory

    def seconds(self, share=0.5):
        """Of one step, where model FLOP reach `share` of the GPU's rate."""
        return self.slowest * self.flop / (share * self.gpu.rate)

    def hours(self, share=0.5):
        """Of all of the run's steps."""
        return self.seconds(share) * self.config.steps / 3600

    def money(self, price, share=0.5):
        """For all GPUs, at `price` an hour of one."""
        return price * self.gpus * self.hours(share)


def plan_run(config, clip=None, gpu=None, gpus=1, steps=None, sharded=False, advise=True):
    """The Plan of a configuration. clip: as movies.WAN_CLIP; None: that of its data, if there are any, or that.

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
    check_split(config.batch, gpus, config.accumulate)
    if sharded and gpus == 1:
        raise InputError("--sharded with --gpus 1; expected several to share the weights: --gpus 8, or no --sharded")
    prices = prices_of(config, shape, clip_shape, length, shape["text_dim"])
    exact, steps = steps is not None, list(range(STEPS) if steps is None else steps)
    plan = _plan(config, prices, shape, gpu, gpus, steps, sharded, exact)
    return replace(plan, short=advice(plan, prices, shape, steps)) if advise and not plan.fits else plan


def check_split(batch, gpus, accumulate):
    """Raise InputError, which names numbers that work, where a batch has no equal parts: accumulate of them a GPU."""
    if gpus < 1:
        raise InputError(f"--gpus {gpus}; expected at least 1")
    if batch % gpus:
        whole = [number for number in range(1, batch + 1) if batch % number == 0]
        near = [max(n for n in whole if n < gpus), *[n for n in whole if n > gpus][:1]]
        raise InputError(
            f"batch={batch} on {gpus} GPUs; expected equal parts: "
            f"--gpus {' or '.join(map(str, near))}, or another batch"
        )
    most = batch // gpus
    if most % accumulate:
        raise InputError(
            f"batch={batch} on {gpus} GPUs with accumulate={accumulate}; expected parts of equal size: "
            f"accumulate={most} is one clip at a time on each GPU, the least memory"
        )


def _plan(config, prices, shape, gpu, gpus, steps, sharded=False, exact=False):
    numbers = prices.prompt[0] * prices.prompt[1]
    parts, beside = trace(config, prices.clip, numbers, steps, gpus, exact)
    prices.count(question for part in parts for question in part.asked)
    kept, learns = resident(config, shape, prices.clip[0], gpus, sharded)
    every = (_memory(config, prices, part, *learns[part.role]) | {"batch": beside[part.role]} for part in parts)
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


def _memory(config, prices, part, gradients, block):
    """Bytes that come and go in a part, by what holds them, at the moment when they are most. block: its gradients."""
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
    # the last block, computed again, is let go while its own gradients come: a little more than there is
    later = gradients if config.accumulate > 1 else block * config.checkpointing
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
    clip = WAN_CLIP | (clip or {})
    return latent_shape(clip["frames"], clip["height"], clip["width"]), clip["length"]


# What to change


LARGEST = "the largest GPU of the table, one clip at a time"


def advice(plan, prices, shape, steps):
    """{changes, as plan.py takes them: bytes of the peak} where a plan does not fit, in order of cost, until one does.

    Each is whole: what costs no quality (checkpointing, of attention too, fewer clips at once, FSDP2 on several GPUs)
    is kept once tried, and named again in what follows. That a lower rank makes activations smaller is not counted.
    """
    found, config, gpus, sharded, kept = {}, plan.config, plan.gpus, plan.sharded, []

    def fits(change, config, gpus=gpus, sharded=sharded):
        each = _plan(config, prices, shape, plan.gpu, gpus, steps, sharded)
        found[" ".join(change)] = each.peak
        return each.fits

    for name, least in (("checkpointing", True), ("keep_attention", False)):
        if getattr(config, name) != least:
            config, kept = replace(config, **{name: least}), [*kept, f"{name}={least}".lower()]
            prices = prices_of(config, shape, prices.clip, *prices.prompt)
            if fits(kept, config):
                return found
    plain, most = kept, config.batch // gpus
    if config.accumulate < most:
        if fits([*kept, f"accumulate={most}"], replace(config, accumulate=most)):
            fewer = [n for n in range(config.accumulate + 1, most) if config.batch % (n * gpus) == 0]
            any(fits([*kept, f"accumulate={n}"], replace(config, accumulate=n)) for n in fewer)
            return found
        config, kept = replace(config, accumulate=most), [*kept, f"accumulate={most}"]
    if gpus > 1 and not sharded:
        sharded, kept = True, ["--sharded", *kept]
        if fits(kept, config, sharded=True):
            return found
    for rank in (128, 64, 32) if config.trained == "lora" else ():
        lower = replace(config, rank=rank, alpha=rank)
        if rank < config.rank and fits([*kept, f"rank={rank}"], lower, sharded=sharded):
            return found
    if gpus < 8 and config.batch % 8 == 0:
        spread = replace(config, accumulate=config.batch // 8)
        if fits(["--gpus 8 --sharded", *plain, f"accumulate={spread.accumulate}"], spread, 8, True):
            return found
    alone = _plan(config, prices, shape, plan.gpu, gpus, steps, sharded).peak
    larger = sorted((gpu for gpu in GPUS.values() if gpu.memory > plan.gpu.memory), key=lambda gpu: gpu.memory)
    enough = next((gpu.name for gpu in larger if alone <= (1 - SPARE) * gpu.memory), None)
    return found | {" ".join([f"--gpu {enough}", *kept]) if enough else LARGEST: alone}
