"""Checkpoints: whole or not at all, everything in them, read by any number of processes; and runs that were broken off.

What kills a process is in scripts/faults.py, whose shorter set is run here; `make faults` runs all of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from minianyflow.batch import batches
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.support.errors import InputError
from minianyflow.training import Role
from minianyflow.wan import checkpoints as module
from minianyflow.wan.checkpoints import Checkpoints, problem_of
from minianyflow.wan.guard import Guard
from minianyflow.wan.trainer import train_run
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
        history = train_run(
            trained, drawn, steps, accelerator=accelerator, progress=False, log_every=1, checkpoints=kept
        )
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
    expected |= {"student/average/n_averaged", "student/loss/diagonal_loss", "random/0/cpu"}
    assert set(tensors) == expected
    newest = Checkpoints(tmp_path).folders()[0]
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
    for folder in Checkpoints(tmp_path).folders()[:1]:
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


def test_what_is_not_the_runs_stays_when_its_checkpoints_go(tmp_path):
    """A copy that somebody made, what was put aside to be mended; and checkpoints may lie on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=2)
    checkpoints.lock(Accelerator(cpu=True))
    run(tmp_path / "checkpoints")
    for name in ("000004-best", "not-whole-000002"):
        (tmp_path / "disk" / name).mkdir()
    checkpoints.remove()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["000004-best", "not-whole-000002"]


def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_taken(tmp_path, capsys):
    whole = run(None)
    run(tmp_path, stop=7)
    newest, before, _ = Checkpoints(tmp_path).folders()
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
    assert all(problem_of(folder) is None for folder in Checkpoints(tmp_path).folders())  # replaced


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
    run(tmp_path, settings={"lr": 1.0, "seed": 0})
    Checkpoints(tmp_path, settings={"lr": 1.0, "seed": 0}).check_settings()
    with pytest.raises(InputError, match=r"lr was 1.0, is 2.0; seed was 0, is None; put back what changed") as problem:
        Checkpoints(tmp_path, settings={"lr": 2.0}).check_settings()
    assert "\n" not in str(problem.value)
    Checkpoints(tmp_path / "none", settings={"lr": 2.0}).check_settings()


def test_a_damaged_checkpoint_is_not_asked_what_the_run_was_told(tmp_path, capsys):
    run(tmp_path, settings={"lr": 1.0})
    newest, before, _ = Checkpoints(tmp_path).folders()
    path = newest / "state.json"
    path.write_text(path.read_text().replace('"lr": 1.0', '"lr": 3.0'))
    Checkpoints(tmp_path, settings={"lr": 1.0}).check_settings()
    with pytest.raises(InputError, match=rf"{before} was made by another configuration: lr was 1.0, is 3.0"):
        Checkpoints(tmp_path, settings={"lr": 3.0}).check_settings()
    for manifest in ("[]", '{"files": []}', '{"files": {"state.json": 1}}'):
        (newest / "manifest.json").write_text(manifest)
        assert problem_of(newest) == "no manifest.json that can be read"
        Checkpoints(tmp_path, settings={"lr": 1.0}).check_settings()


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


def test_a_disk_that_is_too_small_is_said_at_the_start(tmp_path, monkeypatch):
    run(tmp_path / "known", keep=2)
    sizes = [sum(path.stat().st_size for path in each.glob("*.distcp")) for each in (tmp_path / "known").iterdir()]
    bound = []
    for count, folder in ((3, "new"), (1, "known")):  # keep=2: two stay while a third is written
        for free in (count * 0.5 * min(sizes), count * 1.1 * max(sizes)):
            usage = SimpleNamespace(free=free)
            monkeypatch.setattr(module.shutil, "disk_usage", lambda _, usage=usage: usage)
            try:
                Checkpoints(tmp_path / folder, keep=2).check_room(roles())
                bound.append("room")
            except InputError as problem:
                bound.append(str(problem))
    assert bound[1::2] == ["room"] * 2
    assert all("set checkpoints.keep lower" in each and "\n" not in each for each in bound[::2])
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(InputError, match=r"checkpoints need .* GB more in "):
        run(tmp_path / "new")


def test_broken_checkpoints_that_are_newer_displace_none(tmp_path, capsys):
    """All but the first are broken, and one is kept: what is saved next stays, whatever stood after it."""
    run(tmp_path, stop=7)
    for folder in Checkpoints(tmp_path).folders()[:-1]:
        (folder / "manifest.json").unlink()
    run(tmp_path, stop=4, every=1, keep=1)
    assert "going on after 2 steps" in capsys.readouterr().out
    (kept,) = Checkpoints(tmp_path).folders()
    assert (kept.name, problem_of(kept)) == ("000004", None)
    assert equal(run(tmp_path), run(None))


def test_a_disk_that_cannot_be_read_for_a_while_costs_no_checkpoint(tmp_path, monkeypatch):
    whole = run(None)
    run(tmp_path, stop=7, settings={"lr": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def hiccup(*_, **__):
        raise OSError(5, "Input/output error")

    for patched in ((module.Path, "read_text"), (module, "_digest")):
        with monkeypatch.context() as patch:
            patch.setattr(*patched, hiccup)
            for start in (Checkpoints(tmp_path, settings={"lr": 1}).check_settings, lambda: run(tmp_path)):
                with pytest.raises(InputError, match=r"000006 cannot be read \(Input/output error\); nothing was"):
                    start()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert equal(run(tmp_path), whole)


def test_broken_checkpoints_are_kept_where_none_is_whole(tmp_path, capsys):
    for _ in range(2):
        run(tmp_path, stop=3)
        (tmp_path / "000002/manifest.json").unlink()
    run(tmp_path, keep=1)
    assert capsys.readouterr().err.count("beginning anew") == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["000008", "not-whole-000002", "not-whole-000002-1"]
    assert list((tmp_path / "not-whole-000002").glob("*.distcp"))


def test_weights_that_are_not_finite_displace_none(tmp_path):
    """One step may spoil them with a loss and a gradient that were fine."""
    trained = roles()

    def spoil(step):
        if step == 3:
            with torch.no_grad():
                next(trained["student"].network.parameters())[0] = torch.nan

    kept, draws = Checkpoints(tmp_path, every=2, keep=1), batches(RING.sample, 8)
    options = {"accelerator": Accelerator(cpu=True), "progress": False, "checkpoints": kept, "guard": Lenient()}
    with pytest.raises(InputError, match=r"weights are not finite after 4 steps; not saved.* \(000002\): lower lr"):
        train_run(trained, lambda step: spoil(step) or draws(step), 8, **options)
    assert [problem_of(folder) for folder in kept.folders()] == [None]


class Lenient(Guard):
    """Finds nothing wrong."""

    def is_bad(self, *_):
        return False


def test_a_folder_is_one_runs_alone(tmp_path):
    accelerator, first = Accelerator(cpu=True), Checkpoints(tmp_path / "run")
    first.lock(accelerator)
    with pytest.raises(InputError, match=r"another run is at work in .*run; wait for it, or name another"):
        Checkpoints(tmp_path / "run").lock(accelerator)
    first.held.close()
    Checkpoints(tmp_path / "run").lock(accelerator)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*file/run \(Not a directory\)"):
        Checkpoints(tmp_path / "file/run").lock(accelerator)


def test_what_a_run_carries_goes_on(tmp_path):
    guard = Guard()
    guard.skipped = [3]
    run(tmp_path, stateful={"guard": guard})
    other = Guard()
    run(tmp_path, stateful={"guard": other})
    assert other.skipped == [3]


def test_losses_inside_losses_are_remembered():
    from minianyflow.networks.teacher_forcing import TeacherForced
    from minianyflow.on_policy import OnPolicyLoss

    inner = FlowMapLoss({}, rebalance=True)
    loss = OnPolicyLoss(None, None, TeacherForced(inner))
    assert loss.state_dict() == {}
    loss.load_state_dict({"diagonal_loss": torch.tensor(2.0)})
    assert inner.diagonal_loss == 2
    assert loss.state_dict() == {"diagonal_loss": torch.tensor(2.0)}


# ---- real processes: scripts/distill.py on a tiny Wan


def one_thread(**more):
    places = {"PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | places | more


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from minianyflow.wan.folders import make_tiny_wan

    folder = tmp_path_factory.mktemp("wan")
    make_tiny_wan(folder / "wan")
    return folder


def launch(report, processes, kind, *given):
    """Run scripts/distill.py in so many processes, once for each list of arguments, and see that it ran as asked.

    What every process saw of each run: a list of lists of dicts.
    """
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = [each for run in given for each in ("--", *run)]
    done = subprocess.run(
        [
            *(sys.executable, *(several if processes > 1 else [])),
            *(str(HERE / "distil_parallel.py"), kind, str(report), *arguments),
        ],
        capture_output=True,
        text=True,
        env=one_thread(),
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(processes)]
    for each in (each for process in told for each in process):
        assert each["status"] in (0, 143), done.stderr[-3000:]
        assert each["processes"] == processes
        assert each["kinds"] == [kind if processes > 1 else "plain"]
        assert each["sharded"] == [kind == "shard" and processes > 1]
    return [list(process) for process in zip(*told, strict=True)]


def apart(one, other):
    """The largest difference of any weight of two runs."""
    files = sorted(path.relative_to(one) for path in Path(one).rglob("*.safetensors"))
    assert files
    assert files == sorted(path.relative_to(other) for path in Path(other).rglob("*.safetensors"))
    pairs = [(load_file(Path(one) / name), load_file(Path(other) / name)) for name in files]
    return max(float((a[key] - b[key]).abs().max()) for a, b in pairs for key in a)


RUNS = {  # on-policy with one row a process: then processes differ in how often they evaluate a network
    f"{architecture} {stage}": [architecture, stage]
    for architecture in ("bidirectional", "causal")
    for stage in ("teacher", "forward", "on_policy")
}
WHOLE = ["trained=full", "student={tiny}/wan", "teacher=null"]
RUNS |= {f"{architecture} whole weights": [architecture, "on_policy"] for architecture in ("bidirectional", "causal")}


def arguments(tiny, name, output, *options):
    """What distill.py is told for one of RUNS."""
    architecture, stage = RUNS[name]
    where = [f"runs={tiny}", f"base={tiny}/wan", f"data={tiny}/wan/latents", f"output={output}"]
    if stage == "on_policy":
        where += ["batch=2", f"student={tiny}/{architecture} forward", "teacher=null"]
    if "whole" in name:
        where += [each.format(tiny=tiny) for each in WHOLE]
    quiet = ["samples.every=0", "log.tracker=none"]
    return ["--config", architecture, stage, "tiny", *where, *quiet, *options]


@pytest.fixture(scope="module")
def students(tiny):
    """Runs of the forward stage, for on-policy ones to start from."""
    names = ("bidirectional forward", "causal forward")
    launch(tiny / "report", 1, "plain", *(arguments(tiny, name, tiny / name, "steps=2") for name in names))
    return tiny


@pytest.fixture(scope="module")
def twenty(students, tmp_path_factory):
    """20 steps of every stage by one process, by two (DDP) and by two of FSDP2: the folder, and what they saw."""
    folder, seen = tmp_path_factory.mktemp("twenty"), {}
    for kind, processes in (("plain", 1), ("ddp", 2), ("shard", 2)):
        given = [arguments(students, name, folder / kind / name, "steps=20") for name in RUNS]
        seen[kind] = dict(zip(RUNS, launch(folder / kind, processes, kind, *given), strict=True))
    return folder, seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "shard"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_and_shards_compute_what_one_process_computes(twenty, name, kind):
    folder, losses = twenty[0], []
    for each in ("plain", kind):
        history = json.loads((folder / each / name / "run.json").read_text())["history"]
        losses.append([value for entry in history for key, value in sorted(entry.items()) if key.endswith("/loss")])
    assert len(losses[0]) == (40 if RUNS[name][1] == "on_policy" else 20)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert apart(folder / "plain" / name, folder / kind / name) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_process_reads_its_own_rows_alone(twenty, name):
    """What one process reads in a step, two read half and half."""
    _, seen = twenty
    (plain,) = (each["reads"] for each in seen["plain"][name])
    own = 1 if RUNS[name][1] == "on_policy" else 2
    assert len(plain) == 20 * 2 * own
    for kind in ("ddp", "shard"):
        halves = [each["reads"] for each in seen[kind][name]]
        assert [len(half) for half in halves] == [20 * own] * 2
        steps = [half[own * step : own * (step + 1)] for step in range(20) for half in halves]
        assert [row for rows in steps for row in rows] == plain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "shard"])
def test_two_processes_stop_together_and_go_on_as_one_and_back(students, tmp_path, kind):
    """SIGTERM reaches one of them; two, then one, then two again end where two do that nothing disturbed."""
    names = ("causal forward", "causal on_policy", "bidirectional whole weights")
    whole = [arguments(students, name, tmp_path / "whole" / name, "steps=9") for name in names]
    again = [arguments(students, name, tmp_path / "again" / name, "steps=9") for name in names]
    stopped = [["preempt=7", *each] for each in again]  # any_process is asked once a step, and once for each role of it
    seen = launch(tmp_path / "first", 2, kind, *whole, *stopped)
    seen += launch(tmp_path / "second", 1, kind, *stopped) + launch(tmp_path / "third", 2, kind, *again)
    statuses = [{process["status"] for process in each} for each in seen]
    count = len(names)
    assert statuses == [{0}] * count + [{143}] * 2 * count + [{0}] * count
    for name in names:
        made = json.loads((tmp_path / "again" / name / "run.json").read_text())
        assert made["processes"] == 2
        assert [entry["step"] for entry in made["history"]] == list(range(9))
        assert apart(tmp_path / "whole" / name, tmp_path / "again" / name) < 1e-5, name


@pytest.mark.slow
def test_runs_that_are_broken_in_every_way_lose_nothing_that_was_saved():
    """The shorter set of `make faults`."""
    done = subprocess.run(
        [sys.executable, str(HERE.parents[1] / "scripts/faults.py"), "--kills", "4"],
        capture_output=True,
        text=True,
        env=one_thread(),
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "FAIL" not in done.stdout
    assert done.stdout.count(" ok ") == 29, done.stdout
