"""Configurations: layers in their order, and every mistake in one line. The published ones: test_published.py."""

import re
from dataclasses import asdict
from itertools import product

import pytest
import torch

from minianyflow.support.errors import InputError
from minianyflow.wan.config import CONFIGS, FREE, LAYERS, OPTIONS, Config, as_yaml, find_device, identity, load_config

ARCHITECTURES = LAYERS["architecture"]


def test_ours_is_the_published_one_but_for_what_is_said():
    """Objective, guidance, rebalancing, the fake score's times; and where runs lie."""

    def differ(ours, published):
        one, other = (flat(asdict(load_config(["wan-1.3b", "causal", name]))) for name in (ours, published))
        return {name: one[name] for name in one if one[name] != other[name] and name not in ("output", "student")}

    ours = {"objective": "mixed", "guidance.published": False, "rebalance": False, "diagonal_time": "uniform"}
    ours |= {"causal.bidirectional_adds": False, "causal.coarse_patches": "lora"}
    assert differ("forward", "forward-published") == ours
    policy = {"score_time": "uniform", "shared_rollout": False, "null_prompts": "everywhere", "fake_embedders": True}
    policy = {f"on_policy.{name}": value for name, value in policy.items()}
    assert differ("on_policy", "on_policy-published") == ours | policy | {"causal.bidirectional": 0.1}


def flat(given, prefix=""):
    out = {}
    for name, value in given.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def test_stages_of_one_model_find_each_other():
    runs = {stage: load_config(["wan-14b", "causal", stage]) for stage in LAYERS["stage"]}
    assert runs["on_policy"].student == runs["forward"].output == "outputs/wan-14b/causal-forward"
    assert runs["on_policy-published"].student == runs["forward-published"].output
    teacher = load_config(["wan-14b", "bidirectional", "teacher"])
    assert runs["on_policy"].teacher == runs["on_policy-published"].teacher == teacher.output
    assert len({config.output for config in runs.values()}) == len(runs)  # none overwrites another's


@pytest.mark.parametrize("layers", list(product(ARCHITECTURES, LAYERS["stage"])))
def test_tiny_is_small_after_any_stage(layers):
    config = load_config([*layers, "tiny"])
    assert (config.steps, config.batch, config.warmup, config.ema_after) == (6, 4, 0, 0)
    assert (config.causal.rest, config.causal.full_chunks) == (2, 2)
    assert (config.device, config.lr, config.on_policy.fake_lr) == ("cpu", 1e-3, 1e-3)
    assert config.stage == layers[1].partition("-")[0]  # a size, nothing else


def test_every_option_has_words_and_a_default():
    assert [*flat(asdict(load_config()))] == [*OPTIONS]
    assert all(field.description for field in OPTIONS.values())
    assert (load_config().stage, load_config().velocity) == ("forward", "data")
    assert load_config(overrides=["objective=lagrangian"]).velocity == "base"
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set().union(*LAYERS.values())


@pytest.mark.parametrize("words", [False, True])
def test_the_whole_of_it_prints_and_reads_back(tmp_path, words):
    config = load_config(
        ["wan-14b", "causal", "on_policy"], ["seed=3", "samples.prompts=[a cat, 'a dog: one # 2']", "clip=null"]
    )
    text = as_yaml(config, words)
    assert "${" not in text  # resolved
    assert ("# number of micro-batches per process" in text) == words
    path = tmp_path / "config.yaml"
    path.write_text(text)
    if not words:
        assert load_config([path]) == load_config([str(path)]) == config
    assert config.samples.prompts == ["a cat", "a dog: one # 2"]
    assert (config.seed, config.clip) == (3, None)


def test_later_layers_win(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("steps: 50\nwarmup: 5\nema_after: 0\nlr: 1e-3\ndata: 2026-11-26\nguidance: {scale: 2}\n")
    config = load_config(["wan-14b", mine], ["steps=60", "guidance.scale=1.5", "output=2024"])
    assert (config.steps, config.warmup, config.batch, config.guidance.scale) == (60, 5, 16, 1.5)
    assert (config.lr, config.on_policy.fake_lr, config.data, config.output) == (1e-3, 1e-3, "2026-11-26", "2024")
    assert config.guidance.published is False  # the rest of a section stays
    assert load_config(["wan-14b", mine]).guidance.scale == 2.0


TEXTS = [
    "2025_11_25",
    "12:30",
    "007",
    "on",
    "0600",
    "1e3",
    "1.10",
    "true",
    "2026-11-26",
    "0x1F",
    "+5",
    ".5",
    "=",
    "a:b",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_what_was_written(tmp_path, text):
    """Whatever YAML takes it for, on the command line and in a file, and once more after the run wrote it down."""
    mine, again = tmp_path / "mine.yaml", tmp_path / "again.yaml"
    mine.write_text(f"output: {text}\nstudent: {text}\nsamples:\n  prompts:\n  - {text}\n  - '{text}: x'\n")
    assert load_config([mine]).output == text
    mine.write_text(mine.read_text().replace(f"output: {text}", f"output: >\n  {text}\n"))
    line = [f"output={text}", f"student={text}", f"samples.prompts=[{text}, '{text}: x']"]
    for config in (load_config([mine]), load_config((), line)):
        again.write_text(as_yaml(config))
        for read in (config, load_config([again])):
            assert (read.output, read.student, read.samples.prompts) == (text, text, [text, f"{text}: x"])


def test_on_the_command_line_nothing_is_a_comment():
    config = load_config((), ["output=a #1", "data=#1", "student=null", "lr=+1E-3"])
    assert (config.output, config.data, config.student, config.lr) == ("a #1", "#1", None, 1e-3)


def one_line(files=(), overrides=()):
    with pytest.raises(InputError) as problem:
        load_config(files, overrides)
    assert "\n" not in str(problem.value)
    return str(problem.value)


UNKNOWN = {
    "stepz=3": "unknown option 'stepz' in the command line; did you mean 'steps'",
    "guidance.scal=2": "unknown option 'guidance.scal'.*; did you mean 'guidance.scale'",
    "guidence.scale=2": "unknown option 'guidence' .*; did you mean 'guidance.scale'",
    "log.lr=3": "unknown option 'log.lr'.*; did you mean 'lr'",
    "xyzzy=1": "unknown option 'xyzzy'.*; known: stage, architecture, .*samples.prompts",
    "steps.x=1": "unknown option 'steps.x'",
    "guidance=3": "unknown option 'guidance' .*; did you mean 'guidance.scale' or 'guidance.published'",
    "lr": "'lr' on the command line; expected key=value",
    "samples.prompts=[a, b": "cannot be read .*; quote values",
}
UNKNOWN["learning_rate=1"] = "unknown option 'learning_rate' .*did you mean 'lr'"
TYPES = {
    "steps=many": r"steps=many in the command line; it should be a valid integer \(optimiser steps\)",
    "lr=fast": "^lr=fast .*valid number",
    "lr=": "^lr=None .*valid number",
    "lr=.inf": "^lr=.inf .*valid number",
    "lr=1e999": "^lr=inf .*finite number",
    "steps=0600": "^steps=0600 .*valid integer",
    "warmup=1_000": "^warmup=1_000 .*valid integer",
    "seed=12:30": "^seed=12:30 .*valid integer",
    "log.every=0600": "^log.every=0600 .*a number of steps, or a time",
    "compiled=on": "^compiled=on .*valid boolean",
    "samples.prompts=[A cat: it jumps]": "samples.prompts holds a text with ': ' in it.*; quote values",
    "samples.prompts=A cat": "^samples.prompts=A cat .*valid array",
    "output=a: b": "output holds a text with ': ' in it",
    "data=*a": r"a value begins with .\); quote values",
    "data=!!int 3": r"a value begins with !\); quote values",
    "output=~": "^output=None .*valid string",
    "clip=no way": "clip=no way .*valid number .*null",
    "rebalance=perhaps": "rebalance=perhaps .*valid boolean",
    "betas=3": "betas=3 .*valid array",
    "on_policy.rollouts=[2,x]": r"on_policy.rollouts=\[2, 'x'\] .*valid integer",
    "student=[a]": "student=.*valid string .*null",
    "output=${nowhere}": "does not resolve: Interpolation key 'nowhere' not found",
}
RANGES = {  # one of each kind
    "steps=0": "steps=0 .*greater than or equal to 1",
    "checkpoints.every=0": "checkpoints.every=0: it should be a number of steps, or a time like '30 min'",
    "lr=0": "^lr=0 .*greater than 0",
    "drop=1.5": "drop=1.5 .*less than or equal to 1",
    "betas=[0.9]": r"betas=\[0.9\] .*at least 2 items",
    "samples.steps=[0]": r"samples.steps=\[0\] .*or equal to 1",
    "stage=techer": "unknown stage 'techer'; known: teacher, forward, on_policy; did you mean 'teacher'",
    "log.tracker=wandby": "unknown log.tracker 'wandby'; known: tensorboard, wandb, none; did you mean 'wandb'",
    "checkpoints.every=soon": "checkpoints.every=soon in the command line; it should be a number of steps, or a time",
    "samples.every=-1": "samples.every=-1 .*a time like",
    "log.every=3 weeks": "log.every=3 weeks .*a time like",
    "velocity=teacher": "unknown velocity 'teacher'; known: data, base",
}


@pytest.mark.parametrize(("override", "message"), (UNKNOWN | TYPES | RANGES).items())
def test_a_wrong_option_is_one_line(override, message):
    assert re.search(message, one_line(overrides=[override]))


def test_a_wrong_option_in_a_file_names_the_file(tmp_path):
    mine = tmp_path / "mine.yaml"
    for text, message in {
        "steps: 5\nsteos: 6\n": r"unknown option 'steos' in mine\.yaml; did you mean 'steps'",
        "guidance:\n  scala: 2\n": r"unknown option 'guidance\.scala' in mine\.yaml; did you mean 'guidance\.scale'",
        "steps: soon\n": r"steps=soon in mine\.yaml; it should be a valid integer",
        "steps: 1\nsteps: 2\n": r"mine\.yaml is not YAML .*duplicate",
        "steps: [\n": r"mine\.yaml is not YAML",
        "samples:\n  prompts:\n  - A cat: it jumps\n": "samples.prompts holds a text with ': ' in it, .* quotes",
        "student: A cat: it jumps\n": "mapping values are not allowed here.*texts in quotes",
        "student: {a}\n": "student holds a text with ': ' in it, or braces",
        "data: &a x\nbase: *a\n": "a value begins with",
        "- a\n- b\n": r"mine\.yaml holds no options",
    }.items():
        mine.write_text(text)
        assert re.search(message, one_line([mine]))


CONTRADICTIONS = {
    ("output=~/x",): "output=~/x; nobody expands ~ here",
    ("objective=mixed", "guidance.published=true"): "guidance.published=True, objective=mixed: .* for eulerian alone",
    ("objective=lagrangian", "velocity=data"): "objective=lagrangian, velocity=data: .*; set velocity=base",
    ("batch=6", "accumulate=4"): "batch=6, accumulate=4: the micro-batches would not be equal",
    ("diagonal=0.8", "end=0.3"): "diagonal=0.8, end=0.3: these are more than all rows",
    ("diagonal=1", "end=0"): "stage=forward, diagonal=1.0: no row r < t",
    ("stage=teacher",): "stage=teacher, diagonal=0.5: .*; name the overlay teacher",
    ("stage=teacher", "diagonal=1", "end=0"): "stage=teacher, guidance.scale=3.0: .*; set guidance.scale=1",
    ("stage=on_policy",): "stage=on_policy, student=None: .*; name the run folder .*: student=FOLDER",
    ("architecture=causal", "velocity=base"): "architecture=causal, velocity=base, .*chunk by chunk",
    ("rebalance=true",): "rebalance=True, objective=mixed: .*; set rebalance=false",
    ("drop=0",): "guidance.scale=3.0, drop=0.0: nothing would train the null prompt",
    ("offload=[disk]",): "unknown offload 'disk'",
    ("stage=on_policy", "student=x", "memory=small", "offload=[blocks]"): r"offload=\['blocks'\], memory=small: ",
    ("offload=[base]", "checkpointing=false"): r"offload=\['base'\], checkpointing=False: ",
    ("offload=[blocks]", "keep_attention=true"): r"offload=\['blocks'\], keep_attention=True: ",
    ("offload=[halves]",): r"offload=\['halves'\]: halves are those of blocks",
    ("offload=[blocks,halves,base]",): r"offload=\['blocks', 'halves', 'base'\]: a half needs the weights",
    ("offload=[blocks,halves]", "compiled=true"): "compiled=True: a half needs the weights",
    ("offload=[blocks,halves]", "shard_base=true"): "shard_base=True: a half needs the weights",
    ("offload=[blocks,halves]", "sequence_parallel=2"): "sequence_parallel=2: a half needs the weights",
    ("offload=[base]", "trained=full"): r"offload=\['base'\], trained=full: no weights are frozen",
    ("shard_base=true", "trained=full"): "shard_base=True, trained=full: no weights are frozen",
    ("shard_base=true", "offload=[base]"): "frozen weights rest in one place",
    ("shard_base=true", "checkpointing=false"): "shard_base=True, checkpointing=False: ",
    ("shard_base=true", "stage=on_policy", "student=x"): "shard_base=True, on_policy.shared_rollout=False: ",
    ("base_dtype=int8", "trained=full"): "base_dtype=int8, trained=full: no weights are frozen",
    ("sequence_parallel=2", "compiled=true"): "sequence_parallel=2, compiled=True: ",
    ("offload=[base]", "compiled=true"): r"offload=\['base'\], compiled=True: ",
    ("keep_attention=true", "checkpointing=false"): "keep_attention=True, checkpointing=False: ",
    ("warmup=6000",): "warmup=6000, steps=6000: lr would never be reached",
    ("warmup=0", "steps=1000"): "ema_after=1000, steps=1000: the average would never begin",
    ("ema=1",): "ema=1.0: the average would never move",
    ("on_nan.skip=2", "clip=null"): "on_nan.skip=2, clip=None: ",
    ("samples.prompts=[]",): r"samples.every=2 h, samples.prompts=\[\]: give prompts",
    ("samples.prompts=['  ']",): "samples.every=2 h, samples.prompts=.*: give prompts",
}
HARMLESS = [
    ("objective=eulerian", "guidance.published=true"),
    ("objective=lagrangian", "velocity=base"),
    ("batch=8", "accumulate=4"),
    ("diagonal=0.75", "end=0.25"),
    ("stage=teacher", "diagonal=1", "end=0", "guidance.scale=1"),
    ("stage=on_policy", "student=there"),
    ("stage=on_policy", "student=there", "on_policy.forward_weight=0", "diagonal=1", "end=0"),
    ("drop=0", "guidance.scale=1"),
    ("warmup=99", "steps=100", "ema_after=99"),
    ("samples.prompts=[]", "samples.every=0"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS.items())
def test_contradictions_are_one_line(overrides, message):
    assert re.search(message, one_line(overrides=overrides))


@pytest.mark.parametrize("overrides", HARMLESS)
def test_what_lies_just_inside_is_taken(overrides):
    assert isinstance(load_config(overrides=overrides), Config)


def test_overlays_that_do_not_exist_or_come_too_early():
    said = one_line(["causl"])
    assert "unknown configuration 'causl'" in said
    assert "did you mean 'causal'" in said
    assert "no file mine.yaml; expected one, or one of bidirectional, causal" in one_line(["mine.yaml"])
    expected = "one of each at most, in the order model, architecture"
    assert f"on_policy before wan-14b; expected {expected}" in one_line(["on_policy", "wan-14b"])
    assert "causal before bidirectional" in one_line(["causal", "bidirectional"])
    assert "tiny before forward" in one_line(["tiny", "forward"])


def test_a_missing_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device=cuda, and torch finds no GPU here; set device=cpu"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda")
    assert find_device("cpu") == torch.device("cpu")


def test_what_may_change_when_a_run_resumes():
    """Whatever changes what a step computes may not; where it runs, how often it saves, and how long, may."""
    before = identity(load_config())
    free = ["steps=7000", "accumulate=2", "device=cpu", "checkpoints.keep=1", "resume=never", "on_nan.skip=3"]
    assert identity(load_config((), [*free, "log.every=1", "samples.every=0", "output=there", "runs=here"])) == before
    for change in ("lr=1", "batch=64", "seed=1", "data=there", "guidance.scale=2", "precision=fp32", "adaptive=0.5"):
        after = identity(load_config((), [change]))
        assert change.partition("=")[0] in [name for name in before if before[name] != after[name]]
    assert set(before) == {name for name in OPTIONS if name.split(".")[0] not in FREE}
