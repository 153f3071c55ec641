"""The configuration of a run: typed options, overlays of YAML over their defaults, all checked before anything runs.

An option, its default, its bounds and its words stand once, in the classes below. Over the defaults come overlays
(names of files in configs/, or paths) in the order of LAYERS, then key=value pairs. Unknown options, wrong types and
settings that contradict each other are one line each. `${name}` in a value is the value of another option.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from minianyflow.support.errors import InputError, choose
from minianyflow.wan.intervals import WORDS, seconds_of

CONFIGS = Path(__file__).parent / "configs"
LAYERS = {  # at most one of each, in this order: a later layer may set what an earlier one has set
    "model": ("wan-1.3b", "wan-14b", "wan-5b"),
    "architecture": ("bidirectional", "causal"),
    "stage": ("teacher", "forward", "on_policy", "forward-published", "on_policy-published"),
    "size": ("tiny", "first-week"),
}
FREE = (  # what may change when a run resumes: on sound data, what a step computes is the same but for rounding
    *("runs", "output", "data_skip", "steps", "accumulate", "checkpointing", "keep_attention", "compiled", "device"),
    *("memory", "offload", "shard_base", "checkpoints", "resume", "on_nan", "log", "samples"),
)
PROMPTS = [
    "A red panda eats bamboo in a misty forest, close up, soft morning light.",
    "A sailing boat crosses a stormy sea at dusk, seen from above.",
]
typed = dataclass(config=ConfigDict(strict=True, allow_inf_nan=False))
Text = Annotated[str, "text"]  # taken as it is written: a folder may be called 007
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Steps = Annotated[int, Field(ge=1, le=10**5)]  # of a rollout


def _interval(value):
    try:
        return value if isinstance(value, int) and value >= 0 else f"{value}" * bool(seconds_of(f"{value}"))
    except ValueError as problem:
        raise PydanticCustomError("interval", f"{problem}") from None


Interval = Annotated[int | str, BeforeValidator(_interval)]
Objective = Literal["eulerian", "lagrangian", "semigroup", "mixed"]
Beta = Annotated[float, Field(ge=0, lt=1)]


def option(default, words, **bounds):
    """A field of a configuration: its default, its words and its bounds."""
    return Field(default, description=words, **bounds)


@typed
class Guidance:
    """Classifier-free guidance, learnt into the flow map."""

    scale: float = option(3.0, "guidance scale; 1: none", ge=1)
    published: bool = option(False, "false: the flow map of the guided ODE; true: AnyFlow's form, eulerian alone")


@typed
class Causal:
    """What architecture=causal adds: chunks of latent frames."""

    first: Count = option(1, "latent frames of the first chunk")
    rest: Count = option(3, "latent frames of other chunks; the last may be shorter: 1, 3, 3, 3, 3, 3, 3, 2 of 21")
    full_chunks: int = option(3, "number of last chunks seen in full; older ones are seen in coarse patches", ge=2)
    coarse_patches: Literal["lora", "whole"] = option("lora", "how their embedding learns; whole: its bias, too")
    long_context: Share = option(0.5, "share of steps of full_chunks chunks or more, at random; others have so many")
    bidirectional: Share = option(0.1, "share of steps that train the clip as one chunk")
    bidirectional_adds: bool = option(False, "whether they only add its velocity, without weight, to the chunks' loss")


@typed
class OnPolicy:
    """What stage=on_policy adds: backward simulation and distribution matching."""

    rollouts: list[Steps] = option([2, 4, 8, 16, 50], "step counts of the simulated rollouts", min_length=1)
    shared_rollout: bool = option(False, "whether all rows of a step simulate one step of one rollout")
    null_prompts: Literal["everywhere", "forward"] = option("everywhere", "what sees them; forward: its loss alone")
    real_guidance: float = option(4.0, "guidance scale of the teacher: null + scale (text - null)", ge=1)
    fake_lr: float = option("${lr}", "learning rate of the fake score", gt=0)
    fake_embedders: bool = option(True, "whether adapters of the fake score are on the embedders of time, too")
    forward_weight: float = option(1.0, "weight of the forward loss; without it the many-step end is lost", ge=0)
    context_gradient: bool = option(False, "causal: whether gradient passes through earlier chunks")
    score_time: Literal["uniform", "logit_normal"] = option("uniform", "times of the fake score, before the shift")


@typed
class Checkpoints:
    """The folder checkpoints/ of the run; removed when the run is finished."""

    every: Interval = option("30 min", "steps, or time, between checkpoints; saved at the end, SIGTERM and Ctrl-C, too")
    keep: Count = option(3, "number of newest checkpoints on disk")


@typed
class OnNan:
    """What happens to a batch whose loss or gradient is not finite; bad_batch.json names its samples."""

    skip: int = option(0, "number of bad batches that are skipped, without a step; the next one stops the run", ge=0)
    above: float | None = option(1e4, "a loss above this is bad, too; null: any finite loss is good", gt=0)


@typed
class Log:
    """Losses, learning rates and gradient norms as entries of the history; trackers see time and memory, too."""

    every: Interval = option("1 min", "steps, or time, between entries")
    tracker: Literal["tensorboard", "wandb", "none"] = option("tensorboard", "where entries and samples go as well")


@typed
class Samples:
    """Clips that are sampled while training."""

    every: Interval = option("2 h", "steps, or time, between samples; first and last step, too; 0: never")
    steps: list[Steps] = option([1, 4, 32], "step counts of the samples", min_length=1)
    last: bool = option(False, "whether the last weights are sampled beside their average, too")
    prompts: list[Text] = option(PROMPTS, "prompts of the samples")


@typed
class Config:
    """All options of a run. The defaults are our recipe for the forward stage of Wan2.1 1.3B."""

    stage: Literal["teacher", "forward", "on_policy"] = option("forward", "on_policy: distribution matching")
    architecture: Literal["bidirectional", "causal"] = option("bidirectional", "causal: chunk by chunk")
    runs: Text = option("outputs/wan-1.3b", "folder of the runs of one model")
    output: Text = option("${runs}/${architecture}-${stage}", "folder of this run")
    base: Text = option("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "pipeline with the frozen transformer: folder or hub name")
    student: Text | None = option(None, "run folder that the student starts from; null: from the base")
    teacher: Text | None = option(None, "run folder of the tuned teacher; null: the base itself")
    data: Text = option("data/wan-1.3b", "folder of captioned latents")
    data_skip: int = option(0, "number of broken clips that are left out; one more stops the run", ge=0)
    seed: int = option(0, "seed of weights, data order and noise", ge=0, le=2**53)

    objective: Objective = option("mixed", "what the flow map is regressed on; mixed: half eulerian, half semigroup")
    velocity: Literal["data", "base"] | None = option(None, "data: eps - x; base: the teacher's; null: by objective")
    delta: float = option(5e-3, "half the width of the finite difference in time", gt=0)
    diagonal: Share = option(0.5, "share of rows with r = t")
    diagonal_time: Literal["uniform", "larger", "logit_normal"] = option("uniform", "their t; larger: of two uniforms")
    end: Share = option(0.25, "share of rows with r = 0")
    shift: float = option(5.0, "time shift s -> shift s / (1 + (shift - 1) s), for t, r and sampling", ge=1e-3, le=1e3)
    drop: Share = option(0.1, "share of rows with the null prompt")
    i2v_prob: Share = option(0.0, "share of rows that know their first latent frame and learn the rest: image to video")
    guidance: Guidance = Field(default_factory=Guidance)
    weight: Literal["none", "sqrt", "anyflow"] = option("anyflow", "of a row by its t: 1, sqrt(1 - t) or t sqrt(1 - t)")
    rebalance: bool = option(False, "scale rows r < t to the mean loss of rows r = t; not with semigroup rows")
    adaptive: float = option(0.0, "power of the adaptive weight; 0: none", ge=0)

    trained: Literal["lora", "full"] = option("lora", "lora: adapters on one frozen base; full: all weights, per role")
    rank: Count = option(256, "rank of the adapters")
    alpha: float = option("${rank}", "scale of the adapters, times their rank", gt=0)
    steps: Count = option(6000, "optimiser steps")
    batch: Count = option(32, "global batch size: over all processes and micro-batches")
    accumulate: Count = option(1, "number of micro-batches per process (gradient accumulation)")
    lr: float = option(5e-5, "learning rate of AdamW, constant after the warm-up", gt=0)
    betas: list[Beta] = option([0.9, 0.95], "betas of AdamW", min_length=2, max_length=2)
    weight_decay: float = option(0.0, "weight decay of AdamW", ge=0)
    warmup: int = option(1000, "steps of linear warm-up", ge=0)
    clip: float | None = option(1.0, "maximal gradient norm; null: no clipping", gt=0)
    ema: Share = option(0.999, "decay of the weight average")
    ema_after: int = option(1000, "steps before the average begins", ge=0)

    precision: Literal["bf16", "fp32"] = option("bf16", "bf16: trained weights and times stay in float32")
    base_dtype: Literal["precision", "int8"] = option(
        "precision", "of the frozen blocks; int8: half of bf16, with an error that the run states; exports take bf16"
    )
    checkpointing: bool = option(True, "recompute activations in the backward pass")
    keep_attention: bool = option(False, "but not those of self-attention: less work, twice the memory per block")
    compiled: bool = option(False, "torch.compile each block: minutes at the start, then fewer passes over memory")
    memory: Literal["auto", "fast", "small"] = option(
        "auto", "of a rollout, small keeps states and recomputes all jumps but the last; auto: where fast does not fit"
    )
    offload: list[Literal["states", "blocks", "halves", "base"]] = option(
        [],
        "what rests in CPU memory; states: optimiser's moments and the average; blocks: their kept inputs, and causal "
        "caches; halves: two inputs per block, so that half of one is recomputed at a time; base: frozen weights of "
        "blocks, one block at a time on the GPU",
    )
    sequence_parallel: Count = option(
        1, "number of processes that share the tokens of a clip; 1: each has its own clips"
    )
    shard_base: bool = option(False, "each process keeps a part of every frozen block; all gather it for its forward")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one")

    causal: Causal = Field(default_factory=Causal)
    on_policy: OnPolicy = Field(default_factory=OnPolicy)
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    resume: Literal["auto", "never"] = option("auto", "auto: resume from the newest whole checkpoint, if there is one")
    on_nan: OnNan = Field(default_factory=OnNan)
    log: Log = Field(default_factory=Log)
    samples: Samples = Field(default_factory=Samples)


SECTIONS = {name: field.annotation for name, field in Config.__pydantic_fields__.items() if field.default_factory}
OPTIONS = {  # {full name: field}, in order
    (f"{name}.{inner}" if inner else name): leaf
    for name, field in Config.__pydantic_fields__.items()
    for inner, leaf in (SECTIONS[name].__pydantic_fields__ if name in SECTIONS else {"": field}).items()
}
TEXTS = {name for name, field in OPTIONS.items() if "'text'" in f"{field.annotation} {field.metadata}"}


def load_config(files: Sequence[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """The `Config` of the defaults, then `files` in order, then `overrides` ("key=value", dots for sections).

    files: names of overlays in minianyflow/wan/configs, like "causal", or paths ending in .yaml.
    Raises InputError, one line, for what does not exist, has another type or contradicts.
    """
    _check_order([str(file) for file in files])
    defaults = {name: {} if name in SECTIONS else OPTIONS[name].default for name in Config.__pydantic_fields__}
    for name, kind in SECTIONS.items():
        defaults[name] = {inner: field.default for inner, field in kind.__pydantic_fields__.items()}
    layers, origin = [*map(_read, files), *_parse(overrides)], {}
    for where, layer in layers:
        origin |= {name: f" in {where}" for name, _ in _flat(layer, where)}
    try:
        values = OmegaConf.to_container(OmegaConf.merge(defaults, *(layer for _, layer in layers)), resolve=True)
    except OmegaConfBaseException as problem:
        raise InputError(f"the configuration does not resolve: {str(problem).splitlines()[0]}") from None
    try:
        config = TypeAdapter(Config).validate_json(json.dumps(values))  # of Python's own dicts it makes no section
    except ValidationError as problem:
        raise _wrong(problem.errors()[0], values, origin) from None
    config.velocity = config.velocity or ("base" if config.objective == "lagrangian" else "data")
    flat = dict(_flat(asdict(config)))
    for name in flat:
        if name in TEXTS and str(flat[name]).startswith("~"):
            raise InputError(f"{name}={flat[name]}; nobody expands ~ here: write the whole path")
    for wrong, names, why in _contradictions(config):
        if wrong:
            raise InputError(f"{', '.join(f'{name}={flat[name]}' for name in names.split())}: {why}")
    return config


def as_yaml(config: Config, words: bool = False) -> str:
    """All of a `Config`, resolved, as text that `load_config` reads back; with `words`, one line per option."""
    lines = [(f"{name}: {json.dumps(value)}", OPTIONS[name].description) for name, value in _flat(asdict(config))]
    return "".join(f"{line:42}  # {text}\n" for line, text in lines) if words else OmegaConf.to_yaml(asdict(config))


def identity(config: Config) -> dict[str, Any]:
    """What may not change when a run resumes, {option: value}: all but FREE."""
    return {name: value for name, value in _flat(asdict(config)) if name.split(".")[0] not in FREE}


def find_device(name: str) -> torch.device:
    """The torch device for `device`: auto takes a GPU if there is one.

    Raises InputError if a GPU is missing, and for environment variables that start no processes on this device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if choose("device", name, {"cpu": False, "cuda": True}) and not torch.cuda.is_available():
        raise InputError("device=cuda, and torch finds no GPU here; set device=cpu, or auto, or look at nvidia-smi")
    _check_launch(name)
    return torch.device(name)


def _check_launch(device):
    """Raise InputError for variables of the environment of which accelerate or torch would make no processes."""
    again = "start processes with accelerate launch or torchrun, which set them all, or unset them all"
    kind = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if kind is not None and not re.fullmatch(rf"{device}(:\d+)?", kind):
        raise InputError(f"ACCELERATE_TORCH_DEVICE={kind!r}; expected {device}, as the device is: unset it")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if (text := os.environ.get(name)) is not None:
            if not re.fullmatch("[0-9]{1,5}", text) and (name, text) != ("LOCAL_RANK", "-1"):
                raise InputError(f"{name}={text!r} in the environment; expected a whole number: {again}")
            numbers[name] = int(text)
    if numbers.get("WORLD_SIZE", 1) == 1 and (device == "cpu" or numbers.get("LOCAL_RANK", -1) < 0):
        return  # one process
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise InputError(f"several processes by the environment, and no {name} in it; {again}")
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        whole = whole if whole in numbers else "WORLD_SIZE"
        if numbers[part] >= numbers[whole]:
            raise InputError(f"{part}={numbers[part]} of {whole}={numbers[whole]}; expected a smaller one: {again}")


def _contradictions(c: Config) -> Iterator[tuple[Any, str, str]]:
    """Whether settings contradict each other; which; why, and what to set instead."""
    teacher, scale, from_base = c.stage == "teacher", c.guidance.scale, c.velocity == "base"
    forward = c.stage == "forward" or (c.stage == "on_policy" and c.on_policy.forward_weight > 0)
    chunk_teacher = c.stage == "forward" and c.teacher  # on-policy the teacher scores whole clips
    semigroup, no_prompt = c.objective in ("semigroup", "mixed"), not "".join(c.samples.prompts).strip()
    yield c.batch % c.accumulate, "batch accumulate", "the micro-batches would not be equal; change either"
    yield c.diagonal + c.end > 1, "diagonal end", "these are more than all rows; expected a sum of at most 1"
    yield teacher and c.diagonal < 1, "stage diagonal", "a teacher learns r = t alone; name the overlay teacher"
    yield teacher and scale != 1, "stage guidance.scale", "a teacher is guided when it samples; set guidance.scale=1"
    yield forward and c.diagonal == 1, "stage diagonal", "no row r < t to learn a flow map from; the default is 0.5"
    why = "the published form is for eulerian alone; set objective=eulerian or guidance.published=false"
    yield forward and c.guidance.published and c.objective != "eulerian", "guidance.published objective", why
    why = "a semigroup target has no noise, and its rows scaled up would drown the others; set rebalance=false"
    yield forward and c.rebalance and semigroup, "rebalance objective", why
    why = "lagrangian needs the velocity at the end of a jump, which data does not have; set velocity=base"
    yield c.objective == "lagrangian" and not from_base, "objective velocity", why
    why = "this takes a teacher trained chunk by chunk; in stage=forward set teacher= to its run, or set velocity=data"
    causal_from_base = forward and c.architecture == "causal" and from_base
    yield causal_from_base and not chunk_teacher, "architecture velocity teacher", why
    yield scale != 1 and not c.drop, "guidance.scale drop", "nothing would train the null prompt; set drop=0.1"
    why = "it starts from a student; name the run folder of a forward stage: student=FOLDER"
    yield c.stage == "on_policy" and not c.student, "stage student", why
    why = "without checkpointing all activations are kept; set one of them the other way"
    yield c.keep_attention and not c.checkpointing, "keep_attention checkpointing", why
    why = "what is recomputed needs neither kept inputs nor caches; set memory=fast, or leave blocks out"
    small = c.stage == "on_policy" and c.memory == "small"
    yield small and "blocks" in c.offload, "offload memory", why
    why = "without checkpointing all of a block stays on the GPU; set checkpointing=true"
    yield not c.checkpointing and {"blocks", "base"} & {*c.offload}, "offload checkpointing", why
    yield not c.checkpointing and c.shard_base, "shard_base checkpointing", why
    why = "halves are those of blocks whose inputs are kept: add blocks"
    yield "halves" in c.offload and "blocks" not in c.offload, "offload", why
    why = (
        "a half needs the weights of its block on the GPU, uncompiled, and all tokens; leave out halves, or change this"
    )
    for name, other in (
        ("offload", "base" in c.offload),
        ("shard_base", c.shard_base),
        ("compiled", c.compiled),
        ("sequence_parallel", c.sequence_parallel > 1),
    ):
        yield "halves" in c.offload and other, f"offload {name}" if name != "offload" else name, why
    why = "the attention that is kept stays on the GPU; set one of them the other way"
    yield c.keep_attention and "blocks" in c.offload, "offload keep_attention", why
    for name, resting in (("offload", "base" in c.offload), ("shard_base", c.shard_base)):
        why = "no weights are frozen; set trained=lora, or leave the base where it is"
        yield resting and c.trained == "full", f"{name} trained", why
        why = "a compiled block cannot change its weights; set compiled=false, or leave the base where it is"
        yield resting and c.compiled, f"{name} compiled", why
    why = "a compiled block cannot exchange tokens; set one of them the other way"
    yield c.sequence_parallel > 1 and c.compiled, "sequence_parallel compiled", why
    why = "no weights are frozen; set trained=lora, or base_dtype=precision"
    yield c.base_dtype == "int8" and c.trained == "full", "base_dtype trained", why
    why = "frozen weights rest in one place; leave base out, or set shard_base=false"
    yield c.shard_base and "base" in c.offload, "shard_base offload", why
    why = "processes would evaluate unequally often and wait for each other for ever; set on_policy.shared_rollout=true"
    unequal = c.stage == "on_policy" and c.shard_base and not c.on_policy.shared_rollout
    yield unequal, "shard_base on_policy.shared_rollout", why
    yield c.warmup >= c.steps, "warmup steps", "lr would never be reached; set warmup lower"
    yield c.ema_after >= c.steps, "ema_after steps", "the average would never begin; set ema_after lower"
    yield c.ema == 1, "ema", "the average would never move; set ema lower, like 0.999"
    yield c.on_nan.skip and c.clip is None, "on_nan.skip clip", "a gradient that is not finite would pass; set clip=1"
    for name in ("checkpoints", "log"):
        yield getattr(c, name).every == 0, f"{name}.every", f"it should be {WORDS}, at least 1"
    yield c.samples.every and no_prompt, "samples.every samples.prompts", "give prompts, or set samples.every=0"


def _check_order(files):
    """Overlays stand in the order of LAYERS: one named too early would silently be undone."""
    place = {name: number for number, names in enumerate(LAYERS.values()) for name in names}
    for one, other in pairwise(file for file in files if file in place):
        if place[one] >= place[other]:
            raise InputError(f"{one} before {other}; expected one of each at most, in the order {', '.join(LAYERS)}")


DEEPEST = 50  # levels of YAML
JSON_VALUE = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]+)?(e[-+]?[0-9]+)?|true|false", re.IGNORECASE)


def _read(name):
    """(file name, options) of an overlay or a path."""
    path, overlays = Path(name), {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if path.suffix not in (".yaml", ".yml"):
        path = choose("configuration", str(name), overlays)
    elif not path.is_file():
        raise InputError(f"no file {name}; expected one, or one of {', '.join(overlays)}")
    try:
        layer = _value(_compose(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as problem:
        why = " ".join(str(problem).split())
        raise InputError(f"{path} is not YAML ({why}); expected lines like `steps: 6000`, texts in quotes") from None
    if not isinstance(layer, dict):
        raise InputError(f"{path} holds no options; expected lines like `steps: 6000`")
    return path.name, layer


def _parse(overrides):
    """A layer per "key=value"."""
    for pair in overrides:
        if not re.match(r" *[\w.]+ *=", pair):
            raise InputError(f"{pair!r} on the command line; expected key=value, like steps=100 or guidance.scale=2")
        name, text = (part.strip() for part in pair.split("=", 1))
        try:
            node = _compose(text)
            if node is None or (isinstance(node, yaml.ScalarNode) and not node.style):
                node = yaml.ScalarNode(None, text)  # `a #1` has no comment
            layer = _value(node, name)
        except (yaml.YAMLError, ValueError) as problem:
            why = str(problem).splitlines()[0]
            raise InputError(f"{pair} cannot be read ({why}); quote values") from None
        for part in reversed(name.split(".")):
            layer = {part: layer}
        yield "the command line", layer


def _compose(text):
    """The tree of YAML. Raises ValueError for what is nested too deeply, for an alias and for a tag."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise ValueError(f"a value begins with {'*' if isinstance(event, yaml.AliasEvent) else '!'}")
    return yaml.compose(text, yaml.SafeLoader)


def _value(node, name=""):
    """The value of the option `name` that a tree of YAML holds: a text stays what was written, 007 or 12:30 or on.

    Numbers are those of JSON, and may begin with +. Raises ValueError for a name that comes twice, and for a text that
    YAML takes for a section.
    """
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, name) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        if name in TEXTS:
            raise ValueError(f"{name} holds a text with ': ' in it, or braces")
        names = [key.value for key, _ in node.value]
        if len({*map(str, names)}) < len(names):
            raise ValueError(f"duplicate names among {', '.join(map(str, names))}")
        return {
            f"{key}": _value(inner, f"{name}.{key}".strip("."))
            for key, (_, inner) in zip(names, node.value, strict=True)
        }
    text, quoted = (node.value, bool(node.style)) if node else ("", False)
    if text.lower() in ("null", "~", "") and not quoted:
        return None
    if quoted and node.style in "|>":
        text = text.rstrip("\n")  # the end of a block is no part of the text
    if quoted or name in TEXTS or not JSON_VALUE.fullmatch(text):
        return text
    return json.loads(text.lower().lstrip("+"))


def _flat(given, where="", prefix=""):
    """Pairs (full name, value). Raises InputError for an option that does not exist."""
    for name, value in given.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict) and full in SECTIONS:
            yield from _flat(value, where, f"{full}.")
        elif isinstance(value, dict) or full not in OPTIONS:
            full += f".{next(iter(value), '')}" if full in OPTIONS else ""
            raise InputError(f"unknown option {full!r} in {where}; {_nearest(full)}")
        else:
            yield full, value


def _nearest(name):
    """What may have been meant: options of the section, of that name elsewhere, or spelt nearly so."""
    last = name.rpartition(".")[2]
    near = [full for full in OPTIONS if name == full.partition(".")[0] or last == full.rpartition(".")[2]]
    near = near or ["lr"] * (last in ("learning_rate", "learningrate"))
    near = near or difflib.get_close_matches(name, OPTIONS, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(OPTIONS)}"


def _wrong(error, values, origin):
    """The InputError for a value of another type or out of bounds."""
    if not error["loc"]:
        return InputError(
            f"the configuration cannot be read ({error['msg']}); expected texts and numbers of usual size"
        )
    name, inner, *_ = (*error["loc"], "")
    value = values[name][inner] if name in SECTIONS else values[name]
    name = f"{name}.{inner}" if name in SECTIONS else name
    if error["type"] == "literal_error":
        choose(name, error["input"], dict.fromkeys(re.findall(r"'(\w+)'", error["ctx"]["expected"])))
    why = f"{error['msg']} ({OPTIONS[name].description})".replace("Input", "it").replace("List", "it")
    return InputError(f"{name}={value}{origin.get(name, '')}; {why}")
