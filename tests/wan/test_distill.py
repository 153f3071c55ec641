"""Distillation of a tiny Wan: what each stage evaluates, holds in memory, starts from, leaves, and refuses."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minianyflow import training
from minianyflow.networks.lora_roles import Adapter, storages
from minianyflow.support.cli import run
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from minianyflow.wan import run as runs
from minianyflow.wan import stages
from minianyflow.wan.commands import distill
from minianyflow.wan.config import load_config
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.folders import load_transformer
from minianyflow.wan.run import load_run, read_run
from minianyflow.wan.run_networks import RunNetworks
from minianyflow.wan.stages import STAGES, draws, simulation


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A tiny Wan and, for both architectures, the runs of a teacher and of a forward stage."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "wan").symlink_to(tiny)
    for architecture in ("bidirectional", "causal"):
        for stage in ("teacher", "forward"):
            stages.distil(settings(folder, architecture, stage))
    return folder


def settings(folder, architecture, stage, *changes):
    where = [f"runs={folder}", f"base={folder}/wan", f"data={folder}/wan/latents"]
    quick = ["steps=2", "batch=8", "samples.every=0", "log.tracker=none"]
    return load_config([architecture, stage, "tiny"], [*where, *quick, *changes])


def on(tiny, architecture, stage, *changes):
    """Settings of a run that starts from no other."""
    return settings(tiny, architecture, stage, f"base={tiny}", f"data={tiny}/latents", *changes)


def built(config):
    data = LatentSet(config.data)
    networks = RunNetworks(config, data.shape[0])
    return networks, STAGES[config.stage](config, networks, {"prompt": data.null}), draws(config, data)


# ---- evaluations, counted


@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
@pytest.mark.parametrize("objective", ["eulerian", "mixed", "semigroup"])
def test_the_forward_stage_takes_three_evaluations_a_sample_at_most(tiny, architecture, objective):
    networks, roles, draw = built(on(tiny, architecture, "forward", f"objective={objective}", "drop=0.0001"))
    roles["student"].loss(roles["student"].network, draw(0))
    rows, with_grad = networks.counts()["student"]
    null = {"eulerian": [8], "mixed": [8, 4], "semigroup": [4]}[objective]  # rows whose velocity is guided; mixed: one
    differences = 2 * 4  # or the other in a step. For half of the rows: nothing is computed for r = t
    assert rows in [8 + guided + differences for guided in null]
    assert with_grad == 8
    assert rows <= 3 * 8
    assert "teacher" not in networks.counts()


def test_lagrangian_asks_the_frozen_base_beside(tiny):
    networks, roles, draw = built(on(tiny, "bidirectional", "forward", "objective=lagrangian", "drop=0.0001"))
    roles["student"].loss(roles["student"].network, draw(0))
    assert networks.counts() == {"student": (8 + 8 + 8, 8), "teacher": (8, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, True])
def test_on_policy_evaluations(folder, published):
    stage = "on_policy-published" if published else "on_policy"
    changes = ["drop=0.0001", "objective=eulerian", f"student={folder}/bidirectional-forward"]
    networks, roles, draw = built(settings(folder, "bidirectional", stage, *changes))
    batch = draw(0)
    jumps = sum(1 + int(g > 0) + int(g < n - 1) for n, g in zip(batch["lengths"], batch["step"], strict=True))
    assert jumps <= 3 * 8
    for role in roles.values():
        role.loss(role.network, batch)
    counts = networks.counts()
    assert counts["student"] == (jumps + 3 * 8 + jumps, jumps + 8)  # its rollout, the forward loss, the fake score's
    assert counts["teacher"] == (2 * 8, 0)  # guided
    assert counts["fake"] == (8 + 8, 8)


@pytest.mark.slow
def test_a_causal_rollout_takes_three_jumps_a_chunk_and_one_pass_to_fill_the_cache(folder):
    networks, roles, draw = built(settings(folder, "causal", "on_policy", "drop=0.0001"))
    batch, student = draw(0), roles["student"].network
    simulation(networks.config)(student, batch["noise"], batch["lengths"], batch["step"], 5.0, **batch["condition"])
    jumps = sum(1 + int(g > 0) + int(g < n - 1) for n, g in zip(batch["lengths"], batch["step"], strict=True))
    chunks = 3
    assert networks.counts()["student"][0] == chunks * jumps + (chunks - 1) * 8


# ---- memory


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_one_base_is_in_memory_for_all_roles_and_with_full_weights_three(folder, architecture):
    alone, _ = storages(load_transformer(folder / "wan", architecture))
    networks, roles, _ = built(settings(folder, architecture, "on_policy"))
    held, _ = storages(*held_by(networks), roles["student"].average)
    weights = [each for name in networks.base.peft_config for each in Adapter(networks.base, name).parameters()]
    assert held == alone + 4 * sum(each.numel() for each in weights) + 8  # the average's counter
    whole = ["trained=full", f"student={folder}/wan", "teacher=null"]
    networks, roles, _ = built(settings(folder, architecture, "on_policy", *whole))
    assert storages(*held_by(networks))[0] == 3 * alone


def held_by(networks):
    return [each.network for counters in networks.counters.values() for each in counters]


# ---- one process and accumulated parts, starts and ends


@pytest.mark.slow
def test_the_on_policy_student_starts_as_the_forward_stage_ended_and_the_fake_score_as_the_teacher(folder):
    config = settings(folder, "causal", "on_policy")
    networks, roles, _ = built(config)
    data = LatentSet(config.data)
    x, prompt = data.rows([0, 1])
    t = torch.tensor([0.7, 0.4])
    first = x[:, :1]
    transformer, _ = load_run(folder / "causal-forward")
    merged = networks._wrap(transformer, False)(first, t, t / 2, prompt, cache=())
    assert torch.allclose(roles["student"].network(first, t, t / 2, prompt=prompt, cache=()), merged, atol=1e-5)
    teacher = networks.teacher(whole=True)
    assert torch.equal(roles["fake"].network(x, t, t, prompt=prompt), teacher(x, t, t, prompt=prompt))
    base = networks._wrap(load_transformer(config.base, "causal", full_chunk_limit=2), True)
    assert not torch.allclose(teacher(x, t, t, prompt=prompt), base(x, t, t, prompt), atol=1e-5)


@pytest.mark.slow
def test_a_run_leaves_what_is_needed_to_go_on(folder, tmp_path):
    config = settings(folder, "causal", "on_policy", f"output={tmp_path}/run", "samples.every=2", "samples.last=true")
    made = stages.distil(config)
    again, read = read_run(tmp_path / "run")
    assert again == config
    assert read == made
    assert made["clip"] == {"frames": 17, "height": 64, "width": 64, "length": 32}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("config.yaml", "run.json", "samples"),
        *("student.safetensors", "student-last.safetensors", "fake.safetensors"),
    }
    sampled = {
        path.name.rpartition("-")[0]: path.read_bytes() for path in (tmp_path / "run/samples/000002").glob("*0.mp4")
    }
    assert set(sampled) == {*("1_step", "4_steps"), *("last_1_step", "last_4_steps")}
    assert sampled["1_step"] != sampled["last_1_step"]
    assert (tmp_path / "run/samples/000002/sheet.png").stat().st_size > 1000
    student, last = (load_run(tmp_path / "run", role)[0].state_dict() for role in ("student", "student-last"))
    assert any(not torch.equal(student[name], last[name]) for name in student)
    with pytest.raises(InputError, match="holds a finished run"):
        stages.distil(config)


@pytest.mark.slow
def test_full_weights_are_trained_and_kept_as_stock_has_them(folder, tmp_path):
    changes = ["trained=full", f"output={tmp_path}/run", "checkpointing=false"]
    stages.distil(settings(folder, "bidirectional", "forward", *changes))
    transformer, config = load_run(tmp_path / "run")
    before = load_transformer(config.base, "bidirectional").state_dict()
    moved = [name for name, value in transformer.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    same = [f"student={tmp_path}/run", f"output={tmp_path}/on", "trained=full", "teacher=null"]
    stages.distil(settings(folder, "bidirectional", "on_policy", *same))


def test_bfloat16_trains_float32_adapters_at_float32_times(tiny):
    networks, roles, draw = built(on(tiny, "bidirectional", "forward", "precision=bf16"))
    assert networks.base.dtype == torch.bfloat16
    assert {weight.dtype for weight in roles["student"].network.parameters()} == {torch.float32}
    seen = []
    embedder = networks.base.condition_embedder
    embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    batch = draw(0)
    losses, _ = roles["student"].loss(roles["student"].network, batch)
    assert losses.dtype == torch.float32
    assert bool(losses.isfinite().all())
    assert {each.dtype for pair in seen for each in pair} == {torch.float32}
    assert torch.equal(seen[-1][0][:, 0], 1000 * batch["t"])


@pytest.mark.slow
def test_full_weights_compute_in_bfloat16_in_every_role(folder):
    whole = ["trained=full", "precision=bf16", f"student={folder}/wan", "teacher=null"]
    networks, roles, draw = built(settings(folder, "bidirectional", "on_policy", *whole))
    found = {}
    average = {"average": [roles["student"].average.module]}
    for name, (network, *_) in (networks.counters | average).items():
        layer = network.network.transformer.blocks[0].attn1.to_q
        layer.register_forward_hook(lambda module, inputs, out, name=name: found.update({name: out.dtype}))
    batch = draw(0)
    for role in roles.values():
        losses, _ = role.loss(role.network, batch)
        losses.mean().backward()
    roles["student"].average(batch["x"], batch["t"], batch["r"], **batch["condition"])
    assert found == dict.fromkeys(("student", "teacher", "fake", "average"), torch.bfloat16)
    assert {weight.dtype for weight in roles["student"].network.parameters()} == {torch.float32}


@pytest.mark.slow
def test_no_kind_of_row_drowns_the_others_in_our_recipe(tiny):
    """Gradient norms by kind: a semigroup target has no noise; scaled up to the others' loss it would be the lot."""
    _, roles, draw = built(on(tiny, "bidirectional", "forward", "batch=16"))
    role, norms = roles["student"], {}
    for batch in map(draw, range(2)):  # a step of Eulerian rows, and one of semigroup rows
        for kind, rows in role.loss.kinds(batch).items():
            losses, _ = role.loss(role.network, batch)
            (losses[rows].sum() / 16).backward()
            grads = [weight.grad.flatten() for weight in role.network.parameters()]
            norms[kind] = float(torch.cat(grads).norm())
            role.network.zero_grad()
    assert set(norms) == {"tangent", "eulerian", "semigroup"}
    assert norms["semigroup"] < norms["tangent"]


# ---- what a run is known by when it goes on


@pytest.mark.slow
def test_a_run_knows_its_weights_and_null_prompt_by_what_they_hold(folder, tmp_path):
    for name in ("wan", "causal-forward", "bidirectional-teacher"):
        shutil.copytree(folder / name, tmp_path / name)
    moved = [f"base={tmp_path}/wan", f"student={tmp_path}/causal-forward", f"teacher={tmp_path}/bidirectional-teacher"]

    def told(*changes, data=folder):
        config = settings(folder, "causal", "on_policy", *changes, f"data={data}/wan/latents")
        return runs.run_identity(config, LatentSet(config.data))

    before = told()
    assert told(*moved) == before
    for name, path in (("student", "causal-forward"), ("teacher", "bidirectional-teacher")):
        file = tmp_path / path / "student.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({key: 2 * value for key, value in load_file(file).items()}, file, metadata)
        assert {key for key, value in told(*moved).items() if value != before[key]} >= {name}
    null = tmp_path / "wan/latents/null.safetensors"
    save_file({"prompt": 2 * load_file(null)["prompt"]}, null)
    assert told(data=tmp_path)["the null prompt"] != before["the null prompt"]


@pytest.mark.slow
def test_a_run_that_was_finished_meanwhile_is_left_alone(folder, tmp_path, monkeypatch):
    """It ended after this one had looked, and before this one held the folder."""
    lock = runs.Checkpoints.lock

    def late(self, accelerator):
        lock(self, accelerator)
        (tmp_path / "run/run.json").write_text("{}")

    monkeypatch.setattr(runs.Checkpoints, "lock", late)
    with pytest.raises(InputError, match="run holds a finished run"):
        runs.prepare(settings(folder, "causal", "forward", f"output={tmp_path}/run"))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "what"), [("wan", "a pipeline"), ("wan/latents", "latents")])
def test_a_run_is_not_written_into_its_base_or_data(folder, place, what):
    with pytest.raises(InputError, match=f"{place} holds {what}; name another folder with output=FOLDER"):
        stages.distil(settings(folder, "causal", "forward", f"output={folder}/{place}"))


# ---- what a causal student trains on


def test_a_causal_student_sees_long_and_short_contexts_and_whole_clips():
    """At Wan's own chunks: every frame is learnt, after every number of compressed chunks."""
    config = load_config(["wan-1.3b", "causal", "forward"], ["causal.bidirectional=0.25"])
    batch, kinds, learnt, old = {"x": torch.zeros(1, 21, 1), "eps": torch.zeros(1, 21, 1)}, [], set(), set()
    for step in range(400):
        part = stages.chunk_batch(batch, config, step)
        context, frames = part["context"], part["x"].shape[1]
        kinds.append("whole" if "single_chunk" in context else "long" if "past" in context else "short")
        before = context["past"].shape[1] if kinds[-1] == "long" else 0
        if kinds[-1] != "whole":
            learnt |= set(range(before, before + frames))
            old.add(before)
    assert kinds[0] == "long"
    for kind, share in (("whole", 0.25), ("long", 0.375), ("short", 0.375)):
        assert kinds.count(kind) / 400 == pytest.approx(share, abs=0.08)
    assert learnt == set(range(21))
    assert old == {0, 1, 4, 7, 10, 13}


@pytest.mark.slow
def test_weights_of_a_clip_too_short_to_be_compressed_are_left_alone(folder):
    _, roles, draw = built(settings(folder, "causal", "forward", "causal.full_chunks=3"))
    training.train(roles, draw, 1, progress=False)
    _, roles, draw = built(settings(folder, "causal", "on_policy", "on_policy.forward_weight=0"))
    training.train(roles, draw, 1, progress=False)


# ---- bad input


BAD = {
    "misspelt": (["bidirectional", "forward", "tiny"], ["objectiv=mixed"], "did you mean 'objective'"),
    "no base": (["bidirectional", "forward", "tiny"], ["base=./nowhere"], "no folder ./nowhere"),
    "no data": (["bidirectional", "forward", "tiny"], ["data=nowhere"], "no latents in nowhere"),
    "teacher that never saw chunks": (
        ["causal", "forward", "tiny"],
        ["velocity=base", "teacher={folder}/bidirectional-teacher"],
        "is a role of an AnyFlowTransformer3DModel; expected one of an AnyFlowFARTransformer3DModel",
    ),
    "unwritable": (["bidirectional", "forward", "tiny"], ["output=/proc/run"], "cannot write to /proc/run"),
    "no run": (["bidirectional", "on_policy", "tiny"], ["student=./nowhere"], "no folder ./nowhere"),
    "another rank": (["bidirectional", "on_policy", "tiny"], ["rank=2"], "in a run, set rank=4 alpha=4"),
    "whole weights": (["bidirectional", "on_policy", "tiny"], ["student={folder}/wan"], "set trained=full"),
    "adapters": (["bidirectional", "on_policy", "tiny"], ["trained=full"], "holds adapters"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(folder, case, capsys):
    files, changes, words = BAD[case]
    where = [f"runs={folder}", f"base={folder}/wan", f"data={folder}/wan/latents", f"output={folder}/bad"]
    options = [*files, *where, "log.tracker=none", *(change.format(folder=folder) for change in changes)]
    assert run(lambda: distill(["--config", *options])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (folder / "bad" / "run.json").exists()


def test_the_resolved_configuration_is_printed(capsys):
    assert distill(["--config", "wan-14b", "causal", "on_policy-published", "--print-config"]) == 0
    assert "steps: 1200  " in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_says_how_long_it_waited_for_data_and_sweeps_up_after_a_killed_one(folder, capsys):
    for left in (".unfinished-1", "samples/000002/.unfinished-2"):
        (folder / "said" / left).mkdir(parents=True)
    given = ["--config", "bidirectional", "forward", "tiny", f"base={folder}/wan", f"data={folder}/wan/latents"]
    quick = ["steps=4", "batch=8", "samples.every=0", "log.tracker=none", f"output={folder}/said"]
    assert distill([*given, *quick]) == 0
    assert not list((folder / "said").rglob(".*"))
    told = json.loads((folder / "said/run.json").read_text())["waiting_for_data"]
    assert told["steps"] == 2  # not the first and the last
    assert 0 < told["median"] < 1
    assert f"waiting for data: {told['median']:.2%} of a step (median)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "stage"), list(product(("bidirectional", "causal"), STAGES)))
def test_the_table_of_the_docs_is_what_is_counted(folder, architecture, stage):
    """Six steps of four rows, as those of scripts/wan_tiny.py."""
    networks, roles, draw = built(settings(folder, architecture, stage, "steps=6", "batch=4"))
    for batch in map(draw, range(6)):
        for role in roles.values():
            role.loss(role.network, batch)
    written = json.loads((ROOT / "docs/wan/evaluations.json").read_text())[f"{architecture} {stage}"]
    counted = {role: [round(count / 24, 4) for count in counts] for role, counts in networks.counts().items()}
    assert {role: [*count.values()] for role, count in written.items()} == counted


@pytest.mark.long
@pytest.mark.parametrize(("launch", "processes"), [("one_gpu", 1), ("eight_gpus_ddp", 8)])
def test_the_launch_files_of_the_docs_start_that_many_processes(folder, launch, processes):
    """On a CPU: gloo takes the place of nccl. accelerate ignores the FSDP2 file here, which is tried by other means."""
    where = [f"runs={folder}", f"base={folder}/wan", f"data={folder}/wan/latents", f"output={folder}/{launch}"]
    quick = ["steps=2", "batch=8", "samples.every=0", "log.tracker=none"]
    file = ROOT / f"scripts/accelerate/{launch}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, ROOT / "scripts/distill.py"]
    given = ["--config", "causal", "forward", "tiny", *where, *quick]
    subprocess.run([*command, *given], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    made, kind = json.loads((folder / launch / "run.json").read_text()), "MULTI_CPU" if processes > 1 else "NO"
    assert (made["processes"], made["distribution"]) == (processes, kind)
