"""What a run of distillation takes, before anything is rented: memory by part, FLOP, hours, money.

Two counts are multiplied: the forward calls of a step (forward_calls.py) and the cost of a call (forward_cost.py).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm
from typing_extensions import TypedDict

from minianyflow.networks.sequence import check_tokens
from minianyflow.planner.forward_calls import ForwardCall, MicroBatch, known_calls
from minianyflow.planner.forward_cost import ForwardCosts, forward_costs
from minianyflow.planner.gpus import GPUS, Gpu, find_gpu
from minianyflow.planner.report import SETUPS, SIZES, Plan, ways
from minianyflow.support.errors import InputError
from minianyflow.support.files import read_json
from minianyflow.wan.config import Config, load_config
from minianyflow.wan.data.buckets import open_latents
from minianyflow.wan.data.latents import Count
from minianyflow.wan.data.options import CODECS, WAN22_CLIP, WAN_CLIP
from minianyflow.wan.shapes import SHAPES, latent_shape

KINDS = {int: Count, bool: bool, float: float, tuple: list[int]}
Shape = TypedDict("Shape", {name: KINDS[type(value)] for name, value in SHAPES["14b"].items()}, total=False)
STEPS = 16  # number of steps whose draws are counted by default
RUN = ("architecture", "stage", "base", "steps", "batch", "memory", "offload", "shard_base", "sequence_parallel")
ADAM = 2  # numbers that AdamW holds per weight
HUB = {
    f"{name}-{size}-Diffusers": size.lower()
    for name in ("Wan-AI/Wan2.1-T2V", "nvidia/AnyFlow-Wan2.1-T2V", "nvidia/AnyFlow-FAR-Wan2.1")
    for size in ("1.3B", "14B")
} | {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": "5b"}


def plan_run(
    config: Config, clip: dict | None = None, gpu: Gpu | str = "h200", gpus=1, steps=None, sharded=False, advise=True
) -> Plan:
    """The Plan of a configuration.

    clip: as WAN_CLIP; None: that of the configuration's data, or WAN_CLIP without data. steps: the very steps whose
    draws are counted; None: STEPS steps like them. sharded: FSDP2 on several GPUs, else DDP. advise: whether to find
    what would fit if this does not.
    Raises InputError for an unknown base, and for a batch that does not divide.
    """
    if config.trained == "full" and config.precision == "bf16":
        raise InputError(
            "trained=full with precision=bf16 cannot be planned: the copies that autocast makes of weights are not "
            "counted; plan precision=fp32, which takes more, or trained=lora"
        )
    shape = shape_of(config.base)
    clip_shape, length = _clip(config, clip, shape["in_channels"])
    if gpus % config.sequence_parallel:
        raise InputError(
            f"sequence_parallel={config.sequence_parallel} on {gpus} GPUs; expected a number that divides them"
        )
    full, coarse = (clip_shape[2] // n * (clip_shape[3] // n) for n in (2, 4))
    coarse = coarse if config.architecture == "causal" else 0
    check_tokens(config.sequence_parallel, shape["num_attention_heads"], full, coarse)
    check_split(config.batch, gpus, config.accumulate, config.sequence_parallel)
    if sharded and gpus == 1:
        raise InputError("weights sharded over 1 GPU; expected several GPUs, or weights that are not sharded")
    if config.shard_base and gpus == 1:
        raise InputError("shard_base=true on 1 GPU; expected several, or offload=[base]: it rests in CPU memory")
    if sharded and "states" in config.offload:
        raise InputError("offload=states with FSDP2, which shards moments and averages; leave out one of them")
    setup = (find_gpu(gpu) if isinstance(gpu, str) else gpu, gpus, sharded)
    sizes, numbers = (shape, clip_shape, (length, shape["text_dim"])), list(range(STEPS) if steps is None else steps)
    plan = _plan(config, sizes, setup, numbers, exact=steps is not None)
    if config.memory == "auto" and config.stage == "on_policy" and not plan.fits and "blocks" not in config.offload:
        config = replace(config, memory="small")
        plan = _plan(config, sizes, setup, numbers, exact=steps is not None)
    return replace(plan, changes=advice(plan, config, sizes, numbers)) if advise and not plan.fits else plan


def check_split(batch: int, gpus: int, accumulate: int, together: int = 1) -> None:
    """Raise InputError if a batch does not divide into `accumulate` equal micro-batches per GPU; names what does.

    together: number of GPUs that share a clip.
    """
    if gpus < 1 or batch % (groups := gpus // together):
        fit = [n * together for n in range(1, batch + 1) if batch % n == 0]
        near = " or ".join(map(str, sorted(sorted(fit, key=lambda n: abs(n - gpus))[:2])))
        raise InputError(f"batch={batch} on {gpus} GPUs; expected equal parts: {near} GPUs, or another batch")
    if (most := batch // groups) % accumulate:
        raise InputError(
            f"batch={batch} on {gpus} GPUs with accumulate={accumulate}; expected micro-batches of equal size: "
            f"accumulate={most} is one clip at a time on each GPU, the least memory"
        )


def shape_of(base: str) -> dict:
    """The arguments of the transformer in `base`: a known name on the hub, or a folder with its config.json."""
    folder = Path(base)
    if base in HUB and not folder.is_dir():
        return SHAPES[HUB[base]]
    paths = [path for path in (folder / "transformer/config.json", folder / "config.json") if path.is_file()]
    if not paths:
        expected = f"a folder with transformer/config.json, or one of {', '.join(HUB)}"
        raise InputError(f"the size of {base} is not known here; expected {expected}")
    found = read_json(paths[0], "fetch or make it again", Shape)
    return SHAPES["14b"] | {name: value for name, value in found.items() if name in SHAPES["14b"]}


def _clip(config, clip, channels):
    if clip is None and config.data and Path(config.data).is_dir():
        data = open_latents(config.data)
        return tuple(data.shape), data.null.shape[1]
    channels = channels if channels in CODECS else 16
    clip = (WAN22_CLIP if channels == 48 else WAN_CLIP) | (clip or {})
    return latent_shape(clip["frames"], clip["height"], clip["width"], channels), clip["length"]


def published_plan(name: str) -> Plan:
    """A plan of docs/plan.md by its name, "14B causal on_policy, 1 x h200, small states": one clip at a time."""
    stage, setup, *way = name.split(", ")
    memory, *words = way[0].split() if way else ["small"]
    (size, *overlays), (gpus, sharded) = stage.split(), SETUPS[setup]
    config = load_config([SIZES[size], *overlays])
    config = replace(config, accumulate=config.batch // gpus, memory=memory, offload=words)
    return plan_run(config, WAN_CLIP, gpus=gpus, sharded=sharded, advise=False)


def _plan(config, sizes, setup, steps, exact=False, rank=None):
    """A Plan without advice. sizes: as forward_costs. setup: (GPU, number of GPUs, sharded). exact: as forward_calls.

    rank: that activations are counted with, if not the configuration's.
    """
    (_, clip, (tokens, numbers)), (_, gpus, sharded) = sizes, setup
    groups = gpus // config.sequence_parallel  # of GPUs that share their clips; a micro-batch is a group's
    costs = forward_costs(replace(config, rank=rank or config.rank), *sizes)
    micro_batches = known_calls(config, clip, tokens * numbers, steps, groups, exact)
    different = dict.fromkeys(call.per_row for part in micro_batches for call in part.calls)
    for call in tqdm(different, desc="counting", unit="forward", delay=2, leave=False, disable=None):
        costs(call)  # which is then known
    weights = forward_costs(config, *sizes).weights()
    resident, gradients = resident_bytes(config, weights, gpus, sharded)
    host, in_turn, beside_computing, gathered, exchanged = Counter(), 0, 0, Counter(), Counter()
    resting, at_once = weights["blocks"][0] + weights["embedder"][0], 0
    if away := config.shard_base or "base" in config.offload:  # one block computes, the next is on its way
        at_once = weights["blocks"][1] * (1 + ("base" in config.offload))
        resident["base weights"] -= resting * (1 - config.shard_base / gpus)
        host |= {} if config.shard_base else {"base weights": resting}
    alike = {(part.role, part.first, id(part.events)): part for part in micro_batches}
    moments = [
        moment | {"base weights of a block": at_once}
        for part in alike.values()
        for moment in passing_bytes(config, costs, part, *gradients[part.role])
    ]
    if "states" in config.offload:
        host |= {name: resident.pop(name) for name in ("averages", "optimiser")}
        in_turn = len(steps) * groups * 2 * (host["averages"] + host["optimiser"])
        for role, (size, _) in gradients.items():  # at its update
            average = host["averages"] * (role == "student")
            moments.append({"gradients": size, "optimiser": ADAM * size, "averages": average})
    memory = resident | max(moments, key=lambda moment: sum(moment.values()))
    processes, roles, forwards, backwards, recomputed = Counter(), Counter(), Counter(), Counter(), 0
    again = 0  # FLOP of rollouts that are recomputed
    for part in micro_batches:
        kept = {call.cached for call in part.calls if call.grad}  # of the caches, which are stored whole
        there = [call for call in part.calls if call.grad or (call.kind == "fill_cache" and call.cached in kept)]
        host["activations"] = max(host["activations"], sum(costs(call).stored for call in there))
        for call in part.calls:
            cost, times = costs(call), 1 + call.unit
            in_turn += cost.fetched * (times + call.grad)  # caches; what else comes in the backward are kept inputs
            beside_computing += cost.stored * (call.grad or call.kind == "fill_cache")
            beside_computing += call.grad * (cost.fetched_again - cost.fetched)
            gathered[part.step, part.process] += away * resting * (times + call.grad)
            exchanged[part.step, part.process] += times * cost.exchanged + call.grad * cost.exchanged_again
            flop = cost.forward + call.grad * cost.backward
            processes[part.step, part.process] += flop
            roles[call.role] += flop
            forwards[call.role] += call.rows
            backwards[call.role] += call.rows * call.grad
            recomputed += call.grad * cost.recomputed
            again += call.unit * cost.forward
    count, model = len(steps), sum(processes.values())
    samples = count * config.batch
    slowest, gathers, links = (  # a step gathers what its slowest process needs
        sum(max(of[step, p] for p in range(groups)) for step in steps) for of in (processes, gathered, exchanged)
    )
    links += gathers * (1 - 1 / gpus) if config.shard_base else 0
    beside_computing += 0 if config.shard_base else sum(gathered.values())
    factor = CODECS.get(clip[1], CODECS[16])[0]  # pixels per side of a latent
    pixels = f"{4 * clip[0] - 3} x {factor * clip[2]} x {factor * clip[3]}"
    return Plan(
        {name: getattr(config, name) for name in RUN} | {"clip": pixels},
        *setup,
        memory=memory,
        flop=model / count / groups,
        flop_with_recompute=(model + recomputed + again) / count / groups,
        slowest=slowest * groups / model,
        evaluations={role: (forwards[role] / samples, backwards[role] / samples) for role in forwards},
        roles={role: flop / count / groups for role, flop in roles.items()},
        work=1 + again / (model + recomputed),
        host={name: size for name, size in host.items() if size},
        bus={
            "in turn": in_turn / count / groups,
            "beside computing": beside_computing / count / groups,
            "between GPUs": links / count,
        },
    )


def resident_bytes(config: Config, weights: dict, gpus: int = 1, sharded: bool = False) -> tuple[dict, dict]:
    """Bytes on one GPU that are there all the time, by part; and {role: bytes of all its gradients, of one block's}.

    weights: of ForwardCosts. With full weights "base weights" is the frozen teacher. sharded: FSDP2, else DDP.
    """
    roles = ("student", "fake") if config.stage == "on_policy" else ("student",)
    gradients = {role: weights[f"{role} gradients"] for role in roles}
    all_gradients = [whole for whole, _ in gradients.values()]
    size = {name: whole for name, (whole, _) in weights.items()}
    trained, share = sum(size[role] for role in roles), 1 / gpus if sharded else 1
    parts = {
        "base weights": size["base"] + size["tables"],
        "adapters" if config.trained == "lora" else "trained weights": trained + size["teacher"],
        "averages": share * size["student"],
        "optimiser": share * ADAM * sum(all_gradients),
    }
    if gpus > 1:  # beside whole weights: the buckets of DDP, or the shards of FSDP2 and what one gradient reduces in
        parts["several GPUs"] = trained * share + max(all_gradients) if sharded else sum(all_gradients)
    return parts, gradients


def passing_bytes(config: Config, costs: ForwardCosts, part: MicroBatch, gradients, block) -> Iterator[dict]:
    """Bytes that come and go in a micro-batch, by part, at every moment that may be the peak.

    gradients: bytes of all gradients. block: of those of one block.
    """
    there, saved = 0 if part.first else gradients, 0.0  # gradients of earlier micro-batches and terms; kept so far
    learning = {call.cached: call for call in part.calls if call.kind == "fill_cache" and call.grad}
    returned = Counter()  # gradients of caches, each until the backward of the call that filled it is over
    kept = "rollout jumps kept" if part.rollout else f"activations kept{' at blocks' * config.checkpointing}"
    passing = f"activations {'one block, computed again' if config.checkpointing else 'in passing'}"
    for event in part.events:
        call, cost = event.call, costs(event.call)
        if event.what == "backward":
            if call.cached in learning:
                filled = costs(replace(learning[call.cached], grad=False))
                returned[call.cached] = filled.cache + filled.stored
            # the last block, recomputed, is freed while its gradients are computed: this is a little too much
            moments = [(there or block * config.checkpointing, saved, cost.returning)]
            there, saved = gradients, saved - cost.saved
            moments.append((there, saved, cost.returning))  # the end of this call's backward
        else:
            keeps = call.grad and (not call.unit or event.what == "again")  # else its unit is recomputed
            moments = [(there, saved, cost.transient + cost.cache + keeps * cost.saved)]
            saved += keeps * cost.saved
        caches = [ForwardCall("student", rows, False, False, "fill_cache", frames) for rows, frames in event.caches]
        held = {"causal cache": sum(costs(filling).cache for filling in caches) + returned.total()}
        held |= {"batch and states": event.beside}
        for gradients_now, saved_now, in_passing in moments:
            yield {"gradients": gradients_now, kept: saved_now, passing: in_passing} | held
        if event.what == "backward" and call.kind == "fill_cache":
            del returned[call.cached]


# What to change


def advice(plan: Plan, config: Config, sizes: tuple, steps: list[int]) -> list[tuple[dict, float]]:
    """Options to change and the peak with them, in order of cost, up to the first that fit; what costs time, by time.

    That a lower rank makes activations smaller is not counted.
    """
    tried = []
    for group in _changes(config, plan):
        plans = []
        for changes in group:
            options = {name: value for name, value in changes.items() if hasattr(config, name)}
            changed = replace(config, **options, alpha=changes.get("rank", config.alpha))
            gpu = GPUS[changes["gpu"]] if "gpu" in changes else plan.gpu
            setup = gpu, changes.get("gpus", plan.gpus), changes.get("sharded", plan.sharded)
            plans.append((changes, _plan(changed, sizes, setup, steps, rank=config.rank)))
        for changes, other in sorted(plans, key=lambda pair: pair[1].seconds()):
            tried.append((changes, other.peak))
            if other.fits:
                return tried
    return tried


def _changes(config, plan):
    """Groups of sets of options, each complete: what costs no quality adds up, then what costs time, then more."""
    changes, can_rest = {}, config.trained == "lora" and not config.compiled
    for name, value in (("checkpointing", True), ("keep_attention", False)):
        if getattr(config, name) != value:
            changes |= {name: value}
            yield [changes]
    checkpointed, most = changes, config.batch * config.sequence_parallel // plan.gpus
    for number in range(config.accumulate + 1, most + 1):
        if most % number == 0:
            changes = checkpointed | {"accumulate": number}
            yield [changes]
    plain = changes
    ddp_alone = config.architecture == "causal" and config.stage != "on_policy"  # as the run says
    can_share = can_rest and not {"base", "halves"} & {*config.offload} and not config.shard_base
    left = [word for word in config.offload if word != "states"]  # FSDP2 shards those
    sharded = {"sharded": True} | ({"offload": left} if left != config.offload else {})
    sharded |= {"shard_base": False} if ddp_alone and config.shard_base else {}
    if plan.gpus > 1 and can_share and not (ddp_alone and plan.sharded):
        unequal = config.stage == "on_policy" and not config.on_policy.shared_rollout
        changes = changes | {"shard_base": True} | ({"on_policy.shared_rollout": True} if unequal else {})
        yield [changes]
    if plan.gpus > 1 and not plan.sharded:
        changes = (plain if ddp_alone else changes) | sharded
        yield [changes]
    can_rest = can_rest and not config.shard_base
    whole = config.compiled or config.shard_base or config.sequence_parallel > 1  # blocks, as a run says
    never = {*["base"] * (not can_rest), *["halves"] * whole}
    moves = [] if plan.sharded else [way for way in ways(config.stage) if not never & {*way}]
    yield [
        plain | ({"memory": memory} if config.stage == "on_policy" else {}) | {"offload": words}
        for memory, *words in moves
        if words != config.offload or (config.stage == "on_policy" and memory != config.memory)
    ]
    for rank in (128, 64, 32):
        if config.trained == "lora" and rank < config.rank:
            yield [changes | {"rank": rank}]
    if plan.gpus < 8 and config.batch % 8 == 0 and config.sequence_parallel == 1:
        yield [{"gpus": 8} | sharded | checkpointed | {"accumulate": config.batch // 8}]
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory):
        if gpu.memory > plan.gpu.memory:
            yield [{"gpu": gpu.name} | changes]
