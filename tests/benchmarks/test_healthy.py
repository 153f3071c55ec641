"""docs/healthy.md: what it says of the runs is true of the figures of every seed, docs/healthy/healthy.json."""

import json

import pytest

from benchmarks.healthy import CASES, LOSSES, SEEDS, draw
from minianyflow.support.install import ROOT

REPORT = json.loads((ROOT / "docs/healthy/healthy.json").read_text())
PAGE = (ROOT / "docs/healthy.md").read_text()


class Run:
    """The figures of one case and seed: loss, fake (its loss), norm and what samples measure, each a list."""

    def __init__(self, name, seed):
        entry = REPORT[name][seed]
        history = entry["history"]
        self.loss, self.fake = history[LOSSES[CASES[name][0]]], history.get("fake/loss")
        self.norm = next(values for key, values in history.items() if key.endswith("gradient_norm"))
        self.tangent, self.stopped = history.get("student/tangent"), entry["stopped"]
        self.spread, self.motion, self.size, self.distance = (
            entry["measures"][key] for key in ("spread", "motion", "size", "w2")
        )


@pytest.fixture(params=range(len(SEEDS)))
def runs(request):
    """{case: its `Run` with one of the seeds}."""
    return {name: Run(name, request.param) for name in CASES}


def test_healthy_runs_are_as_described(runs):
    teacher, forward, policy = runs["teacher"], runs["forward"], runs["on-policy"]
    assert teacher.loss[1] < 0.5 * teacher.loss[0]
    assert 0.75 * teacher.loss[4] < teacher.loss[-1] < teacher.loss[4]
    assert max(teacher.norm[1:]) < 0.3 * teacher.norm[0]
    assert 1.5 < max(forward.loss) / min(forward.loss) < 2.3
    assert 4 < max(forward.tangent) / min(forward.tangent) < 6
    assert forward.distance[0] > 300
    assert all(180 < value < 220 for value in forward.distance[1:])
    assert forward.distance[-1] == pytest.approx(190, rel=0.03)
    assert forward.norm[-1] < 0.5 * forward.norm[0]
    assert all(0.2 < value < 0.4 for value in policy.loss[2:])
    assert min(policy.loss[2:]) > 1.4 * policy.loss[0]
    assert 0.85 * policy.fake[0] < policy.fake[-1] < policy.fake[0]
    for values in (policy.spread, policy.motion, policy.size, policy.distance):
        assert values == pytest.approx([values[0]] * len(values), rel=0.03)


def test_ill_runs_are_as_described(runs):
    ill = runs["collapse"]
    assert ill.loss[-1] == pytest.approx(ill.loss[0], rel=0.2)
    assert 0.5 < ill.spread[-1] < 0.77
    assert ill.motion[-1] == pytest.approx(ill.spread[-1], abs=0.1)
    assert all(after < before + 0.01 for before, after in zip(ill.spread, ill.spread[1:], strict=False))

    ill = runs["saturation"]
    assert ill.loss[-1] < 0.01 * ill.loss[0]
    assert max(ill.fake) > 90 * ill.fake[0]
    assert 3.5 < ill.size[-1] < 5.2

    ill, healthy = runs["still"], runs["teacher"]
    assert all(ours < 0.85 * theirs for ours, theirs in zip(ill.loss, healthy.loss, strict=True))
    assert ill.loss[-1] == pytest.approx(0.7 * healthy.loss[-1], rel=0.05)
    assert ill.motion[-1] < 0.42 < 1 < healthy.motion[-1]

    ill = runs["nan"]
    assert ill.loss[1] > 7e5
    assert ill.norm[1] > 5e4 * ill.norm[0]
    assert ill.stopped in " ".join(PAGE.split())

    ill = runs["lagging"]
    assert 2.8 < runs["on-policy"].loss[-1] / ill.loss[-1] < 5.2
    assert max(ill.fake) > 1.9 * ill.fake[0]
    assert ill.fake[0] < ill.fake[-1] < max(ill.fake)
    assert ill.spread[-1] == pytest.approx(5 / 6 * ill.spread[0], rel=0.04)
    assert 1.6 < ill.distance[-1] / ill.distance[0] < 1.8


def test_every_run_is_on_the_page_and_can_be_drawn():
    for name in CASES:
        assert f"(healthy/{name}.png)" in PAGE
        assert (ROOT / f"docs/healthy/{name}.png").is_file()
    assert len(draw(REPORT, "lagging").axes) == 5
