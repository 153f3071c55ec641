"""The one loop: repeatable, the same in one process and in two, copies independent, failures named."""

import json
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from minianyflow.batch import batches, part_of
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, draw_on_policy
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.training import Role
from minianyflow.wan.guard import Guard, end_trackers, log_figures, start_trackers
from minianyflow.wan.trainer import train_run
from tests.refused import refused
from toy_data import plane

RING = plane.ring8()
HERE = Path(__file__).parent


def velocity(z, t, copy=None):
    return RING.velocity(z, t)


def student(seeds=(0,), **options):
    return Role(MLP(seeds=seeds), FlowMapLoss({"eulerian": 0.5, "semigroup": 0.5}, velocity), **options)


def run(role, draw, steps=12, **options):
    history = train_run({"student": role}, draw, steps, accelerator=Accelerator(cpu=True), progress=False, **options)
    return history, [weight.detach().clone() for weight in role.network.parameters()]


def same(a, b, tolerance=0.0):
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(a, b, strict=True))


def test_seeds_reproduce_bit_for_bit():
    draw = batches(RING.sample, 32, (0, 1))
    first, again = (run(student((0, 1)), draw)[1] for _ in range(2))
    assert same(first, again)
    other = run(student((0, 2)), batches(RING.sample, 32, (0, 2)))[1]
    assert same([weight[0] for weight in first], [weight[0] for weight in other], 1e-6)
    assert not same(first, other, 1e-3)


def test_copies_trained_together_are_what_they_are_alone():
    together = run(student((3, 4, 5)), batches(RING.sample, 32, (3, 4, 5)))[1]
    for index, seed in enumerate((3, 4, 5)):
        alone = run(student((seed,)), batches(RING.sample, 32, (seed,)))[1]
        assert same([weight[index] for weight in together], [weight[0] for weight in alone], 2e-5)


def test_a_row_is_computed_by_the_copy_it_names_wherever_it_stands():
    network, alone = MLP(seeds=(7, 8)), [MLP(seeds=(7,)), MLP(seeds=(8,))]
    z, t, r = torch.randn(9, 2), torch.rand(9), torch.rand(9) * 0
    copy = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0])  # uneven and out of order
    with torch.no_grad():
        out = network(z, t, r, copy=copy)
        for row in range(9):
            own = alone[copy[row]](z[row : row + 1], t[row : row + 1], r[row : row + 1])[0]
            assert torch.allclose(out[row], own, atol=1e-6)


def test_accumulated_parts_equal_the_whole():
    draw = batches(RING.sample, 32)
    assert same(run(student(), draw)[1], run(student(), draw, accumulate=4)[1], 2e-5)
    with refused("does not divide"):
        run(student(), draw, accumulate=5)


def test_parts_of_a_batch_make_up_the_batch():
    batch = batches(RING.sample, 6, (0, 1))(0)
    parts = [part_of(batch, index, 3) for index in range(3)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert torch.equal(torch.cat([part["condition"]["copy"] for part in parts]), batch["condition"]["copy"])


@pytest.mark.slow
@pytest.mark.parametrize("option", ["plain", "rebalance", "one row"])
def test_two_processes_equal_one(tmp_path, option):
    """Real processes; the number and the kind are asserted, for a launcher that starts one says nothing."""
    launch = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    reports = {}
    for count, command in launch.items():
        file = tmp_path / f"{count}.json"
        done = subprocess.run(
            [*command, str(HERE / "train_tiny.py"), str(file), option],
            capture_output=True,
            text=True,
            env=one_thread(),
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        reports[count] = json.loads(file.read_text())
    assert (reports[1]["processes"], reports[2]["processes"]) == (1, 2)
    assert "MULTI_CPU" in reports[2]["kind"]
    for name, one in reports[1]["weights"].items():
        assert torch.allclose(torch.tensor(one), torch.tensor(reports[2]["weights"][name]), rtol=0, atol=1e-5), name
    for one, two in zip(reports[1]["history"], reports[2]["history"], strict=True):
        assert one.keys() == two.keys()
        if option == "plain":  # of equal parts, the mean of the parts' means
            assert two["student/loss"] == pytest.approx(one["student/loss"], rel=1e-4)


def one_thread():
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": ""}


def test_the_average_is_the_moving_average():
    role, seen = student(ema=0.9, ema_after=2), []

    def look(step):
        seen.append(next(role.network.parameters()).detach().clone())

    run(role, batches(RING.sample, 16), 6, on_step=look)
    expected = seen[2]  # begun after two steps, with what stands then
    for weight in seen[3:]:
        expected = 0.9 * expected + 0.1 * weight
    assert torch.allclose(next(role.average.module.parameters()), expected, atol=1e-6)


def test_no_average_is_made_where_none_is_asked_for():
    role = student(ema=None)
    assert role.average is None
    with_average, without = (run(each, batches(RING.sample, 16), 4) for each in (student(ema=0.9), role))
    assert with_average[0] == without[0]
    assert same(with_average[1], without[1])  # and training is the same


def test_the_optimiser_holds_its_weights_by_name():
    network = MLP()
    network.bias0.requires_grad_(False)
    (group,) = Role(network).optimizer.param_groups
    assert group["param_names"] == [name for name, _ in network.named_parameters() if name != "bias0"]
    assert [id(weight) for weight in group["params"]] == [id(network.get_parameter(n)) for n in group["param_names"]]
    assert group["fused"]


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
    assert [{"step": step} | values for step, values in notes.kept] == history


def test_learning_rate_warms_up_and_falls_to_zero():
    role = student(lr=1.0, warmup=10)
    assert [role.schedule(step, 100) for step in (0, 4)] == pytest.approx([0.1, 0.5], rel=0.01)
    assert role.schedule(99, 100) < 1e-3
    assert student(lr=1.0, warmup=0, cosine=False).schedule(99, 100) == 1.0


def test_two_roles_take_turns_on_the_same_batch():
    draw_pairs_of = batches(RING.sample, 16)

    def draw(step):
        return draw_pairs_of(step) | draw_on_policy((2,), 16, generator(9, step))

    role, fake = Role(MLP(), lr=1e-3), Role(MLP(seeds=(1,)), lr=1e-3)
    role.loss = OnPolicyLoss(velocity, fake.network, FlowMapLoss({"eulerian": 1.0}, velocity))
    fake.loss = FakeScoreLoss(role.network)
    before = [next(each.network.parameters()).detach().clone() for each in (role, fake)]
    history = train_run({"student": role, "fake": fake}, draw, 3, accelerator=Accelerator(cpu=True), progress=False)
    assert {"student/distribution matching", "student/tangent", "fake/tangent", "fake/loss"} <= set(history[-1])
    for each, weight in zip((role, fake), before, strict=True):
        assert not torch.equal(next(each.network.parameters()), weight)


def test_training_learns():
    history, _ = run(student(), batches(RING.sample, 128), 300)
    assert history[-1]["student/tangent"] < 0.2 * history[0]["student/tangent"]


def test_a_weight_without_gradient_is_an_error():
    role = student()
    role.network.unused = torch.nn.Parameter(torch.zeros(2))
    with refused("no gradient reached unused"):
        run(role, batches(RING.sample, 8))


def test_a_gradient_that_goes_missing_later_is_an_error():
    """requires_grad switched off between a forward and its backward: torch leaves the gradient None, silently."""
    role = student()
    loss, steps = role.loss, []

    def freezing(network, batch):
        losses = loss(network, batch)
        steps.append(len(steps))
        role.network.weight1.requires_grad_(len(steps) < 3)
        return losses

    role.loss = freezing
    with refused(r"weight1 of role 'student' was frozen after .*\(1 weights in all\)"):
        run(role, batches(RING.sample, 8))
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (lambda: batches(lambda n, source: torch.full((n, 2), float("nan")), 8), "the data holds NaN"),
        (lambda: run(student(lr=1e30, warmup=0), batches(RING.sample, 8), 300), "expected finite losses"),
        (lambda: run(student(), batches(RING.sample, 8), 0), "at least 1"),
        (lambda: Role(MLP().requires_grad_(False)), "none of whose weights is trained"),
        (lambda: MLP(seeds=(0, 1))(torch.zeros(2, 2), torch.ones(2), torch.ones(2)), "copy="),
        (lambda: MLP()(torch.zeros(2, 3), torch.ones(2), torch.ones(2)), r"z \(B, 2\)"),
    ],
)
def test_bad_input_is_one_clear_line(start, words):
    with refused(words):
        start()


# ---- bad batches and trackers


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
        with pytest.raises(
            InputError, match=r"student/loss is nan at step 3; expected finite .*bad_batch.json"
        ) as problem:
            run(student(), poisoned([3]), guard=Guard(folder=tmp_path))
        assert "\n" not in str(problem.value)
    told = [json.loads(line) for line in (tmp_path / "bad_batch.json").read_text().splitlines()]
    assert told == 2 * [{"step": 3, "role": "student", "numbers": [3 * 16 + 5], "losses": ["nan"]}]


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
    role = student()
    role.loss.rebalance = True
    run(role, poisoned([11]), guard=Guard(1))
    assert bool(role.loss.diagonal_loss.isfinite())


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
    assert [told.exc_type for told in others] == [IndexError]
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
