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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from math import inf
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from minianyflow.planner.counters import LiveBytes
from minianyflow.planner.forward_cost import ShapeNetworks
from minianyflow.planner.plan import plan_run
from minianyflow.planner.report import KINDS
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.wan.config import Config, load_config
from minianyflow.wan.data.latents import write_latents
from minianyflow.wan.data.options import WAN_CLIP
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
ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
REPORT = "gpu_check.json"
OWN = ("architecture", "stage", "steps", "batch", "accumulate", "base", "data", "runs", "output", "device")
WARM_UP = 1  # number of steps that are not timed: allocations, choice of kernels, compilation
TIMING = 0.5  # seconds for which an operation is repeated to time it


@dataclass
class Request:
    """What to measure: all cases, the number of timed steps, the clip, and the device.

    batch: clips per step, one after another; of two, one has r = t. clip: changes to the size's own. options: key=value
    pairs for the configuration of every case. profile: whether to profile one more step.
    """

    sizes: Sequence[str]
    architectures: Sequence[str] = KINDS
    stages: Sequence[str] = tuple(STAGES)
    steps: int = 3
    batch: int = 2
    clip: dict | None = None
    device: str = "cuda"
    options: Sequence[str] = ()
    profile: bool = False

    def __post_init__(self):
        if min(self.steps, self.batch) < 1:
            raise InputError(f"{self.steps} steps of {self.batch} clips; expected at least one of each")
        for name, value in (self.clip or {}).items():
            if value < 1 or (value % 4 != 1 if name == "frames" else value % 16):
                raise InputError(f"{name} {value}; expected {'4 n + 1 frames' if name == 'frames' else '16 n pixels'}")
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
    report = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": "CPU", "memory_gb": None}
    if device.type == "cuda":
        report["device"] = torch.cuda.get_device_name(device)  # never the name of the host
        report["memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    report |= {"torch": torch.__version__, "cuda": torch.version.cuda, "matrix": matrix_rate(device)}
    report |= {"steps": request.steps, "batch": request.batch, "options": list(request.options)}
    report |= {"attention": {}, "cases": []}
    for case in product(sorted(request.sizes, key=list(SIZES).index), request.architectures, request.stages):
        size, name = case[0], " ".join(case)
        with tempfile.TemporaryDirectory() as folder:
            config, clip = settings(request, case, folder)
            plan = plan_run(config, clip, steps=range(WARM_UP, WARM_UP + request.steps), advise=False)
            planned = {"peak": plan.peak, "memory": dict(plan.memory), "flop": plan.flop}
            entry, reason = {"case": name, "clip": clip, "plan": planned}, too_large(plan.peak, device)
            report["cases"].append(entry)
            if not reason:
                tell(f"{name}: planned peak {plan.peak / 1e9:.1f} GB, {plan.flop / 1e12:.4g} TFLOP per step")
                if size not in report["attention"]:
                    report["attention"][size] = attention_rates(SIZES[size][0], clip, device)
                try:
                    entry |= measure(request, case, config, output)
                    seconds = sum(entry["seconds"]) / len(entry["seconds"])
                    rate = plan.flop / seconds / 1e12
                    entry |= {"seconds_a_step": seconds, "tflops": rate, "share": rate / report["matrix"]["tflops"]}
                except torch.OutOfMemoryError:
                    reason = "out of memory, although the plan fits"
            if reason:
                entry["left_out"] = reason
                tell(f"{name}: {reason}")
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        with staging_folder(output) as folder:
            (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
            (folder / "gpu_check.md").write_text(markdown(report))
    if all("left_out" in entry for entry in report["cases"]):
        raise InputError(f"nothing could be measured: {report['cases'][0]['case']}: {report['cases'][0]['left_out']}")
    return report


def too_large(peak: float, device: torch.device) -> str | None:
    """Why a case of this planned peak (bytes) cannot run on this device, or None."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (inf, inf)
    room = f"this GPU has {free / 1e9:.1f} of {total / 1e9:.1f} GB free: not run"
    return f"planned peak {peak / 1e9:.1f} GB; {room}" if peak > free else None


def settings(request: Request, case: tuple[str, str, str], folder: str | Path) -> tuple[Config, dict]:
    """The configuration of a case and its clip. Its random latents, and the base it plans for, are put in `folder`."""
    size, architecture, stage = case
    shape, clip, before, after = SIZES[size]
    clip = clip | (request.clip or {})
    latents, length = latent_shape(clip["frames"], clip["height"], clip["width"]), clip["length"]
    build_transformer(shape, architecture).save_config(Path(folder) / "base" / "transformer")
    prompts = torch.randn(request.batch + 1, length, shape["text_dim"])
    rows = torch.randn(request.batch, *latents)
    write_latents(Path(folder) / "data", rows, prompts[:-1], prompts[-1:], ["noise"] * request.batch)
    options = {"base": f"{folder}/base", "data": f"{folder}/data", "runs": folder, "output": f"{folder}/run"}
    options |= {"steps": WARM_UP + request.steps + request.profile, "device": request.device}
    options |= {"batch": request.batch, "accumulate": request.batch, "warmup": 0, "ema_after": 0}
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

    with contextlib.nullcontext() if cuda else counter:
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
        roles = STAGES[config.stage](config, networks, {"prompt": data.null.to(device)})
        memory["roles"] = read()[0] - memory["base"]
        progress, start = {"desc": " ".join(case), "leave": False}, time.perf_counter()
        draw, watch = draws(config, data), guard(config, data)
        train_run(roles, draw, config.steps, config.accumulate, accelerator, progress, on_step, 1, guard=watch)
    if profiler:
        profiler.stop()
        by = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)
        (output / f"profile-{'-'.join(case)}.txt").write_text(table + "\n")
    rows = {name: {"forwards": count, "with_grad": grad} for name, (count, grad) in networks.counts().items()}
    memory["peak"] = max(peaks)
    return {"memory": memory, "first_step": seconds[0], "seconds": seconds[WARM_UP : last + 1], "rows": rows}


def matrix_rate(device: torch.device, size: int | None = None) -> dict:
    """TFLOP/s of a bfloat16 product of matrices of 8192^2 (512^2 on a CPU): the median of many."""
    size = size or (8192 if device.type == "cuda" else 512)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return {"size": size, "tflops": 2 * size**3 / _seconds(lambda: a @ b) / 1e12}


def attention_rates(shape: dict, clip: dict, device: torch.device) -> dict[str, float | None]:
    """TFLOP/s of fused attention over all tokens of a clip, forward and backward, by each kernel of torch.

    Attention is most of the 1.3B model's work: no step is faster than its attention. None: the kernel does not run.
    """
    frames, _, height, width = latent_shape(clip["frames"], clip["height"], clip["width"])
    heads, size = shape["num_attention_heads"], shape["attention_head_dim"]
    tokens = frames * (height // 2) * (width // 2)
    options = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value, out = (torch.randn(1, heads, tokens, size, **options) for _ in range(4))
    flop, rates = 14 * heads * tokens**2 * size, {}  # two products forward, five backward

    def attend():
        torch.autograd.grad(functional.scaled_dot_product_attention(query, key, value), (query, key, value), out)

    for name, backend in ATTENTION.items():
        if name == "math" and device.type == "cuda":
            continue  # it would hold (tokens, tokens)
        try:
            with sdpa_kernel(backend):
                rates[name] = flop / _seconds(attend) / 1e12
        except RuntimeError:
            rates[name] = None
    return rates


def _seconds(action):
    """The median of repeated calls, after one that warms up; torch's timer waits for the device."""
    action()
    return Timer("action()", globals={"action": action}).blocked_autorange(min_run_time=TIMING).median


# What is written


def markdown(report: dict) -> str:
    """The report as a page: one row per case, measured beside planned."""
    memory = "" if report["memory_gb"] is None else f", {report['memory_gb']:.1f} GB"
    matrix, batch, steps = report["matrix"], report["batch"], report["steps"]
    options = f"; {' '.join(report['options'])}" if report["options"] else ""
    lines = [
        f"## {report['device']}{memory}, {report['date']}",
        "",
        f"torch {report['torch']}, CUDA {report['cuda'] or 'none'}. Matrices of {matrix['size']}^2 in bfloat16: "
        f"{matrix['tflops']:.4g} TFLOP/s (median). Random weights; the mean of {steps} step{'s' * (steps > 1)} of "
        f"{batch} clip{'s, one after another' * (batch > 1)}{options}.",
        "",
    ]
    for size, rates in report["attention"].items():
        words = ", ".join(f"{name} {'does not run' if r is None else f'{r:.4g}'}" for name, r in rates.items())
        lines += [f"Attention of {size}, forward and backward, TFLOP/s: {words}.", ""]
    titles = ["case", "clip", "s per step", "model TFLOP/s", "share", "base", "roles", "optimiser", "peak", "plan"]
    lines += [f"| {' | '.join([*titles, 'off by'])} |", "|" + "---|" * (len(titles) + 1)]
    lines += [f"| {' | '.join(_row(entry))} |" for entry in report["cases"]]
    lines += ["", "Memory in GB. Share: of the matrices' rate, counting model FLOP as the plan does, no recomputation."]
    return "\n".join(lines) + "\n"


def _row(entry):
    clip, planned = entry["clip"], entry["plan"]["peak"]
    row, plan = [entry["case"], f"{clip['frames']} x {clip['height']} x {clip['width']}"], f"{planned / 1e9:.4g}"
    if "left_out" in entry:
        return [*row, *[""] * 7, plan, entry["left_out"]]
    parts = [f"{entry['memory'][name] / 1e9:.4g}" for name in ("base", "roles", "optimiser", "peak")]
    row += [f"{entry['seconds_a_step']:.4g}", f"{entry['tflops']:.4g}", f"{entry['share']:.1%}", *parts]
    return [*row, plan, f"{planned / entry['memory']['peak'] - 1:+.1%}"]
