"""What a GPU makes of the plan: real shapes, random weights, a few steps of real training, timed and weighed.

Weights are made on the device, so that nothing is fetched; batches come from a temporary folder of random shards. All
else is what scripts/distill.py runs: its roles, draws and `training.train`. A case is one size, architecture and stage.
On a CPU the same code runs at tiny size; its memory is then counted by live tensors, and its peak is not measured.
"""

import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from minianyflow.planner.call_costs import ShapeNetworks
from minianyflow.planner.plan import plan_run
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder
from minianyflow.wan.config import LAYERS, load_config
from minianyflow.wan.data.shards import write_shards
from minianyflow.wan.data.videos import WAN_CLIP
from minianyflow.wan.folders import TINY_LENGTH, TINY_TEXT, TINY_TRANSFORMER
from minianyflow.wan.run import guard, prepare
from minianyflow.wan.shapes import SHAPES, SHARED, build_transformer, latent_shape
from minianyflow.wan.stages import STAGES, draws
from minianyflow.wan.trainer import train_run

TINY = SHARED | TINY_TRANSFORMER | {"text_dim": TINY_TEXT["d_model"], "freq_dim": 64}  # what make_tiny_wan makes
SIZES = {  # name: (shape, clip, overlays before and after architecture and stage)
    "1.3b": (SHAPES["1.3b"], WAN_CLIP, ["wan-1.3b"], []),
    "14b": (SHAPES["14b"], WAN_CLIP, ["wan-14b"], []),
    "tiny": (TINY, {"frames": 17, "height": 64, "width": 64, "length": TINY_LENGTH}, [], ["tiny"]),
}
ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
REPORT = "gpu_check.json"
OWN = ("architecture", "stage", "steps", "batch", "accumulate", "base", "data", "runs", "output", "device")
WARM_UP = 1  # steps that are not timed: allocations, choices of kernels, compilation
CHOICES = {"architecture": LAYERS["architecture"], "stage": tuple(STAGES)}


@dataclass
class Request:
    """What is asked for: every case, how many timed steps, of what clip, and where it runs.

    batch: clips a step, taken one after another; of two, one has r = t. clip: changes to the size's own. options:
    key=value pairs for the configuration of every case. profile: whether one more step is profiled.
    """

    sizes: tuple[str, ...]
    architectures: tuple[str, ...] = CHOICES["architecture"]
    stages: tuple[str, ...] = CHOICES["stage"]
    steps: int = 3
    batch: int = 2
    clip: dict | None = None
    device: str = "cuda"
    options: tuple[str, ...] = ()
    profile: bool = False

    def __post_init__(self):
        for each in self.sizes:
            choose("size", each, SIZES)
        for name, given in (("architecture", self.architectures), ("stage", self.stages)):
            for each in given:
                choose(name, each, dict.fromkeys(CHOICES[name]))
        if min(self.steps, self.batch) < 1:
            raise InputError(f"{self.steps} steps of {self.batch} clips; expected at least one of each")
        for name, value in (self.clip or {}).items():
            if value < 1 or (value % 4 != 1 if name == "frames" else value % 16):
                raise InputError(f"{name} {value}; expected {'4 n + 1 frames' if name == 'frames' else '16 n pixels'}")
        for given in self.options:
            if (name := given.split("=")[0]) in OWN:
                raise InputError(f"{name} among other options; this command sets it itself: leave it out")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "torch finds no GPU here; expected one: look at nvidia-smi, or try --device cpu --sizes tiny"
            )
        if self.device == "cpu" and set(self.sizes) != {"tiny"}:
            raise InputError(
                f"--device cpu with sizes {', '.join(self.sizes)}; expected --sizes tiny: a CPU takes days"
            )

    def cases(self):
        """(size, architecture, stage), the smallest first."""
        return list(product(sorted(self.sizes, key=("tiny", "1.3b", "14b").index), self.architectures, self.stages))


def check(request, output, tell=print):
    """Measure every case that fits; returns the report, which is written to `output` after each.

    tell: is given a line before each case and for what is left out.
    Raises InputError where no case fits; and first of all for a folder that cannot be written or has a report.
    """
    if (Path(output) / REPORT).exists():
        raise InputError(f"{output} holds a report, which may have cost hours; name another --output, or remove it")
    with staging_folder(Path(output)):  # or it would be told after the first case
        pass
    device = torch.device(request.device)
    report = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), **machine(device), "matrix": matrix_rate(device)}
    report |= {"steps": request.steps, "batch": request.batch, "options": list(request.options)}
    report |= {"attention": {}, "cases": []}
    for case in request.cases():
        name = " ".join(case)
        with tempfile.TemporaryDirectory() as folder:
            config, clip = settings(request, case, folder)
            planned = plan_run(config, clip, steps=range(WARM_UP, WARM_UP + request.steps), advise=False)
            entry = {"case": name, "clip": clip, "plan": {"peak": planned.peak, "memory": dict(planned.memory)}}
            entry["plan"]["flop"] = planned.flop
            report["cases"].append(entry)
            short = too_large(planned.peak, device)
            if short:
                entry["left_out"] = short
                tell(f"{name}: {short}")
                continue
            tell(f"{name}: planned peak {planned.peak / 1e9:.1f} GB, {planned.flop / 1e12:.4g} TFLOP a step")
            if case[0] not in report["attention"]:
                report["attention"][case[0]] = attention_rates(SIZES[case[0]][0], clip, device)
            try:
                entry |= measure(request, case, config, STAGES[config.stage], Path(output))
            except torch.OutOfMemoryError:
                entry["left_out"] = "out of memory where the plan had room"
                tell(f"{name}: {entry['left_out']}")
        _free(device)
        _share(entry, report["matrix"])
        write(report, output)
    write(report, output)
    if all("left_out" in entry for entry in report["cases"]):
        raise InputError(f"nothing could be measured: {report['cases'][0]['case']}: {report['cases'][0]['left_out']}")
    return report


def machine(device):
    """What the report says of the machine: the GPU's name, never the host's."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cpu":
        return {"device": "CPU", "memory_gb": None} | versions
    return {
        "device": torch.cuda.get_device_name(device),
        "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9,
    } | versions


def too_large(peak, device):
    """Why a case of this planned peak (bytes) cannot run here, or None."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    if peak <= free:
        return None
    return f"planned peak {peak / 1e9:.1f} GB; this GPU has {free / 1e9:.1f} of {total / 1e9:.1f} GB free: not run"


def settings(request, case, folder):
    """The configuration of a case and its clip; its random shards, and what base it plans for, are in `folder`."""
    size, architecture, stage = case
    shape, clip, before, after = SIZES[size]
    clip = clip | (request.clip or {})
    latents, length = latent_shape(clip["frames"], clip["height"], clip["width"]), clip["length"]
    build_transformer(shape, architecture).save_config(Path(folder) / "base" / "transformer")
    prompts = torch.randn(request.batch + 1, length, shape["text_dim"])
    rows = torch.randn(request.batch, *latents)
    write_shards(Path(folder) / "data", rows, prompts[:-1], prompts[-1:], ["noise"] * request.batch)
    where = {"base": f"{folder}/base", "data": f"{folder}/data", "runs": folder, "output": f"{folder}/run"}
    few = {"steps": WARM_UP + request.steps + request.profile, "batch": request.batch, "accumulate": request.batch}
    quiet = {"warmup": 0, "ema_after": 0, "samples.every": 0, "log.tracker": "none", "device": request.device}
    options = [f"{name}={value}" for name, value in (where | few | quiet).items()]
    config = load_config([*before, architecture, stage, *after], [*options, *request.options])
    return replace(config, student=None, teacher=None), clip  # random weights: no earlier stage made them


# Measuring


class Meter:
    """Memory of a device, in bytes. On a CPU: of live tensors, and no peak."""

    def __init__(self, device):
        self.device, self.cuda, self.before = device, device.type == "cuda", 0
        self.before = self.live()

    def live(self):
        """What is held now, beyond what was when the meter was made."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device) - self.before
        gc.collect()
        tensors = [
            each
            for each in gc.get_objects()
            if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu"  # none that only pretends
        ]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        return sum(storages.values()) - self.before

    def peak(self):
        """The most that was held since this was last asked, None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - self.before
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def measure(request, case, config, roles_of, output):
    """Build the case and train it: memory by part in bytes, seconds of each timed step, rows evaluated."""
    device = torch.device(request.device)
    meter, memory = Meter(device), {}
    accelerator, data, _ = prepare(config)
    networks = ShapeNetworks(config, data.shape[0], SIZES[case[0]][0], device)
    memory["base"] = meter.live()
    roles = roles_of(config, networks, {"prompt": data.null.to(device)})
    memory["roles"] = meter.live() - memory["base"]
    meter.peak()
    seconds, peaks, start = [], [], [time.perf_counter()]
    profiled = _profiler(device) if request.profile else None

    def on_step(step):
        peaks.append(meter.peak())  # it waits for the device
        seconds.append(time.perf_counter() - start[0])
        if step == 0:
            memory["optimiser"] = meter.live() - memory["base"] - memory["roles"]
        if profiled and step == WARM_UP + request.steps - 1:
            profiled.start()
        start[0] = time.perf_counter()

    bar = {"desc": " ".join(case), "leave": False}
    train_run(
        roles,
        draws(config, data),
        config.steps,
        config.accumulate,
        accelerator,
        bar,
        on_step,
        1,
        guard=guard(config, data),
    )
    if profiled:
        profiled.stop()
        _write_profile(profiled, output, case, device)
    timed = slice(WARM_UP, WARM_UP + request.steps)
    memory["peak"] = max(peaks) if meter.cuda else None
    rows = {name: {"forwards": n, "with_grad": g} for name, (n, g) in networks.counts().items()}
    return {"memory": memory, "first_step": seconds[0], "seconds": seconds[timed], "rows": rows}


def _share(entry, matrix):
    """Put the rate of a measured case into its entry: model FLOPs, recomputation not counted."""
    if "seconds" in entry:
        seconds = sum(entry["seconds"]) / len(entry["seconds"])
        rate = entry["plan"]["flop"] / seconds / 1e12
        entry |= {"seconds_a_step": seconds, "tflops": rate, "share": rate / matrix["tflops"]}


def matrix_rate(device, size=None, repeats=50):
    """What this device reaches in a bfloat16 product of matrices of 8192^2 (512^2 on a CPU): the median of many."""
    size = size or (8192 if device.type == "cuda" else 512)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return {"size": size, "repeats": repeats, "tflops": 2 * size**3 / _median(lambda: a @ b, device, repeats) / 1e12}


def attention_rates(shape, clip, device, repeats=5):
    """TFLOP/s of fused attention over all tokens of a clip, forward and backward, for each way torch has here.

    Attention is most of the 1.3B model's work: no step is faster than its share of it. None: not to be had here.
    """
    frames, _, high, wide = latent_shape(clip["frames"], clip["height"], clip["width"])
    heads, width = shape["num_attention_heads"], shape["attention_head_dim"]
    tokens = frames * (high // 2) * (wide // 2)
    options = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value, out = (torch.randn(1, heads, tokens, width, **options) for _ in range(4))
    flop = 14 * heads * tokens**2 * width  # two products forward, five backward

    def both():
        torch.autograd.grad(functional.scaled_dot_product_attention(query, key, value), (query, key, value), out)

    rates = {}
    for name, backend in ATTENTION.items():
        if name == "math" and device.type == "cuda":
            continue  # it would hold (tokens, tokens)
        try:
            with sdpa_kernel(backend):
                rates[name] = flop / _median(both, device, repeats) / 1e12
        except RuntimeError:
            rates[name] = None
    return rates


def _median(action, device, repeats):
    """Seconds of action(), the median, after three that are not counted."""
    every = []
    for index in range(repeats + 3):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            action()
            last.record()
            torch.cuda.synchronize(device)
            seconds = first.elapsed_time(last) / 1e3
        else:
            start = time.perf_counter()
            action()
            seconds = time.perf_counter() - start
        every += [seconds] * (index >= 3)
    return statistics.median(every)


def _profiler(device):
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * (device.type == "cuda"))


def _write_profile(profiled, output, case, device):
    by = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    table = profiled.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"profile-{'-'.join(case)}.txt").write_text(table + "\n")


def _free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# What is written


def write(report, output):
    """gpu_check.json and gpu_check.md in the folder `output`."""
    with staging_folder(Path(output)) as folder:
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        (folder / "gpu_check.md").write_text(markdown(report))


def markdown(report):
    """The report as a page: one row a case, measured beside planned."""
    held = "" if report["memory_gb"] is None else f", {report['memory_gb']:.1f} GB"
    matrix, batch = report["matrix"], report["batch"]
    lines = [
        f"## {report['device']}{held}, {report['date']}",
        "",
        f"torch {report['torch']}, CUDA {report['cuda'] or 'none'}. Matrices of {matrix['size']}^2 in bfloat16: "
        f"{matrix['tflops']:.4g} TFLOP/s, the median of {matrix['repeats']}. Random weights; the mean of "
        f"{report['steps']} step{'s' * (report['steps'] > 1)} of {batch} clip{'s, one after another' * (batch > 1)}"
        + (f"; {' '.join(report['options'])}." if report["options"] else "."),
        "",
    ]
    for size, rates in report["attention"].items():
        told = ", ".join(f"{name} {'not to be had' if r is None else f'{r:.4g}'}" for name, r in rates.items())
        lines += [f"Attention of {size}, forward and backward, TFLOP/s: {told}.", ""]
    titles = [
        "case",
        "clip",
        "s a step",
        "model TFLOP/s",
        "share",
        "base",
        "roles",
        "optimiser",
        "peak",
        "plan",
        "off by",
    ]
    lines += [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(_row(entry))} |" for entry in report["cases"]]
    lines += [
        "",
        "Memory in GB. Share: of the matrices' rate, counting model FLOPs as the plan does, recomputation not.",
    ]
    return "\n".join(lines) + "\n"


def _row(entry):
    clip, planned = entry["clip"], entry["plan"]["peak"]
    told = [entry["case"], f"{clip['frames']} x {clip['height']} x {clip['width']}"]
    if "left_out" in entry:
        return [*told, *[""] * 7, _gb(planned), entry["left_out"]]
    memory, peak = entry["memory"], entry["memory"]["peak"]
    off = "not measured" if peak is None else f"{planned / peak - 1:+.1%}"
    rates = [f"{entry['seconds_a_step']:.4g}", f"{entry['tflops']:.4g}", f"{entry['share']:.1%}"]
    parts = [_gb(memory[name]) for name in ("base", "roles", "optimiser", "peak")]
    return [*told, *rates, *parts, _gb(planned), off]


def _gb(count):
    return "not measured" if count is None else f"{count / 1e9:.4g}"
