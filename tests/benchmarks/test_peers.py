"""The comparison with other libraries: its measure, clock and direction of time, with stand-ins and with those here."""

import importlib.util
import json
import time
from itertools import permutations

import pytest
import torch

from benchmarks import peers
from benchmarks.peers import PEERS, measure, solver_of, train_for, velocity_loss, velocity_sampler
from minianyflow.batch import batches
from minianyflow.interpolant import interpolate
from minianyflow.mixtures import GaussianMixture
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.plane.race import Budget
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from toy_data import plane

COMMITTED = json.loads((ROOT / "docs/plane/any_step.json").read_text())
INSTALLED = [name for name, packages in PEERS.items() if all(map(importlib.util.find_spec, packages))]
QUIET = {"disable": True}
SMALL = Budget(rows=16, width=16, depth=2)


def straight(noise, x, t):
    """A stand-in for a peer: the line from noise (0) to data (1) and its slope."""
    t = t[:, None]
    return (1 - t) * noise + t * x, x - noise


def exact(z, t, r):
    return plane.spiral().velocity(z, t)


@pytest.mark.parametrize("peer", sorted({"torchcfm", *INSTALLED}))  # torchdiffeq, torchcfm's solver, is always here
def test_the_measure_of_the_exact_velocity_is_the_demos(peer):
    """The peers' direction of time, solver and step count against our own Euler row, committed."""
    rows = dict(zip(COMMITTED["methods"]["euler"]["nfe"], COMMITTED["methods"]["euler"]["sliced_w2"][0], strict=True))
    distances = measure(velocity_sampler(exact, solver_of(peer), "euler"), "spiral", nfe=(1, 4))
    assert distances == [[pytest.approx(rows[nfe], rel=1e-3) for nfe in (1, 4)]]


@pytest.mark.parametrize("peer", sorted({"torchcfm", *INSTALLED}))
def test_evaluations_are_equal_whatever_the_solver(peer):
    calls, z = [], torch.randn(5, 2)

    def counted(z, t, r):
        calls.append(float(t[0]))
        return 3 * t[:, None].square().expand_as(z)

    for method in ("euler", "midpoint"):
        for nfe in (2, 8):
            calls.clear()
            end = velocity_sampler(counted, solver_of(peer), method)(z, nfe)
            assert len(calls) == nfe
            assert calls[0] == 1.0  # from noise
            if method == "midpoint" and nfe == 8:  # whose error on t^2 is h^2 / 4
                assert torch.allclose(z - end, torch.full_like(z, 1 - 1 / 64), atol=1e-5)


def test_their_loss_is_our_flow_matching_in_the_other_direction():
    """The very errors of FlowMapLoss({}) on the same batch, with a stand-in and with every peer that is installed."""
    network, mixture = MLP(width=16, depth=2, seeds=(0, 1)), plane.ring8()
    batch = batches(mixture.sample, 8, (0, 1), diagonal=1.0, end=0.0)(0)
    ours, raw = FlowMapLoss({}, weight=torch.ones_like)(network, batch)
    for flow in (straight, *(peers.conditional_flow(peer) for peer in INSTALLED if "OT" not in peer)):
        theirs, error = velocity_loss(flow, 2)(network, batch)
        assert torch.allclose(theirs, ours, atol=1e-5)
        assert float(error["velocity"]) == pytest.approx(float(raw["tangent"]), rel=1e-5)
    for flow in (peers.conditional_flow(peer) for peer in INSTALLED if "OT" in peer):  # it pairs anew
        state, target = flow(batch["eps"], batch["x"], torch.ones(16))
        assert torch.cdist(state, batch["x"]).amin(1).max() < 1e-4
        assert float(target.norm(dim=1).mean()) < float((batch["x"] - batch["eps"]).norm(dim=1).mean())


def test_each_copy_is_paired_by_itself():
    seen = []

    def flow(noise, x, t):
        seen.append(x)
        return straight(noise, x, t)

    batch = batches(plane.ring8().sample, 4, (0, 1), diagonal=1.0, end=0.0)(0)
    velocity_loss(flow, 2)(MLP(width=16, depth=2, seeds=(0, 1)), batch)
    for copy, x in enumerate(seen):
        assert torch.equal(x, batch["x"][batch["condition"]["copy"] == copy])
    assert [len(x) for x in seen] == [4, 4]


def test_pairs_are_optimal_within_a_copy_and_come_back_with_other_times():
    draw = batches(plane.ring8().sample, 4, (0, 1))
    pairs = [peers.paired(draw, 2, times=2)(step) for step in range(3)]
    for step, batch in enumerate(pairs):
        before = draw(step - step % 2)
        assert torch.equal(batch["x"], before["x"])
        assert torch.equal(batch["t"], draw(step)["t"])
        for copy in (0, 1):
            x, eps, paired = (given[copy::2] for given in (before["x"], before["eps"], batch["eps"]))
            costs = [(x - eps[list(order)]).square().sum() for order in permutations(range(4))]
            assert (x - paired).square().sum() == pytest.approx(float(min(costs)), rel=1e-5)
            assert torch.equal(paired.sort(0).values, eps.sort(0).values)


def test_an_averaged_velocity_is_that_of_a_mixture_of_its_pool():
    """A pool of points is a mixture without width: each copy's own, the rows of the batch among them."""
    sample, rows = plane.spiral().sample, 8
    averaged = peers.AveragedVelocity(batches(sample, rows, (0, 1)), sample, (0, 1), points=64)
    batch = averaged.draw(0)
    z, t = interpolate(batch["x"], batch["eps"], batch["t"]), batch["t"]
    v = averaged(z, t)
    for copy, pool in enumerate(averaged.pool):
        assert torch.equal(pool[:rows], batch["x"][copy::2])
        exact = GaussianMixture(pool.double(), 1e-6).velocity(z[copy::2].double(), t[copy::2].double())
        assert torch.allclose(v[copy::2].double(), exact, atol=1e-3)


def test_the_clock_ends_a_training_and_brings_the_rate_down_to_zero():
    role = peers.make_role((0,), SMALL, 0.4, velocity_loss(straight, 1))
    before = time.process_time()
    train_for(role, batches(plane.ring8().sample, 16, diagonal=1.0, end=0.0), QUIET)
    assert time.process_time() - before >= 0.4
    assert role.steps > 5
    assert role.schedule(10**6, 1) < 1e-9
    half = peers.make_role((0,), SMALL, 1e9, velocity_loss(straight, 1))
    assert half.schedule(10**6, 1) == pytest.approx(SMALL.lr)


def test_a_comparison_is_written_whole(tmp_path, monkeypatch):
    """Ours, and the peers that are here, at two step counts, in this process."""
    monkeypatch.setattr(peers, "NFE", (1, 4))
    monkeypatch.setattr(peers, "POINTS", 1024)
    monkeypatch.setattr(peers, "references", lambda name: plane.load(name).sample(2048).split(1024))
    here = lambda jobs, workers: {name: function(*rest) for name, (function, rest) in jobs.items()}  # noqa: E731
    monkeypatch.setattr(peers, "run_jobs", here)
    monkeypatch.setattr(peers, "exact_flow", lambda name: (plane.load(name).sample(1024), None))
    report = peers.run(("ring8",), (0, 1), 0.1, tuple(INSTALLED), tmp_path, 1, True, SMALL)
    assert json.loads((tmp_path / "peers.json").read_text()) == report
    assert (tmp_path / "peers.png").stat().st_size > 1000
    methods = report["targets"]["ring8"]["methods"]
    assert len(methods) == len(peers.OURS) + 2 * len(INSTALLED)
    for label, method in methods.items():
        assert method["nfe"] == ([4] if label.endswith("midpoint") else [1, 4])
        assert len(method["sliced_w2"]) == 2
        assert method["network_evaluations"] > method["steps"] > 0
        assert method["train_seconds"] == pytest.approx(0.1)
    assert len(peers.table(report["targets"]["ring8"]).splitlines()) == 2 + len(methods)


def test_a_ratio_is_of_means_at_equal_evaluations():
    ours = {"nfe": [2, 4], "sliced_w2": [[9.0, 0.1], [9.0, 0.3]], "steps": 1}
    target = {"methods": {f"flow map, {name}": ours for name in peers.OURS}}
    target["methods"] |= {
        "torchcfm, euler": {"nfe": [2, 4], "sliced_w2": [[9.0, 1.0], [9.0, 5.0]], "steps": 1},
        "torchcfm, midpoint": {"nfe": [2], "sliced_w2": [[1.8], [1.8]], "steps": 1},
    }
    assert peers.ratios(target, "data velocity") == {"torchcfm, euler": 15.0}
    assert peers.ratios(target, "data velocity", 2) == {"torchcfm, euler": 1.0, "torchcfm, midpoint": 0.2}
    assert "| torchcfm, euler | 15.0 | 15.0 | 15.0 |" in peers.ratio_table(target)
    assert "| torchcfm, midpoint | 1800.0 (0.0) | - |" in peers.table(target).replace("| - | 1800", "| 1800")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peers": ("torchcmf",)}, "unknown peer 'torchcmf'.*did you mean 'torchcfm'"),
        ({"datasets": ("spirals",), "peers": ()}, "unknown dataset 'spirals'.*did you mean 'spiral'"),
        ({"seconds": 0.0, "peers": ()}, "0.0 seconds; expected different seeds, and seconds above 0"),
        ({"budget": Budget(width=0), "peers": ()}, "width 0; expected at least 1"),
        ({"seeds": (1, 1), "peers": ()}, r"seeds \[1, 1\]"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message) as problem:
        peers.run(output=tmp_path / "out", **arguments)
    assert "\n" not in str(problem.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"flow_matching is not installed here; pip install .*\[peers\]") as problem:
        peers.run(output=tmp_path / "out")
    assert "\n" not in str(problem.value)


def test_the_command_makes_the_committed_run_and_prints_its_tables(monkeypatch, capsys):
    report, options = json.loads((ROOT / "docs/peers/peers.json").read_text()), []
    monkeypatch.setattr(peers, "run", lambda *given: options.extend(given) or report)
    assert peers.main([]) == 0
    assert options[1:3] == [tuple(report["seeds"]), report["budget"]["cpu_seconds"]]
    assert options[-1].width == report["budget"]["width"]
    target = report["targets"]["spiral"]
    assert peers.ratio_table(target) in capsys.readouterr().out
    assert min(ratio for peer, ratio in peers.ratios(target, "exact velocity").items() if "OT" not in peer) > 10
