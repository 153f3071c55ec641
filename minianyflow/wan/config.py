"""What a run of scripts/distill.py is told: one set of options, layer upon layer of YAML, checked before anything.

configs/base.yaml holds every option with its default and says what it means. Over it come overlays, a name for
those beside it, in the order of LAYERS; then key=value pairs. Nothing is left to be found out hours later: unknown
options, wrong types and settings that contradict each other are one line each.
"""

import difflib
import re
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minianyflow.support.errors import InputError, choose

CONFIGS = Path(__file__).parent / "configs"
LAYERS = {  # one of each at most, in this order: a later one may set what an earlier one has set
    "model": ("wan-1.3b", "wan-14b"),
    "architecture": ("bidirectional", "causal"),
    "stage": ("teacher", "forward", "on_policy", "forward-published", "on_policy-published"),
    "size": ("tiny",),
}


@dataclass
class Guidance:
    """Fused into the flow map: guidance.Guidance."""

    scale: float
    published: bool


@dataclass
class Causal:
    """Chunks and what of them is trained on."""

    first: int
    rest: int
    full_chunks: int
    long_context: float
    bidirectional: float


@dataclass
class OnPolicy:
    """Backward simulation and distribution matching: on_policy.OnPolicyLoss, on_policy.FakeScoreLoss."""

    rollouts: list[int]
    real_guidance: float
    fake_lr: float
    forward_weight: float
    context_gradient: bool
    score_time: str


@dataclass
class Log:
    """What is written down, and where."""

    every: int
    tracker: str


@dataclass
class Samples:
    """What is sampled while training."""

    every: int
    steps: list[int]
    prompts: list[str]


@dataclass
class Checkpoints:
    """What a run goes on from: checkpoints.Checkpoints."""

    every: int
    keep: int


@dataclass
class OnNan:
    """What becomes of a bad batch: faults.Guard."""

    skip: int
    above: float | None


@dataclass
class Config:
    """Every option; base.yaml says what they mean."""

    stage: str
    architecture: str
    runs: str
    output: str
    base: str
    student: str | None
    teacher: str | None
    data: str
    data_skip: int
    seed: int

    objective: str
    velocity: str | None  # None until it is resolved
    delta: float
    diagonal: float
    end: float
    shift: float
    drop: float
    guidance: Guidance
    weight: str
    rebalance: bool
    adaptive: float

    trained: str
    rank: int
    alpha: float
    steps: int
    batch: int
    accumulate: int
    lr: float
    betas: list[float]
    weight_decay: float
    warmup: int
    clip: float | None
    ema: float
    ema_after: int

    precision: str
    checkpointing: bool
    keep_attention: bool
    compiled: bool
    device: str

    causal: Causal
    on_policy: OnPolicy
    checkpoints: Checkpoints
    resume: str
    on_nan: OnNan
    log: Log
    samples: Samples


CHOICES = {
    "stage": ("teacher", "forward", "on_policy"),
    "architecture": ("bidirectional", "causal"),
    "objective": ("eulerian", "lagrangian", "semigroup", "mixed"),
    "velocity": ("data", "base"),
    "weight": ("sqrt", "anyflow"),
    "trained": ("lora", "full"),
    "precision": ("bf16", "fp32"),
    "device": ("auto", "cpu", "cuda"),
    "on_policy.score_time": ("uniform", "logit_normal"),
    "resume": ("auto", "never"),
    "log.tracker": ("tensorboard", "none"),
}
AT_LEAST = {
    **dict.fromkeys(("steps", "batch", "accumulate", "rank", "log.every"), 1),
    **dict.fromkeys(("causal.first", "causal.rest"), 1),
    "causal.full_chunks": 2,
    **dict.fromkeys(("guidance.scale", "on_policy.real_guidance"), 1),
    **dict.fromkeys(("adaptive", "weight_decay", "warmup", "ema_after", "on_policy.forward_weight"), 0),
    **dict.fromkeys(("checkpoints.every", "checkpoints.keep"), 1),
    **dict.fromkeys(("on_nan.skip", "data_skip", "samples.every", "diagonal", "end", "seed"), 0),
}
POSITIVE = ("lr", "on_policy.fake_lr", "delta", "shift", "alpha", "clip", "on_nan.above")
FREE = (  # what a run that goes on may be told anew: on sound data, what a step computes is the same but for rounding
    *("runs", "output", "data_skip", "steps", "accumulate", "checkpointing", "keep_attention", "compiled", "device"),
    *("checkpoints", "resume", "on_nan", "log", "samples"),
)
SHARES = ("causal.long_context", "causal.bidirectional", "drop", "ema")


def load_config(files=(), overrides=()):
    """The `Config` of base.yaml, then `files` in order, then `overrides` ("key=value", dots for sections).

    files: names of overlays in minianyflow/wan/configs, like "causal", or paths ending in .yaml.
    Raises InputError, one line, for what does not exist, has another type or contradicts.
    """
    _check_order(files)
    merged = OmegaConf.structured(Config)
    for name in ("base", *files):
        path = _path(name)
        merged = _merge(merged, _read(path), path.name)
    merged = _merge(merged, _parse(overrides), "the command line")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as problem:
        raise InputError(f"the configuration does not resolve: {_first_line(problem)}") from None
    config.velocity = config.velocity or ("base" if config.objective == "lagrangian" else "data")
    check_config(config)
    return config


def as_yaml(config):
    """All of a `Config`, resolved, as text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def identity(config):
    """What may not change while a run goes on, {option: value}: all but FREE."""
    flat = {}
    for name in _option_names(Config):
        if name.split(".")[0] not in FREE:
            flat[name] = _get(config, name)
    return flat


def check_config(config):
    """Raise InputError for a value outside its range, or settings that contradict each other."""
    _check_ranges(config)
    for wrong, what in _contradictions(config):
        if wrong:
            raise InputError(what)


def find_device(name):
    """The torch device for `device`: auto takes a GPU where there is one. Raises InputError where one is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if choose("device", name, {"cpu": False, "cuda": True}) and not torch.cuda.is_available():
        raise InputError("device=cuda, and torch finds no GPU here; set device=cpu, or auto, or look at nvidia-smi")
    return torch.device(name)


# What may stand in a configuration


def _check_ranges(config):
    for name, known in CHOICES.items():
        choose(name, _get(config, name), dict.fromkeys(known))
    for name, least in AT_LEAST.items():
        if not _get(config, name) >= least:
            raise InputError(f"{name}={_get(config, name)}; expected at least {least}")
    for name in POSITIVE:
        value = _get(config, name)
        if value is not None and not value > 0:
            raise InputError(f"{name}={value}; expected more than 0")
    for name in SHARES:
        if not 0 <= _get(config, name) <= 1:
            raise InputError(f"{name}={_get(config, name)}; expected a share, from 0 to 1")
    for name in ("samples.steps", "on_policy.rollouts"):
        if not _get(config, name) or min(_get(config, name)) < 1:
            raise InputError(f"{name}={_get(config, name)}; expected step counts, each at least 1")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise InputError(f"betas={config.betas}; expected two numbers from 0 to below 1")


def _contradictions(config):
    """Pairs: is it so, and what to say then."""
    teacher = config.stage == "teacher"
    forward = config.stage == "forward" or (config.stage == "on_policy" and config.on_policy.forward_weight > 0)
    published, scale = config.guidance.published, config.guidance.scale
    chunk_teacher = config.stage == "forward" and config.teacher  # on-policy the teacher scores whole clips
    yield (
        config.batch % config.accumulate,
        f"batch={config.batch} does not divide into accumulate={config.accumulate} equal parts; change either",
    )
    yield (
        config.diagonal + config.end > 1,
        f"diagonal={config.diagonal} and end={config.end} are more than all rows; expected a sum of at most 1",
    )
    yield (
        teacher and config.diagonal < 1,
        f"stage=teacher with diagonal={config.diagonal}; a teacher learns r = t alone: name the overlay teacher",
    )
    yield (
        teacher and scale != 1,
        f"stage=teacher with guidance.scale={scale}; a teacher is guided where it is asked: set guidance.scale=1",
    )
    yield (
        forward and config.diagonal == 1,
        f"stage={config.stage} with diagonal=1 has no row r < t to learn a flow map from; the default is 0.5",
    )
    yield (
        forward and published and config.objective != "eulerian",
        f"guidance.published with objective={config.objective}; it is for eulerian alone: "
        "set objective=eulerian or guidance.published=false",
    )
    yield (
        forward and config.rebalance and config.objective in ("semigroup", "mixed"),
        f"rebalance with objective={config.objective}; a semigroup target has no noise, so that its rows scaled up to "
        "the others' loss would drown them: set rebalance=false",
    )
    yield (
        config.objective == "lagrangian" and config.velocity == "data",
        "objective=lagrangian with velocity=data; it asks for the velocity where a jump lands, which data does not "
        "have: set velocity=base",
    )
    yield (
        forward and config.architecture == "causal" and config.velocity == "base" and not chunk_teacher,
        "velocity=base for a causal student; it takes a teacher that was trained chunk by chunk: in stage=forward set "
        "teacher= to the run of a causal teacher, or set velocity=data",
    )
    yield (
        scale != 1 and not config.drop,
        f"guidance.scale={scale} with drop=0; nothing would train the null prompt: set drop=0.1",
    )
    yield (
        config.stage == "on_policy" and not config.student,
        "stage=on_policy without a student; name the run folder of a forward stage: student=FOLDER",
    )
    yield (
        config.keep_attention and not config.checkpointing,
        "keep_attention with checkpointing=false, which keeps everything; set one of them the other way",
    )
    yield (
        config.warmup >= config.steps,
        f"warmup={config.warmup} of steps={config.steps}; lr would never be reached: set warmup lower",
    )
    yield (
        config.ema_after >= config.steps,
        f"ema_after={config.ema_after} of steps={config.steps}; the average would never begin: set ema_after lower",
    )
    yield (
        config.ema == 1,
        "ema=1; the average would never move: set ema lower, like 0.999",
    )
    yield (
        config.on_nan.skip and config.clip is None,
        f"on_nan.skip={config.on_nan.skip} with clip=null; a gradient that is not finite would pass: set clip=1",
    )
    yield (
        config.samples.every and not [prompt for prompt in config.samples.prompts if prompt.strip()],
        f"samples.every={config.samples.every} without prompts; give samples.prompts=[...], or samples.every=0",
    )


def _get(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


# Reading and merging


def _check_order(files):
    """Overlays of ours stand in the order of LAYERS: one named too early would silently be undone."""
    layers = list(LAYERS)
    layer = {name: index for index, kind in enumerate(layers) for name in LAYERS[kind]}
    named = [str(file) for file in files if str(file) in layer]
    for one, other in pairwise(named):
        if layer[one] >= layer[other]:
            expected = f"one of each at most, in the order {', '.join(layers)}"
            kinds = f"{layers[layer[one]]} {one!r} before {layers[layer[other]]} {other!r}"
            raise InputError(f"{kinds}; expected {expected}")


def _path(name):
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"no file {name}; expected one, or one of {', '.join(_overlays())}")
        return path
    return choose("configuration", str(name), _overlays())


def _overlays():
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def _read(path):
    try:
        given = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as problem:
        why = " ".join(str(problem).split())
        raise InputError(f"{path} is not YAML ({why}); expected lines like `steps: 6000`") from None
    if not OmegaConf.is_dict(given):
        raise InputError(f"{path} holds no options; expected lines like `steps: 6000`")
    return given


def _parse(overrides):
    for each in overrides:
        name, equals, _ = each.partition("=")
        if not equals or not name.strip():
            raise InputError(f"{each!r} on the command line; expected key=value, like steps=100 or guidance.scale=2")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as problem:
        raise InputError(f"{' '.join(overrides)} cannot be read ({_first_line(problem)}); quote values") from None


def _merge(merged, given, where):
    _check_keys(OmegaConf.to_container(given, resolve=False), Config, where)
    try:
        return OmegaConf.merge(merged, given)
    except OmegaConfBaseException as problem:
        key = re.sub(r"\[\d+\]$", "", problem.full_key or "")
        value = OmegaConf.select(given, key) if key else given
        raise InputError(f"{key}={value} in {where}; expected {_expected(key)}") from None


def _check_keys(given, section, where, prefix=""):
    kinds = {each.name: each.type for each in fields(section)}
    for name, value in given.items():
        full = f"{prefix}{name}"
        if name not in kinds:
            raise InputError(f"unknown option {full!r} in {where}; {_nearest(full, kinds, prefix)}")
        if is_dataclass(kinds[name]):
            if not isinstance(value, dict):
                options = ", ".join(f"{full}.{each.name}" for each in fields(kinds[name]))
                raise InputError(f"{full}={value} in {where}; it is a section: set one of {options}")
            _check_keys(value, kinds[name], where, f"{full}.")
        elif isinstance(value, dict):
            raise InputError(f"unknown option {full}.{next(iter(value), '')} in {where}; {full} is no section")


def _nearest(name, here, prefix):
    """What may have been meant: an option of that name in another section, or one spelt nearly so."""
    every = list(_option_names(Config))
    last = name.rpartition(".")[2]
    near = [full for full in every if full.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, every, n=2, cutoff=0.6)
    near = near or [prefix + each for each in difflib.get_close_matches(last, list(here), n=2, cutoff=0.5)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "base.yaml has all there are"


def _option_names(section, prefix=""):
    for each in fields(section):
        yield from (
            _option_names(each.type, f"{prefix}{each.name}.") if is_dataclass(each.type) else [prefix + each.name]
        )


def _expected(name):
    kind = Config
    for part in name.split("."):
        kind = next(each.type for each in fields(kind) if each.name == part)
    either = " or null" if kind in (str | None, float | None) else ""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {list[str]: "a list of texts", list[int]: "a list of whole numbers", list[float]: "a list of numbers"}
    words |= {float | None: "a number", str | None: "text"}
    return words[kind] + either


def _first_line(problem):
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
