"""Checkpoints: whole or absent, complete, and what is refused. Several processes and kills: test_processes.py."""

import json
import signal
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from minianyflow.batch import batches
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.training import Role
from minianyflow.wan import checkpoints as module
from minianyflow.wan.checkpoints import Broken, Checkpoints, check
from minianyflow.wan.guard import Guard, Preempted
from minianyflow.wan.intervals import Every
from minianyflow.wan.published import Rebalanced
from minianyflow.wan.trainer import train_run
from tests.refused import refused
from toy_data import plane

RING = plane.ring8()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Interrupt(Exception):
    pass


def roles(width=128, muon=None):
    loss = Rebalanced(FlowMapLoss({"eulerian": 0.5, "semigroup": 0.5}, RING.velocity))
    return {"student": Role(MLP(width=width), loss, warmup=3, ema_after=2, muon=muon)}


def noisy(seed):
    """Batches with a random number of torch's own; from step 6 on, rows r < t use the mean that the loss holds."""
    draws = batches(RING.sample, 8)

    def draw(step):
        batch = draws(step)
        r = batch["t"] if step < 6 else batch["t"] / 2
        return batch | {"r": r, "eps": batch["eps"] + 0.01 * torch.randn(batch["eps"].shape)}

    torch.manual_seed(seed)
    return draw


def run(folder, steps=8, stop=None, seed=3, every=2, keep=3, trained=None, draw=None, guard=None, **options):
    """Train, or stop in the middle of step `stop`: (history, every tensor that training goes on from)."""
    trained, draws = trained or roles(), draw or noisy(seed)

    def drawn(step):
        if step == stop:
            raise Interrupt
        return draws(step)

    checkpoints = None if folder is None else Checkpoints(folder, every, keep, **options)
    arguments = {"accelerator": Accelerator(cpu=True), "progress": False, "log_every": 1, "guard": guard}
    try:
        history = train_run(trained, drawn, steps, checkpoints=checkpoints, **arguments)
    except Interrupt:
        return None
    state = module._tensors(trained) | trained["student"].loss.state_dict() | {"random": torch.get_rng_state()}
    return history, {name: tensor.clone() for name, tensor in state.items()}


def equal(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1] | other[1])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole():
    """A run of eight steps that was never stopped, and has no checkpoints."""
    return run(None)


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path, whole, stop):
    assert run(tmp_path, stop=stop) is None
    assert equal(run(tmp_path, seed=4 if stop > 1 else 3), whole)


def test_a_run_by_muon_resumes_as_well(tmp_path):
    assert run(tmp_path, stop=3, trained=roles(16, 0.02)) is None
    assert equal(run(tmp_path, seed=4, trained=roles(16, 0.02)), run(None, trained=roles(16, 0.02)))


def test_a_checkpoint_has_everything(tmp_path):
    run(tmp_path)
    newest = Checkpoints(tmp_path).folders()[0]
    names = [name for name, _ in MLP().named_parameters()]
    expected = {f"student/network/{name}" for name in names} | {f"student/average/module.{name}" for name in names}
    expected |= {f"student/optimizer/{name}/{kind}" for name in names for kind in ("step", "exp_avg", "exp_avg_sq")}
    saved = module.distributed.FileSystemReader(newest).read_metadata().state_dict_metadata
    assert saved.keys() == expected | {"student/average/n_averaged"}
    state = json.loads((newest / "state.json").read_text())
    assert [entry["step"] for entry in state["history"]] == list(range(8))
    assert (state["step"], state["processes"], state["distribution"]) == (8, 1, "NO")


@pytest.mark.parametrize("lost", ["network", "average", "optimizer", "loss", "random"])
def test_nothing_in_a_checkpoint_could_be_left_out(tmp_path, whole, lost, monkeypatch):
    """Each kind of state, not restored, changes what training ends with."""
    run(tmp_path, stop=7, every=6)
    load = module.distributed.load

    def load_others(tensors, **options):
        return load({name: tensor for name, tensor in tensors.items() if lost not in name.split("/")}, **options)

    monkeypatch.setattr(module.distributed, "load", load_others)
    if lost == "random":
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    if lost == "loss":
        monkeypatch.setattr(Rebalanced, "load_state_dict", lambda self, state: None)
    assert not equal(run(tmp_path, seed=6, every=6), whole)


def test_the_last_checkpoints_stay_and_other_files_of_the_folder_too(tmp_path):
    (tmp_path / "disk").mkdir()
    folder = tmp_path / "checkpoints"
    folder.symlink_to(tmp_path / "disk")  # checkpoints may lie on another disk
    run(folder, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["000006", "000008"]
    for name in (".unfinished-000010", "000004-best", "not-whole-000002"):
        (folder / name).mkdir()
    run(folder, steps=9, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["000004-best", "000008", "000009", "not-whole-000002"]
    Checkpoints(folder).remove()
    assert sorted(path.name for path in folder.iterdir()) == ["000004-best", "not-whole-000002"]


DAMAGES = {  # file, the change of its bytes, the reason
    "cut": ("__0_0.distcp", lambda data: data[:-1], "__0_0.distcp is cut short or changed"),
    "bit": ("__0_0.distcp", lambda data: bytes([*data[:3000], data[3000] ^ 1, *data[3001:]]), "__0_0.distcp is cut"),
    "header": ("__0_0.distcp", lambda data: bytes([data[0] ^ 1, *data[1:]]), "__0_0.distcp is cut short or changed"),
    "no tensors": ("__0_0.distcp", None, "no __0_0.distcp"),
    "names": (".metadata", lambda data: data.replace(b"exp_avg", b"exp_awg"), ".metadata is cut short or changed"),
    "settings": ("state.json", lambda data: data.replace(b'"lr": 1', b'"lr": 3'), "state.json is cut short or changed"),
    "random": ("state.pt", lambda data: data[:-1], "state.pt is cut short or changed"),
    "no state": ("state.json", None, "no state.json"),
    "no manifest": ("manifest.json", None, "no manifest.json"),
    "manifest": ("manifest.json", lambda data: b"[]", "manifest.json is cut short or changed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_and_set_aside_and_the_one_before_taken(tmp_path, whole, capsys, damage):
    run(tmp_path, stop=7, settings={"lr": 1})
    (newest, before, _), (name, change, reason) = Checkpoints(tmp_path).folders(), DAMAGES[damage]
    check(newest)
    data = (newest / name).read_bytes()
    (newest / name).unlink()
    if change:
        assert change(data) != data
        (newest / name).write_bytes(change(data))
    with pytest.raises(Broken, match=reason):
        check(newest)
    Checkpoints(tmp_path, settings={"lr": 1}).check_settings()
    readable = before if name in ("state.json", "manifest.json") else newest
    with refused(f"{readable} was made by another configuration: lr was 1, is 3"):
        Checkpoints(tmp_path, settings={"lr": 3}).check_settings()
    result, printed = run(tmp_path, keep=1, settings={"lr": 1}), capsys.readouterr()
    assert f"warning: {newest} is not whole ({reason}" in printed.err
    assert "going on after 4 steps" in printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000008", "not-whole-000006"]
    assert equal(result, whole)


def test_one_process_of_three_checks_a_tensor(tmp_path):
    run(tmp_path, steps=1)
    (newest,) = Checkpoints(tmp_path).folders()
    path, found = newest / "__0_0.distcp", []
    path.write_bytes(path.read_bytes()[:-1])  # of the last tensor
    for index in range(3):
        try:
            check(newest, index, 3)
        except Broken:
            found.append(index)
    assert len(found) == 1


def test_broken_checkpoints_are_kept_if_none_is_whole(tmp_path, whole, capsys):
    for _ in range(2):
        run(tmp_path, stop=3)
        (tmp_path / "000002/manifest.json").unlink()
    assert equal(run(tmp_path, keep=1), whole)
    assert capsys.readouterr().err.count("beginning anew") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000008", "not-whole-000002", "not-whole-000002-1"]
    assert list((tmp_path / "not-whole-000002").glob("*.distcp"))


@pytest.mark.parametrize("call", ["save", "fsync", "replace", "read"])
def test_an_error_of_the_disk_is_one_line_and_older_checkpoints_stay(tmp_path, whole, monkeypatch, call):
    run(tmp_path, stop=5, settings={"lr": 1})
    before, starts = contents(tmp_path), [lambda: run(tmp_path, settings={"lr": 1})]
    words = r"after 6 steps .*\(No space left on device\); those before are intact \(000004, 000002\)"
    if call == "read":
        starts.append(Checkpoints(tmp_path, settings={"lr": 1}).check_settings)
        words = r"000004 cannot be read \(No space left on device\); nothing was changed"

    def failing(*_, **__):
        raise OSError(28, "No space left on device")

    place = {"save": (module.distributed, "save"), "read": (module, "_bytes")}.get(call, (module.os, call))
    for start in starts:
        with monkeypatch.context() as patch, refused(words):
            patch.setattr(*place, failing)
            start()
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))
    assert equal(run(tmp_path), whole)


@pytest.mark.parametrize(("count", "ending", "saved"), [(1, Preempted, "000004"), (2, KeyboardInterrupt, "000002")])
def test_ctrl_c_saves_after_the_step_and_a_second_one_ends_at_once(tmp_path, whole, count, ending, saved):
    draws = noisy(3)

    def draw(step):
        for _ in range(count if step == 3 else 0):
            signal.raise_signal(signal.SIGINT)
        return draws(step)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ending) as stopped:
        run(tmp_path, draw=draw, every="1 h" if count == 1 else 2)
    assert getattr(stopped.value, "status", 130) == 130
    assert (Checkpoints(tmp_path).folders()[0].name, signal.getsignal(signal.SIGINT)) == (saved, before)
    assert equal(run(tmp_path), whole)


def test_a_run_ends_saved_before_its_deadline(tmp_path, whole):
    arguments = {"accelerator": Accelerator(cpu=True), "progress": False, "log_every": 1}
    with pytest.raises(Preempted, match="its time is over: saved after 1 of 8 steps") as stopped:
        train_run(roles(), noisy(3), 8, checkpoints=Checkpoints(tmp_path, "1 h"), deadline=0.0, **arguments)
    assert stopped.value.status == 143
    assert equal(run(tmp_path), whole)


def test_a_time_is_due_once_it_has_passed(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    every, due = Every("1.5 min"), []
    for now in (10.0, 89.0, 91.0, 100.0, 182.0):  # noqa: B007
        due.append(every.due(1))
    assert due == [False, False, True, False, True]
    assert [Every(2).due(done) for done in (1, 2, 3)] == [False, True, False]


def test_ctrl_c_while_saving_is_no_failure(tmp_path, monkeypatch):
    run(tmp_path, stop=5)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.distributed.FileSystemWriter, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000004"]


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("at least 1 of each", lambda folder: Checkpoints(folder, every=0)),
        ("a checkpoint of 8 steps; expected at most steps=6", lambda folder: run(folder, steps=6)),
        ("does not fit", lambda folder: run(folder, trained=roles() | {"other": roles()["student"]})),
        ("does not fit", lambda folder: run(folder, trained=roles(width=32))),
        (
            r"lr was 1.0, is 2.0; seed was 0, is None; put back what changed",
            lambda folder: Checkpoints(folder, settings={"lr": 2.0}).check_settings(),
        ),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, words, start):
    run(tmp_path, settings={"lr": 1.0, "seed": 0})
    with refused(words):
        start(tmp_path)


@pytest.mark.parametrize(("folder", "count"), [("new", 3), ("known", 1)])  # keep=2: two stay while a third is written
def test_a_disk_that_is_too_small_is_said_at_the_start(tmp_path, monkeypatch, folder, count):
    run(tmp_path / "known", keep=2)
    sizes = [sum(path.stat().st_size for path in each.glob("*.distcp")) for each in (tmp_path / "known").iterdir()]
    disk, checkpoints = SimpleNamespace(free=count * 1.1 * max(sizes)), Checkpoints(tmp_path / folder, keep=2)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: disk)
    checkpoints.check_room(roles())
    disk.free = count * 0.5 * min(sizes)
    with refused("checkpoints need .* GB more in .*set checkpoints.keep lower"):
        run(tmp_path / folder, keep=2)


@pytest.mark.parametrize("spoilt", ["weight", "state of the loss"])
def test_what_is_not_finite_displaces_no_checkpoint(tmp_path, spoilt):
    """One step may spoil it although its loss and gradient were finite."""
    trained, guard, steps = roles(), Guard(), count()
    role = trained["student"]

    def spoil(*_):
        if next(steps) == 3:
            tensor = next(role.network.parameters()) if spoilt == "weight" else role.loss.totals
            tensor.data.fill_(torch.nan)
        return False

    guard.is_bad = spoil
    with refused(r"weights are not finite after 4 steps; not saved.* \(000002\): lower lr"):
        run(tmp_path, keep=1, trained=trained, guard=guard)
    (newest,) = Checkpoints(tmp_path).folders()
    check(newest)


def test_one_run_at_a_time_has_a_folder(tmp_path):
    accelerator, first = Accelerator(cpu=True), Checkpoints(tmp_path / "run")
    first.lock(accelerator)
    with refused(r"another run is at work in .*run; wait for it, or name another"):
        Checkpoints(first.folder).lock(accelerator)
    first.lock_file.close()
    Checkpoints(first.folder).lock(accelerator)


def test_stateful_objects_resume(tmp_path):
    run(tmp_path, stateful={"guard": Guard(skipped=[3])})
    resumed = Guard()
    run(tmp_path, stateful={"guard": resumed})
    assert resumed.skipped == [3]
