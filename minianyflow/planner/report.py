"""A plan in words, as JSON, and the table of docs/plan.md."""

from dataclasses import replace
from itertools import product
from math import inf

from tqdm import tqdm

from minianyflow.planner.gpus import GPUS
from minianyflow.planner.plan import SPARE, plan_run
from minianyflow.support.errors import InputError
from minianyflow.wan.config import load_config
from minianyflow.wan.data.videos import WAN_CLIP

SIZES, ARCHITECTURES = {"wan-1.3b": "1.3B", "wan-14b": "14B"}, ("bidirectional", "causal")
STAGES = ("teacher", "forward", "on_policy")
PRICE = 3.0  # of a GPU-hour, an example for the docs: no offer of anybody's


def check_share(share, price=None):
    """Raise InputError for a share of the rate that is none, or a price that is no number of at least 0."""
    if not 0 < share <= 1:
        raise InputError(f"--share {share}; expected a share of the GPU's rate, above 0 and at most 1")
    if price is not None and not 0 <= price < inf:
        raise InputError(f"--price {price}; expected what one GPU costs for an hour")


def describe(plan, share=0.5, price=None):
    """Lines to print."""
    config, gpu = plan.config, plan.gpu
    how = "" if plan.gpus == 1 else " with FSDP2" if plan.sharded else " with DDP"
    lines = [
        f"{config.architecture} {config.stage}, {config.base}, on {plan.gpus} x {gpu.name}{how}; planned, not measured",
        "",
        "memory of one GPU, GB, at the moment when it is most",
        *(f"  {name:42}{size / 1e9:9.2f}" for name, size in plan.memory.items() if size),
        f"  {'in all':42}{plan.peak / 1e9:9.2f}   of {gpu.memory / 1e9:g}: {'fits' if plan.fits else 'does not fit'}"
        f" ({SPARE:.0%} are left for what is not counted)",
        *(["  what to change, each line whole (--sharded is eight_gpus_fsdp2.yaml):"] if plan.short else []),
        *(
            f"    {change}: {size / 1e9:.1f} GB{'' if plan.enough(change) else ', not enough'}"
            for change, size in plan.short.items()
        ),
        "  not there in training: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.outside.items()),
        "",
        "network evaluations a sample (forwards, backwards), TFLOP of one GPU a step",
        *(
            f"  {role:10}{rows[0]:8.2f}{rows[1]:8.2f}{plan.roles[role] / 1e12:12.1f}"
            for role, rows in plan.evaluations.items()
        ),
        f"  {'in all':26}{plan.flop / 1e12:12.1f}   with what checkpointing computes again "
        f"{plan.flop_with_recompute / 1e12:.1f}",
        "",
        f"{plan.seconds(share):.1f} seconds a step at {share:.0%} of {gpu.rate / 1e12:g} TFLOP/s, "
        f"{config.steps} steps: {plan.hours(share):.1f} hours, {plan.gpus * plan.hours(share):.1f} GPU-hours",
    ]
    bill = [] if price is None else [f"money: {plan.money(price, share):,.0f}, at {price:g} a GPU-hour"]
    return "\n".join([*lines, *bill])


def as_json(plan, share=0.5, price=None):
    """The same as a dict of plain values: bytes, FLOP, hours."""
    made = {
        "stage": plan.config.stage,
        "architecture": plan.config.architecture,
        "base": plan.config.base,
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "sharded": plan.sharded,
        "memory": plan.memory,
        "peak": plan.peak,
        "room": plan.gpu.memory,
        "fits": plan.fits,
        "change": plan.short,
        "outside_training": plan.outside,
        "flop": plan.flop,
        "flop_with_recompute": plan.flop_with_recompute,
        "flop_by_role": plan.roles,
        "evaluations_a_sample": plan.evaluations,
        "share": share,
        "seconds_a_step": plan.seconds(share),
        "hours": plan.hours(share),
        "gpu_hours": plan.gpus * plan.hours(share),
    }
    return made | ({"money": plan.money(price, share)} if price is not None else {})


RUNS = tuple(product(SIZES, ARCHITECTURES, STAGES))
MODELS = tuple(product(SIZES, ARCHITECTURES, (1, 8)))  # each on so many GPUs


def table(share=0.5, runs=RUNS):
    """Rows of {1.3B, 14B} x {bidirectional, causal} x stages: GPU-hours on every GPU of the table where it fits."""
    names = list(GPUS)
    lines = [
        f"| run | steps x batch | PFLOP a step | GB | {' | '.join(names)} |",
        "|" + "---|" * (len(names) + 4),
    ]
    for size, kind, stage in tqdm(runs, unit="run"):
        plan = published(size, kind, stage)
        config = plan.config
        on = [replace(plan, gpu=gpu) for gpu in GPUS.values()]
        cells = [f"{each.hours(share):,.0f}" if each.fits else "-" for each in on]
        what = f"{SIZES[size]} {kind} {stage}"
        lines.append(
            f"| {what} | {config.steps} x {config.batch} | {plan.flop / 1e15:,.1f} | {plan.peak / 1e9:.0f} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines)


def bills(price=PRICE, share=0.5, gpu="h200", models=MODELS):
    """Rows of whole models, their three stages one after another: GPU-hours, days and money, on one GPU and eight."""
    lines = [
        f"| whole model | on | the largest stage, GB | GPU-hours | days | at {price:g} a GPU-hour |",
        "|" + "---|" * 6,
    ]
    for size, kind, gpus in tqdm(models, unit="bill"):
        stages = [("bidirectional", "teacher"), (kind, "forward"), (kind, "on_policy")]
        plans = [published(size, *stage, gpu, gpus) for stage in stages]
        if not all(plan.fits for plan in plans) and gpus > 1:
            plans = [published(size, *stage, gpu, gpus, sharded=True) for stage in stages]
        how = f"{gpus} x {gpu}{' with FSDP2' * plans[0].sharded}"
        large = max(plan.peak for plan in plans) / 1e9
        cells = ["does not fit", "-", "-"]
        if all(plan.fits for plan in plans):
            hours, money = (
                sum(each) for each in ([p.hours(share) for p in plans], [p.money(price, share) for p in plans])
            )
            cells = [f"{gpus * hours:,.0f}", f"{hours / 24:.1f}", f"{money:,.0f}"]
        lines.append(f"| {SIZES[size]} {kind} | {how} | {large:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def published(size, kind, stage, gpu=None, gpus=1, sharded=False):
    """The Plan of a stage with the recipe's steps and batch, one clip at a time on every GPU."""
    config = load_config([size, kind, stage])
    config = replace(config, accumulate=config.batch // gpus, data="")
    return plan_run(config, WAN_CLIP, gpu, gpus, sharded=sharded, advise=False)
