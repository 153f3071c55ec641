"""The Plan of a run as numbers, text and JSON; and the tables of docs/plan.md, from the rows of docs/plan/plans.json.

Nothing heavy is imported here: plan.py makes plans.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import inf

from minianyflow.planner.gpus import GPUS, SPARE, Gpu
from minianyflow.support.errors import InputError
from minianyflow.support.reports import markdown_table

PRICE = 3.0  # per GPU-hour: an example for the docs, nobody's offer
SIZES, KINDS = {"1.3B": "wan-1.3b", "14B": "wan-14b"}, ("bidirectional", "causal")
SETUPS = {"1 x h200": (1, False), "8 x h200": (8, False), "8 x h200 with FSDP2": (8, True)}  # (GPUs, sharded)
WAYS = (  # to hold a run: what `memory` is, and what rests in CPU memory
    ("fast",),
    ("fast", "states"),
    ("fast", "states", "blocks"),
    ("fast", "states", "blocks", "halves"),
    ("small",),
    ("small", "states"),
    ("small", "states", "base"),
    ("fast", "states", "blocks", "base"),
)
ONE_GPU = {"1.3B": "rtx4090", "14B": "h100"}  # of the bill
COLUMNS = ("rtx4080", "rtx4090", "l40s", "h100", "pro6000", "h200")  # of the table: 16, 24, 48, 80, 96, 141 GB
STAGES = [" ".join(words) for words in product(SIZES, KINDS, ("teacher", "forward", "on_policy"))]
PUBLISHED = [f"{stage}, {setup}" for stage, setup in product(STAGES, [*SETUPS][1:])]


def ways(stage: str) -> list[tuple[str, ...]]:
    """Those of WAYS that differ for a stage: without rollouts none are recomputed."""
    return [*dict.fromkeys(way if "on_policy" in stage else ("fast", *way[1:]) for way in WAYS)]


PUBLISHED += [f"{stage}, 1 x h200, {' '.join(way)}" for stage in STAGES for way in ways(stage)]
OUTSIDE = {  # bytes that training does not load: parameters of Wan2.1's text encoder (UMT5-XXL) and VAE
    "text encoder, bfloat16": 2 * 5_680_910_336,
    "VAE, float32": 4 * 126_892_531,
}


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    run: its architecture, stage, base, steps, batch, memory, offload and clip. memory: bytes on one GPU by part, at the
    peak. flop: model FLOP of one GPU per step; flop_with_recompute: with what checkpointing recomputes. slowest: time
    of the slowest process over the mean. evaluations: {role: (forwards, backwards)} per sample. roles: FLOP by role.
    changes: if the run does not fit, pairs ({option: value}, bytes of the peak); every set of options is complete.
    work: of a step, over that without recomputed rollouts; hours grow by it. host: bytes of CPU memory by part, of one
    process. bus: bytes that one GPU exchanges per step: with it "in turn" with computing and "beside computing", and
    "between GPUs".
    """

    run: dict
    gpu: Gpu
    gpus: int
    sharded: bool
    memory: dict
    flop: float
    flop_with_recompute: float
    slowest: float
    evaluations: dict
    roles: dict
    changes: list = field(default_factory=list)
    work: float = 1.0
    host: dict = field(default_factory=dict)
    bus: dict = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Bytes on one GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the peak fits this GPU, with SPARE left."""
        return self.gpu.holds(self.peak)

    def seconds(self, share: float = 0.5) -> float:
        """Seconds per step if model FLOP reach `share` of the GPU's rate, and copies of the rates of bus and links."""
        compute, bus = self.work * self.slowest * self.flop / self.gpu.rate, Counter(self.bus)
        apart = bus["in turn"] / self.gpu.bus + bus["between GPUs"] / self.gpu.link
        return (max(compute, bus["beside computing"] / self.gpu.bus) + apart) / share

    def hours(self, share: float = 0.5) -> float:
        """Hours for all steps."""
        return self.seconds(share) * self.run["steps"] / 3600

    def gpu_hours(self, share: float = 0.5) -> float:
        """Hours for all steps, summed over the GPUs."""
        return self.gpus * self.hours(share)


def check_share(share: float, price: float | None = None) -> None:
    """Raise InputError for a share outside (0, 1], or a price that is not a number of at least 0."""
    if not 0 < share <= 1:
        raise InputError(f"a share {share} of the GPU's rate; expected more than 0 and at most 1")
    if price is not None and not 0 <= price < inf:
        raise InputError(f"a price of {price} per GPU-hour; expected a number of at least 0")


def as_options(changes: dict, flags: dict) -> str:
    """Options as "name=value ..."; before them those in `flags`, as "flag"."""
    ordered = sorted(changes.items(), key=lambda change: change[0] not in flags)
    words = [flags.get(name, f"{name}={{}}").format(str(value).lower()) for name, value in ordered]
    return " ".join(word.replace("'", "").replace(", ", ",") for word in words)


def describe(plan: Plan, share: float = 0.5, price: float | None = None, flags: dict | None = None) -> str:
    """The plan as lines of text. flags: how a command takes options that the configuration has not."""
    run, gpu, in_all = plan.run, plan.gpu, "in all"
    how = "" if plan.gpus == 1 else " with FSDP2" if plan.sharded else " with DDP"
    lines = [
        f"{run['architecture']} {run['stage']}, {run['base']}, on {plan.gpus} x {gpu.name}{how}; planned, not measured",
        f"clips of {run['clip']}, {run['batch']} per step",
        "\nmemory of one GPU, GB, at the peak",
        *(f"  {name:42}{size / 1e9:9.2f}" for name, size in plan.memory.items() if size),
        f"  {in_all:42}{plan.peak / 1e9:9.2f}   of {gpu.memory / 1e9:g}: {'fits' if plan.fits else 'does not fit'}"
        f" ({SPARE:.0%} are left for what is not counted)",
    ]
    if plan.host:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.host.items())
        lines.append(f"  in CPU memory{' of each process' * (plan.gpus > 1)}: {parts}")
    for how, size in plan.bus.items():
        rate = gpu.link if how == "between GPUs" else gpu.bus
        text = f"  copied {how}: {size / 1e9:.0f} GB per step, {size / rate / share:.1f} seconds"
        lines += [text] if size else []
    if plan.work > 1:
        lines.append(f"  memory=small: rollouts are recomputed, {plan.work:.2f} times the work")
    lines += ["  what to change; each line is complete:"] if plan.changes else []
    for changes, peak in plan.changes:
        enough = GPUS.get(changes.get("gpu"), gpu).holds(peak)
        lines.append(
            f"    {as_options(changes, flags or {})}: {peak / 1e9:.1f} GB, {'fits' if enough else 'not enough'}"
        )
    lines.append("  not loaded in training: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in OUTSIDE.items()))
    lines.append("\nnetwork evaluations per sample (forwards, backwards), TFLOP of one GPU per step")
    for role, (forwards, backwards) in plan.evaluations.items():
        lines.append(f"  {role:10}{forwards:8.2f}{backwards:8.2f}{plan.roles[role] / 1e12:12.1f}")
    lines += [
        f"  {in_all:26}{plan.flop / 1e12:12.1f}   with recomputation by checkpointing "
        f"{plan.flop_with_recompute / 1e12:.1f}",
        f"\n{plan.seconds(share):.1f} seconds per step at {share:.0%} of {gpu.rate / 1e12:g} TFLOP/s, "
        f"{run['steps']} steps: {plan.hours(share):.1f} hours, {plan.gpu_hours(share):.1f} GPU-hours",
    ]
    lines += [] if price is None else [f"money: {price * plan.gpu_hours(share):,.0f}, at {price:g} per GPU-hour"]
    return "\n".join(lines)


def as_row(plan: Plan) -> dict:
    """The plan as plain values, a row of plans.json."""
    return asdict(plan) | {"gpu": plan.gpu.name}


def as_json(plan: Plan, share: float = 0.5, price: float | None = None, flags: dict | None = None) -> dict:
    """A row of plans.json with what follows from it: bytes, FLOP, hours. flags: as in describe."""
    report = as_row(plan) | {"changes": {as_options(changes, flags or {}): peak for changes, peak in plan.changes}}
    report |= {"peak": plan.peak, "room": plan.gpu.memory, "fits": plan.fits, "outside_training": OUTSIDE}
    report |= {"share": share, "seconds_a_step": plan.seconds(share), "hours": plan.hours(share)}
    report |= {"gpu_hours": plan.gpu_hours(share)}
    return report | ({} if price is None else {"money": price * plan.gpu_hours(share)})


# The tables of docs/plan.md


def from_row(row: dict) -> Plan:
    """The plan in a row of plans.json."""
    return Plan(**row | {"gpu": GPUS[row["gpu"]]})


def on_one_gpu(plans: dict[str, dict], stage: str, gpu: str) -> Plan | None:
    """Of the plans of a stage on one GPU, the fastest that fits it; None if none does."""
    known = [replace(from_row(row), gpu=GPUS[gpu]) for name, row in plans.items() if name.startswith(f"{stage}, 1 x")]
    return min((plan for plan in known if plan.fits), key=Plan.seconds, default=None)


def how(run: dict) -> str:
    """What the run of a plan sets so as to fit, in few words: "small, states + base"; empty for nothing."""
    words = ["small"] * (run["memory"] == "small" and run["stage"] == "on_policy")
    return ", ".join(words + [" + ".join(run["offload"])] * bool(run["offload"]))


def stage_table(plans: dict[str, dict], share: float = 0.5) -> str:
    """One row per size, architecture and stage: on GPUs of every memory the GPU-hours and GB of what fits, and how."""
    rows = []
    for stage in STAGES:
        cells = [on_one_gpu(plans, stage, gpu) for gpu in COLUMNS]
        texts = [
            f"{plan.hours(share):,.0f} ({', '.join([f'{plan.peak / 1e9:.1f}', how(plan.run)]).rstrip(', ')})"
            if plan
            else "-"
            for plan in cells
        ]
        run = cells[-1].run
        rows.append([stage, f"{run['steps']} x {run['batch']}", f"{cells[-1].flop / 1e15:,.1f}", *texts])
    titles = [f"{gpu}, {GPUS[gpu].memory / 1e9:g} GB" for gpu in COLUMNS]
    return markdown_table(["run", "steps x batch", "PFLOP per step", *titles], rows)


def bill_table(plans: dict[str, dict], price: float = PRICE, share: float = 0.5) -> str:
    """One row per whole model (three stages in turn) on one and on eight GPUs: GPU-hours, days and money."""
    rows, (_, *eight) = [], SETUPS
    for size, kind, several in product(SIZES, KINDS, (False, True)):
        stages = [f"{size} {stage}" for stage in ("bidirectional teacher", f"{kind} forward", f"{kind} on_policy")]
        for setup in eight if several else (ONE_GPU[size],):
            known = [plans.get(f"{stage}, {setup}") or on_one_gpu(plans, stage, setup) for stage in stages]
            model = [from_row(plan) if several else plan for plan in known]
            if fits := all(plan and plan.fits for plan in model):
                break
        words = " and ".join(dict.fromkeys(how(plan.run) for plan in model if how(plan.run)))
        setup = setup if several else f"1 x {setup}{f', {words}' * bool(words)}"
        hours, peak = sum(plan.hours(share) for plan in model), max(plan.peak for plan in model)
        gpu_hours = model[0].gpus * hours
        bill = [f"{gpu_hours:,.0f}", f"{hours / 24:.1f}", f"{price * gpu_hours:,.0f}"]
        rows.append([f"{size} {kind}", setup, f"{peak / 1e9:.0f}", *(bill if fits else ["does not fit", "-", "-"])])
    titles = ["whole model", "on", "the largest stage, GB", "GPU-hours", "days", f"at {price:g} per GPU-hour"]
    return markdown_table(titles, rows)
