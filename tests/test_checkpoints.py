"""Checkpoints: whole or not at all, everything in them, read by any number of processes; and runs that were broken off.

What kills a process is in scripts/faults.py, whose shorter set is run here; `make faults` runs all of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from minianyflow import checkpoints as module
from minianyflow.checkpoints import Checkpoints, problem_of
from minianyflow.errors import InputError
from minianyflow.faults import Guard
from minianyflow.networks import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.training import Role, batches, remembered, train
from toy_data import plane

HERE = Path(__file__).parent
RING = plane.ring8()


class Broken(Exception):
    pass


def roles(**options):
    shares = {"eulerian": 0.5, "semigroup": 0.5}
    loss = FlowMapLoss(shares, lambda z, t: RING.velocity(z, t), rebalance=True)
    return {"student": Role(MLP(), loss, warmup=3, ema_after=2, **options)}


def run(folder, steps=8, stop=None, every=2, keep=3, trained=None, draw=None, **options):
    """Train, or break off in the middle of step `stop`: (history, every tensor that training goes on from)."""
    trained, draws = trained or roles(), draw or batches(RING.sample, 8)

    def drawn(step):
        if step == stop:
            raise Broken
        return draws(step)

    kept = None if folder is None else Checkpoints(folder, every, keep, **options)
    accelerator = Accelerator(cpu=True)
    try:
        history = train(trained, drawn, steps, accelerator=accelerator, progress=False, log_every=1, checkpoints=kept)
    except Broken:
        return None
    return history, {name: each.clone() for name, each in module._tensors(trained, accelerator).items()}


def equal(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    return all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 7])
def test_a_run_that_goes_on_ends_as_one_that_was_never_broken_off(tmp_path, stop):
    torch.manual_seed(3)
    whole = run(None)
    torch.manual_seed(3)
    assert run(tmp_path, stop=stop) is None
    torch.manual_seed(4 if stop > 1 else 3)  # it is restored, where there is a checkpoint
    assert equal(run(tmp_path), whole)


def test_everything_is_in_a_checkpoint(tmp_path):
    _, tensors = run(tmp_path)
    names = [name for name, _ in MLP().named_parameters()]
    expected = {f"student/network/{name}" for name in names} | {f"student/average/module.{name}" for name in names}
    expected |= {f"student/optimizer/{name}/{kind}" for name in names for kind in ("step", "exp_avg", "exp_avg_sq")}
    expected |= {"student/average/n_averaged", "student/loss/0/diagonal_loss", "random/0/cpu"}
    assert set(tensors) == expected
    newest = Checkpoints(tmp_path).found()[0]
    saved = module.distributed.FileSystemReader(newest).read_metadata().state_dict_metadata
    assert set(saved) == expected
    state = json.loads((newest / "state.json").read_text())
    assert [each["step"] for each in state["history"]] == list(range(8))
    assert len(state["hash"]) == 64


@pytest.mark.parametrize("lost", ["network", "average", "optimizer", "loss", "random"])
def test_nothing_of_it_could_be_left_out(tmp_path, lost, monkeypatch):
    """Each kind of tensor, forgotten on the way back, changes what training ends with."""
    draws = batches(RING.sample, 8)

    def noisy(seed):
        def draw(step):  # with a random number of torch's own; rows r < t alone take the mean that is remembered
            batch = draws(step)
            r = batch["t"] if step < 6 else batch["t"] / 2
            return batch | {"r": r, "eps": batch["eps"] + 0.01 * torch.randn(batch["eps"].shape)}

        torch.manual_seed(seed)
        return draw

    whole = run(None, draw=noisy(5))
    run(tmp_path, stop=7, draw=noisy(5), every=6)
    load = module.distributed.load

    def forgetful(tensors, **options):
        return load({name: each for name, each in tensors.items() if lost not in name.split("/")}, **options)

    with monkeypatch.context() as patch:
        if lost == "random":
            patch.setattr(torch, "set_rng_state", lambda state: None)
        patch.setattr(module.distributed, "load", forgetful)
        again = run(tmp_path, draw=noisy(6), every=6)
    assert again[0] != whole[0] or not all(torch.equal(again[1][name], whole[1][name]) for name in whole[1])
    for folder in Checkpoints(tmp_path).found()[:1]:
        module.shutil.rmtree(folder)
    assert equal(run(tmp_path, draw=noisy(6), every=6), whole)


def test_the_last_few_are_kept_and_nothing_else(tmp_path):
    run(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000006", "000008"]
    (tmp_path / ".unfinished-000010").mkdir()
    run(tmp_path, steps=9, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000008", "000009"]
    Checkpoints(tmp_path).remove()
    assert not tmp_path.exists()


def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_taken(tmp_path, capsys):
    whole = run(None)
    run(tmp_path, stop=7)
    newest, before, _ = Checkpoints(tmp_path).found()
    assert problem_of(newest) is None
    path = newest / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert "bytes, expected" in problem_of(newest)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "another SHA-256" in problem_of(newest)
    path.unlink()
    assert problem_of(newest) == "no __0_0.distcp"
    assert problem_of(newest, 0, 2) is None or problem_of(newest, 1, 2) is None  # each process looks at its part
    (before / "manifest.json").unlink()
    assert problem_of(before) == "no manifest.json that can be read"
    again = run(tmp_path)
    said = capsys.readouterr()
    assert said.err.count("is not whole") == 2
    assert "going on after 2 steps" in said.out
    assert equal(again, whole)
    assert all(problem_of(folder) is None for folder in Checkpoints(tmp_path).found())  # replaced


@pytest.mark.parametrize("call", ["save", "_write", "_digest", "rename"])
def test_an_error_while_saving_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch, call):
    run(tmp_path, stop=5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if call == "rename":
            patch.setattr(module.os, "replace", full)
        else:
            patch.setattr(*((module.distributed, "save") if call == "save" else (module, call)), full)
        if call == "_digest":  # reading is fine
            patch.setattr(module, "problem_of", lambda *_: None)
        with pytest.raises(InputError, match=r"after 6 steps .*No space left on device.*\(000004, 000002\)") as problem:
            run(tmp_path)
    assert "\n" not in str(problem.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))
    assert equal(run(tmp_path), run(None))


def test_another_configuration_is_named(tmp_path):
    run(tmp_path, told={"lr": 1.0, "seed": 0})
    Checkpoints(tmp_path, told={"lr": 1.0, "seed": 0}).check_told()
    with pytest.raises(InputError, match=r"lr was 1.0, is 2.0; seed was 0, is None; put back what changed") as problem:
        Checkpoints(tmp_path, told={"lr": 2.0}).check_told()
    assert "\n" not in str(problem.value)
    Checkpoints(tmp_path / "none", told={"lr": 2.0}).check_told()


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (lambda folder: Checkpoints(folder, every=0), "at least 1 of each"),
        (lambda folder: run(folder, steps=6), "a checkpoint of 8 steps; expected at most steps=6"),
        (lambda folder: run(folder, trained=roles() | {"other": roles()["student"]}), "does not fit"),
        (lambda folder: run(folder, trained={"student": Role(MLP(width=32), roles()["student"].loss)}), "does not fit"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, start, words):
    run(tmp_path)
    with pytest.raises(InputError, match=words) as problem:
        start(tmp_path)
    assert "\n" not in str(problem.value)


def test_what_a_run_carries_goes_on(tmp_path):
    guard = Guard()
    guard.skipped = [3]
    run(tmp_path, carried={"guard": guard})
    other = Guard()
    run(tmp_path, carried={"guard": other})
    assert other.skipped == [3]


def test_losses_inside_losses_are_remembered():
    from minianyflow.on_policy import OnPolicyLoss
    from minianyflow.teacher_forcing import TeacherForced

    inner = FlowMapLoss({}, rebalance=True)
    loss = OnPolicyLoss(None, None, TeacherForced(inner))
    assert remembered(loss) == [(2, "diagonal_loss", None)]
    remembered(loss, {(2, "diagonal_loss"): torch.tensor(2.0)})
    assert inner.diagonal_loss == 2


# ---- real processes: scripts/distill.py on a tiny Wan


def one_thread(**more):
    places = {"PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | places | more


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from minianyflow.wan_folders import make_tiny_wan

    folder = tmp_path_factory.mktemp("wan")
    make_tiny_wan(folder / "wan")
    return folder


def distil(tiny, output, processes, kind, stage, *options, **environment):
    """Launch scripts/distill.py, and see that it ran as asked: its report, and run.json if it ended."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    report = Path(f"{output}.json")
    where = [f"runs={tiny}", f"base={tiny}/wan", f"data={tiny}/wan/latents", f"output={output}"]
    done = subprocess.run(
        [
            *(sys.executable, *(launch if processes > 1 else [])),
            *(str(HERE / "distil_parallel.py"), kind, str(report), "--config", *stage, "tiny"),
            *(*where, "samples.every=0", "log.tracker=none", *options),
        ],
        capture_output=True,
        text=True,
        env=one_thread(**environment),
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(report.read_text())
    assert told["processes"] == processes
    assert told["kinds"] == [kind if processes > 1 else "plain"]
    assert told["sharded"] == [kind == "shard" and processes > 1]
    made = Path(output) / "run.json"
    return told["status"], done, json.loads(made.read_text()) if made.exists() else None


def apart(one, other):
    """The largest difference of any weight of two runs."""
    files = sorted(path.name for path in Path(one).glob("*.safetensors"))
    assert files == sorted(path.name for path in Path(other).glob("*.safetensors"))
    pairs = [(load_file(Path(one) / name), load_file(Path(other) / name)) for name in files]
    return max(float((a[key] - b[key]).abs().max()) for a, b in pairs for key in a)


STAGES = {
    "teacher": (["bidirectional", "teacher"], []),
    "forward": (["causal", "forward"], []),
    "on_policy": (["bidirectional", "on_policy"], ["student={tiny}/forward", "teacher=null", "batch=2", "rank=4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_and_shards_compute_what_one_process_computes(tiny, tmp_path, stage):
    """20 steps; with one row a process, on-policy processes differ in how often they evaluate a network."""
    layers, options = STAGES[stage]
    options = [each.format(tiny=tiny) for each in options]
    if stage == "on_policy":
        distil(tiny, tiny / "forward", 1, "ddp", ["bidirectional", "forward"], "steps=2")
    losses = {}
    for kind, processes in (("plain", 1), ("ddp", 2), ("shard", 2)):
        _, _, made = distil(tiny, tmp_path / kind, processes, kind, layers, "steps=20", *options)
        losses[kind] = [
            value for entry in made["history"] for name, value in sorted(entry.items()) if name.endswith("/loss")
        ]
    assert len(losses["plain"]) == (40 if stage == "on_policy" else 20)
    for kind in ("ddp", "shard"):
        assert losses[kind] == pytest.approx(losses["plain"], rel=1e-5), kind
        assert apart(tmp_path / "plain", tmp_path / kind) < 1e-4, kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "shard"])
def test_two_processes_stop_together_and_go_on_as_one_and_back(tiny, tmp_path, kind):
    """SIGTERM reaches one of them; two, then one, then two again end where two do that nothing disturbed."""
    layers = ["causal", "forward"]
    distil(tiny, tmp_path / "whole", 2, kind, layers, "steps=9")
    again = tmp_path / "again"
    stops = [(2, "7"), (1, "7"), (2, None)]  # on_any is asked twice a step
    for processes, after in stops:
        status, done, made = distil(
            tiny, again, processes, kind, layers, "steps=9", **({"PREEMPT_AFTER": after} if after else {})
        )
        assert status == (143 if after else 0)
    assert "going on after" in done.stdout
    assert made["processes"] == 2
    assert [entry["step"] for entry in made["history"]] == list(range(9))
    assert apart(tmp_path / "whole", again) < 1e-5


@pytest.mark.slow
def test_runs_that_are_broken_in_every_way_lose_nothing_that_was_saved():
    """The shorter set of `make faults`."""
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "scripts/faults.py"), "--kills", "4"],
        capture_output=True,
        text=True,
        env=one_thread(),
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "FAIL" not in done.stdout
    assert done.stdout.count(" ok ") == 18, done.stdout
