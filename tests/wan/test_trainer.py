"""The loop of long runs: two processes equal one, bad batches, trackers that fail."""

import json
import math
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from minianyflow.batch import batches, deal
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.training import Role, train
from minianyflow.wan.guard import Guard, end_trackers, log_figures, start_trackers
from minianyflow.wan.published import Rebalanced
from minianyflow.wan.trainer import train_run
from tests.refused import refused
from tests.wan import train_tiny
from toy_data import plane

RING = plane.ring8()
HERE = Path(__file__).parent


def velocity(z, t):
    return RING.velocity(z, t)


def student(**options):
    return Role(MLP(), FlowMapLoss({"eulerian": 0.5, "semigroup": 0.5}, velocity), **options)


def run(role, draw, steps=12, **options):
    history = train_run({"student": role}, draw, steps, accelerator=Accelerator(cpu=True), progress=False, **options)
    return history, [weight.detach().clone() for weight in role.network.parameters()]


def same(a, b, tolerance=0.0):
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("loop", [train, train_run])
def test_a_step_draws_one_batch_for_all_roles(loop):
    steps, seen, draw = [], {"student": [], "fake": []}, batches(RING.sample, 8)

    def recorded(name):
        def loss(network, batch):
            seen[name].append(batch["x"])
            return network(batch["x"], batch["t"], batch["r"]).square().mean(1), {}

        return loss

    roles = {name: Role(MLP(seeds=(seed,)), recorded(name)) for seed, name in enumerate(seen)}
    loop(roles, lambda step: steps.append(step) or draw(step), 3, 2, progress=False)
    assert steps == [0, 1, 2]
    for rows in seen.values():  # two micro-batches per step: the batch of the step, whole and once
        assert torch.equal(torch.cat(rows), torch.cat([deal(draw(step))["x"] for step in range(3)]))


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Folders of what train_tiny.py leaves, by one process and by two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train_tiny.main(one)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command, options = [*launch, train_tiny.__file__, str(two)], {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env=os.environ | environment, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("option", train_tiny.OPTIONS)
def test_two_processes_equal_one(twice, option):
    """Real processes; the number and the kind are asserted, for a launcher may start one without a word."""
    alone, both = (json.loads((folder / f"{option}.json").read_text()) for folder in twice)
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert "MULTI_CPU" in both["kind"]
    for name, one in alone["weights"].items():
        assert torch.allclose(torch.tensor(one), torch.tensor(both["weights"][name]), rtol=0, atol=1e-5), name
    for one, two in zip(alone["history"], both["history"], strict=True):
        assert one.keys() == two.keys()
        if option == "plain":  # of equal parts, the mean of the parts' means
            assert two["student/loss"] == pytest.approx(one["student/loss"], rel=1e-4)


class Notes(GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory, main_process_only = "notes", False, True

    def __init__(self):
        super().__init__()
        self.kept = []

    tracker = property(lambda self: self.kept)

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.kept.append((step, values))


def test_every_entry_of_the_history_goes_to_the_trackers():
    notes, accelerator = Notes(), Accelerator(cpu=True)
    accelerator.trackers = [notes]
    draw = batches(RING.sample, 16)
    history = train_run({"student": student()}, draw, 5, accelerator=accelerator, progress=False, log_every=2)
    assert [step for step, _ in notes.kept] == [0, 2, 4]
    for entry, (step, values) in zip(history, notes.kept, strict=True):
        assert values.keys() - entry.keys() == {"seconds_per_step", "memory_gb"}
        assert entry.items() <= ({"step": step} | values).items()
        assert min(values["memory_gb"], values["seconds_per_step"], values["student/lr"]) > 0


def poisoned(steps, field="eps"):
    """Batches of 16 rows whose row 5 is not finite at these steps."""
    draws = batches(RING.sample, 16)

    def draw(step):
        batch = draws(step)
        if step in steps:
            batch[field][5] = float("nan")
        return batch

    return draw


def test_a_bad_batch_is_written_down_and_stops_the_run(tmp_path):
    for _ in range(2):  # a line each
        with refused(r"student/loss is nan at step 3; expected finite .*bad_batch.json"):
            run(student(), poisoned([3]), guard=Guard(folder=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "bad_batch.json").read_text().splitlines()]
    assert lines == 2 * [{"step": 3, "role": "student", "numbers": [3 * 16 + 5], "losses": ["nan"]}]


def test_a_row_of_processes_that_share_a_clip_is_written_down_once(tmp_path):
    """All of them have it: here two processes, and of two rows the first is bad."""
    losses, twice = torch.tensor([math.nan, 1.0, math.nan, 1.0]), {"place": [0, 1, 0, 1], "row": [7, 8, 7, 8]}
    batch = {name: torch.tensor(values) for name, values in twice.items()}
    Guard(1, folder=tmp_path).record(3, "student", [losses], batch, Accelerator(cpu=True))
    line = json.loads((tmp_path / "bad_batch.json").read_text())
    assert line == {"step": 3, "role": "student", "numbers": [6], "rows": [7], "losses": ["nan"]}


def test_bad_batches_are_skipped_within_a_bound_and_change_nothing(tmp_path, capsys):
    guard = Guard(2, folder=tmp_path)
    history, weights = run(student(), poisoned([3, 7]), guard=guard, log_every=1)
    assert guard.skipped == [3, 7]
    assert "step 3; skipped (1 of 2)" in capsys.readouterr().err
    assert [entry["step"] for entry in history] == [step for step in range(12) if step not in (3, 7)]
    assert all(bool(weight.isfinite().all()) for weight in weights)
    with refused("step 9; 2 were skipped before; expected finite losses"):
        run(student(), poisoned([3, 7, 9]), guard=Guard(2))


def test_what_a_loss_remembers_survives_a_skipped_batch():
    for steps, bad in ((12, 11), (1, 0)):
        role = student()
        role.loss = Rebalanced(role.loss)
        run(role, poisoned([bad]), steps, guard=Guard(1))
        assert all(bool(value.isfinite().all()) for value in role.loss.state_dict().values())


def test_a_loss_above_the_bound_or_a_gradient_that_is_not_finite_is_bad():
    with refused("at step 0"):
        run(student(), batches(RING.sample, 16), guard=Guard(above=1e-3))
    role = student(clip=1.0)
    role.network.bias0.register_hook(lambda grad: grad * float("inf"))
    guard = Guard(12)
    _, weights = run(role, batches(RING.sample, 16), guard=guard)
    assert guard.skipped == list(range(12))
    assert same(weights, [weight.detach() for weight in MLP().parameters()])


def test_a_tracker_that_fails_is_one_warning(capsys):
    notes, accelerator = Notes(), Accelerator(cpu=True)
    notes.log = lambda *_, **__: 1 / 0
    accelerator.trackers = [notes]
    draw = batches(RING.sample, 16)
    history = train_run({"student": student()}, draw, 5, accelerator=accelerator, progress=False, log_every=1)
    assert len(history) == 5
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "warning: the tracker failed (ZeroDivisionError: division by zero); going on without it" in said


@pytest.mark.parametrize("room", [10, 100, 200])
def test_a_full_disk_under_the_tracker_is_one_warning(tmp_path, capsys, monkeypatch, room):
    """tensorboard writes in a thread: as it begins, at its second entry or later the system refuses more."""
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    accelerator, draw = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path), batches(RING.sample, 16)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        start_trackers(accelerator)
        history = train_run({"student": student()}, draw, 9, accelerator=accelerator, progress=False, log_every=1)
        end_trackers(accelerator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (len(history), tracebacks) == (9, [])
    assert sum(path.stat().st_size for path in tmp_path.rglob("events*")) <= room
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "warning: the tracker failed (OSError: [Errno 27] File too large); going on without it" in said


def test_the_threads_of_trackers_alone_are_kept_quiet(capsys, monkeypatch):
    """Also one that ends when nothing is asked of the tracker any more; what other threads raise is still seen."""
    others = []
    monkeypatch.setattr(threading, "excepthook", others.append)
    notes, accelerator, go = Notes(), Accelerator(cpu=True), threading.Event()
    thread = threading.Thread(target=lambda: go.wait() and 1 / 0)
    accelerator.log_with, notes.start = [notes], thread.start
    notes.finish = lambda: (go.set(), thread.join())
    start_trackers(accelerator)
    other = threading.Thread(target=lambda: [][1])
    other.start()
    other.join()
    assert [failure.exc_type for failure in others] == [IndexError]
    log_figures({"step": 0, "loss": 1.0}, accelerator)
    assert notes.kept == [(0, {"loss": 1.0})]
    end_trackers(accelerator)
    said = capsys.readouterr().err
    assert (said.count("\n"), len(others)) == (1, 1)
    assert "warning: the tracker failed (ZeroDivisionError: division by zero)" in said


def test_processes_part_whatever_becomes_of_the_trackers(capsys, monkeypatch):
    notes, accelerator, parted = Notes(), Accelerator(cpu=True), []
    monkeypatch.setattr(type(accelerator.state), "destroy_process_group", lambda *_: parted.append(1))
    accelerator.trackers, notes.finish = [notes], lambda: 1 / 0
    end_trackers(accelerator)
    assert parted == [1]
    assert capsys.readouterr().err.count("\n") == 1
