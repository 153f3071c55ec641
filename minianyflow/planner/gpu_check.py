"""Measures a GPU against the plan: real shapes, random weights, a few steps of real training, their time and memory.

Weights are made on the device, so that nothing is downloaded; batches come from a temporary folder of random latents.
All else is what distillation runs: its roles, draws and training loop. A case is one size, architecture and stage.
On a CPU the same code runs at tiny size; memory is then counted by live storages (counters.LiveBytes).
"""

import contextlib
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from math import inf
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from minianyflow.planner.counters import LiveBytes
from minianyflow.planner.forward_cost import ShapeNetworks
from minianyflow.planner.plan import plan_run
from minianyflow.planner.report import KINDS, ways
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.support.reports import markdown_table, mean
from minianyflow.wan.config import Config, load_config
from minianyflow.wan.data.latents import write_latents
from minianyflow.wan.data.options import WAN_CLIP, Options
from minianyflow.wan.folders import TINY_LENGTH, TINY_TEXT, TINY_TRANSFORMER
from minianyflow.wan.run import guard, prepare
from minianyflow.wan.shapes import SHAPES, SHARED, build_transformer, latent_shape
from minianyflow.wan.stages import STAGES, draws
from minianyflow.wan.trainer import train_run

TINY = SHARED | TINY_TRANSFORMER | {"text_dim": TINY_TEXT["d_model"], "freq_dim": 64}  # as make_tiny_wan makes it
SIZES = {  # name, the smallest first: (shape, clip, overlays before and after architecture and stage)
    "tiny": (TINY, {"frames": 17, "height": 64, "width": 64, "length": TINY_LENGTH}, [], ["tiny"]),
    "1.3b": (SHAPES["1.3b"], WAN_CLIP, ["wan-1.3b"], []),
    "14b": (SHAPES["14b"], WAN_CLIP, ["wan-14b"], []),
}
REPORT = "gpu_check.json"
OWN = ("architecture", "stage", "steps", "batch", "accumulate", "base", "data", "runs", "output", "device")
PARTS = ("base", "roles", "optimiser", "peak")
WARM_UP = 1  # number of steps that are not timed: allocations, choice of kernels, compilation
TIMING = 0.5  # seconds for which an operation is repeated to time it


@dataclass
class Request:
    """What to measure: all cases, the number of timed steps, the clip, and the device.

    batch: clips per step, one after another; of two, one has r = t. clip: changes to the size's own. options: key=value
    pairs for the configuration of every case. profile: whether to profile one more step. ways: whether to take every
    case in all `report.ways` to hold it, the smallest by plan first.
    """

    sizes: Sequence[str]
    architectures: Sequence[str] = KINDS
    stages: Sequence[str] = tuple(STAGES)
    steps: int = 3
    batch: int = 2
    clip: dict = field(default_factory=dict)
    device: str = "cuda"
    options: Sequence[str] = ()
    profile: bool = False
    ways: bool = False

    def __post_init__(self):
        if not (1 <= self.steps <= 10**5 and 1 <= self.batch <= 10**5):
            raise InputError(
                f"{self.steps} steps of {self.batch} clips; expected at least one of each, at most {10**5}"
            )
        Options(**self.clip)  # raises for what Wan cannot take
        for name in [option.split("=")[0] for option in self.options]:
            if name in OWN:
                raise InputError(f"{name} among other options; the check sets it itself: leave it out")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("torch finds no GPU here; look at nvidia-smi, or check size tiny on the device cpu")
        if self.device == "cpu" and set(self.sizes) != {"tiny"}:
            raise InputError(f"sizes {', '.join(self.sizes)} on a CPU, which takes days; expected size tiny alone")


def check(request: Request, output: str | Path, tell: Callable = print) -> dict:
    """Measure every case that fits; returns the report, and writes it to the folder `output` after each case.

    tell: called with a line before each case, and for each that is left out.
    Raises InputError if no case fits; and before anything else for a folder that cannot be written or has a report.
    """
    output, device = Path(output), torch.device(request.device)
    if (output / REPORT).exists():
        raise InputError(f"{output} holds a report, which may have cost hours; name another folder, or remove it")
    with staging_folder(output):  # or an unwritable folder would be found after the first case
        pass
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    report = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": gpu.name if gpu else "CPU"}
    report |= {"memory_gb": gpu.total_memory / 1e9 if gpu else None, "torch": torch.__version__}
    report |= {"cuda": torch.version.cuda, "matrix": matrix_rate(device), "steps": request.steps}
    report |= {"batch": request.batch, "options": list(request.options), "cases": []}
    for case, options in _cases(request):
        with tempfile.TemporaryDirectory() as folder:
            report["cases"].append(_check_case(replace(request, options=options), case, folder, output, report, tell))
        if gpu:
            gc.collect()
            torch.cuda.empty_cache()
        with staging_folder(output) as folder:
            (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
            (folder / "gpu_check.md").write_text(markdown(report), "utf-8")
    if all("left_out" in entry for entry in report["cases"]):
        raise InputError(f"nothing could be measured: {report['cases'][0]['case']}: {report['cases'][0]['left_out']}")
    return report


def _cases(request):
    """Pairs of a case and its options, the smallest first."""
    for case in product(sorted(request.sizes, key=list(SIZES).index), request.architectures, request.stages):
        found = []
        for memory, *words in ways(case[2]) if request.ways else [("",)]:
            own = [f"memory={memory}", f"offload=[{','.join(words)}]"] if memory else []
            with tempfile.TemporaryDirectory() as folder:
                config, clip = settings(options := replace(request, options=[*request.options, *own]), case, folder)
                peak = plan_run(config, clip, steps=[WARM_UP], advise=False).peak if request.ways else 0
            found.append((peak, case, options.options))
        yield from (pair for _, *pair in sorted(found, key=lambda one: one[0]))


def _check_case(request, case, folder, output, report, tell):
    """The entry of a case in the report, with `left_out` if it does not fit."""
    device = torch.device(request.device)
    name = " ".join([*case, *(option for option in request.options if request.ways)])
    config, clip = settings(request, case, folder)
    plan = plan_run(config, clip, steps=range(WARM_UP, WARM_UP + request.steps), advise=False)
    entry = {"case": name, "clip": clip, "plan": {"peak": plan.peak, "memory": plan.memory, "flop": plan.flop}}
    reason = too_large(plan.peak, device)
    if not reason:
        tell(f"{name}: planned peak {plan.peak / 1e9:.1f} GB, {plan.flop / 1e12:.4g} TFLOP per step")
        try:
            entry |= measure(request, case, config, output)
            rate = plan.flop / entry["seconds_a_step"] / 1e12
            return entry | {"tflops": rate, "share": rate / report["matrix"]["tflops"]}
        except torch.OutOfMemoryError:
            reason = "out of memory, although the plan fits"
    tell(f"{name}: {reason}")
    return entry | {"left_out": reason}


def too_large(peak: float, device: torch.device) -> str | None:
    """Why a case of this planned peak (bytes) cannot run on this device, or None."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (inf, inf)
    room = f"this GPU has {free / 1e9:.1f} of {total / 1e9:.1f} GB free: not run"
    return f"planned peak {peak / 1e9:.1f} GB; {room}" if peak > free else None


def settings(request: Request, case: tuple[str, str, str], folder: str | Path) -> tuple[Config, dict]:
    """The configuration of a case and its clip. Its random latents, and the base it plans for, are put in `folder`."""
    size, architecture, stage = case
    shape, clip, before, after = SIZES[size]
    clip, folder, batch = clip | request.clip, Path(folder), request.batch
    build_transformer(shape, architecture).save_config(folder / "base" / "transformer")
    prompts = torch.randn(batch + 1, clip["length"], shape["text_dim"])
    rows = torch.randn(batch, *latent_shape(clip["frames"], clip["height"], clip["width"]))
    write_latents(folder / "data", rows, prompts[:-1], prompts[-1:], ["noise"] * batch)
    options = {"base": folder / "base", "data": folder / "data", "runs": folder, "output": folder / "run"}
    options |= {"steps": WARM_UP + request.steps + request.profile, "device": request.device}
    options |= {"batch": batch, "accumulate": batch, "warmup": 0, "ema_after": 0}
    options |= {"samples.every": 0, "log.tracker": "none"}
    pairs = [f"{name}={value}" for name, value in options.items()]
    config = load_config([*before, architecture, stage, *after], [*pairs, *request.options])
    return replace(config, student=None, teacher=None), clip  # random weights: there is no earlier stage


# Measuring


@contextlib.contextmanager
def memory_reader(device: torch.device):
    """Gives a function that reads memory: (bytes now, most bytes since the last call), of what is allocated inside."""
    cuda, counter = device.type == "cuda", LiveBytes()
    before = torch.cuda.memory_allocated(device) if cuda else 0

    def read():
        if cuda:
            torch.cuda.synchronize(device)
            now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            now, peak, counter.peak = counter.now, counter.peak, counter.now
        return now - before, peak - before

    with contextlib.nullcontext() if cuda else counter, contextlib.nullcontext() if cuda else counter.host_memory():
        yield read


def measure(request: Request, case: tuple[str, str, str], config: Config, output: Path) -> dict:
    """Build the case and train it: memory by part in bytes, seconds of each timed step, rows evaluated."""
    device, last = torch.device(request.device), WARM_UP + request.steps - 1
    accelerator, data, _ = prepare(config)
    seconds, peaks, memory, profiler = [], [], {}, torch.profiler.profile() if request.profile else None

    def on_step(step):
        nonlocal start
        now, peak = read()  # it waits for the device
        seconds.append(time.perf_counter() - start)
        peaks.append(peak)
        if step == 0:
            memory["optimiser"] = now - memory["base"] - memory["roles"]
        if profiler and step == last:
            profiler.start()
        start = time.perf_counter()

    with memory_reader(device) as read:
        networks = ShapeNetworks(config, data.shape[0], SIZES[case[0]][0], device)
        memory["base"], _ = read()
        with device:  # where peft makes new weights
            roles = STAGES[config.stage](config, networks, {"prompt": data.null.to(device)})
        memory["roles"] = read()[0] - memory["base"]
        progress, start = {"desc": " ".join(case), "leave": False}, time.perf_counter()
        draw, watch = draws(config, data), guard(config, data)
        train_run(roles, draw, config.steps, config.accumulate, accelerator, progress, on_step, 1, guard=watch)
    if profiler:
        profiler.stop()
        by = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)
        (output / f"profile-{'-'.join(case)}.txt").write_text(table + "\n", "utf-8")
    rows = {name: {"forwards": count, "with_grad": grad} for name, (count, grad) in networks.counts().items()}
    timed, memory["peak"] = seconds[WARM_UP : last + 1], max(peaks)
    return {"memory": memory, "first_step": seconds[0], "seconds": timed, "seconds_a_step": mean(timed), "rows": rows}


def matrix_rate(device: torch.device) -> dict:
    """TFLOP/s of a bfloat16 product of matrices of 8192^2 (512^2 on a CPU): the median of many, by torch's timer."""
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds = Timer("a @ b", globals={"a": a, "b": b}).blocked_autorange(min_run_time=TIMING).median
    return {"size": size, "tflops": 2 * size**3 / seconds / 1e12}


# What is written


def markdown(report: dict) -> str:
    """The report as a page: one row per case, measured beside planned."""
    memory = "" if report["memory_gb"] is None else f", {report['memory_gb']:.1f} GB"
    matrix, batch, steps = report["matrix"], report["batch"], report["steps"]
    options = f"; {' '.join(report['options'])}" if report["options"] else ""
    parts = [
        f"## {report['device']}{memory}, {report['date']}",
        f"torch {report['torch']}, CUDA {report['cuda'] or 'none'}. Matrices of {matrix['size']}^2 in bfloat16: "
        f"{matrix['tflops']:.4g} TFLOP/s (median). Random weights; the mean of {steps} step{'s' * (steps > 1)} of "
        f"{batch} clip{'s, one after another' * (batch > 1)}{options}.",
    ]
    titles = ["case", "clip", "s per step", "model TFLOP/s", "share", *PARTS, "off by"]
    parts.append(markdown_table(titles, [_row(**entry) for entry in report["cases"]]))
    parts.append(
        "GB, measured / planned. Share: of the matrices' rate, by model FLOP as planned, without recomputation."
    )
    return "\n\n".join(parts) + "\n"


def _row(case, clip, plan, left_out=None, memory=None, seconds_a_step=0, tflops=0, share=0, **_):
    measured, end = [""] * (3 + len(PARTS)), left_out
    if not left_out:
        measured = [f"{seconds_a_step:.4g}", f"{tflops:.4g}", f"{share:.1%}"]
        planned = Counter(plan["memory"])
        parts = planned["base weights"], planned["adapters"] + planned["trained weights"] + planned["averages"]
        parts = [*parts, planned["optimiser"], plan["peak"]]
        measured += [f"{memory[part] / 1e9:.4g} / {size / 1e9:.4g}" for part, size in zip(PARTS, parts, strict=True)]
        end = f"{plan['peak'] / memory['peak'] - 1:+.1%}"
    size = f"{clip['frames']} x {clip['height']} x {clip['width']}"
    return [case, size, *measured, end]
