"""docs/healthy.md: what it says of the runs is true of their figures, docs/healthy/healthy.json."""

import json

import pytest

from benchmarks.healthy import CASES, LOSSES, draw
from minianyflow.support.install import ROOT

REPORT = json.loads((ROOT / "docs/healthy/healthy.json").read_text())
MEASURED = {name: run["measures"] for name, run in REPORT.items()}
PAGE = (ROOT / "docs/healthy.md").read_text()


def loss(name, kind=None):
    return REPORT[name]["history"][kind or LOSSES[CASES[name][0]]]


def norm(name):
    return next(values for key, values in REPORT[name]["history"].items() if key.endswith("gradient_norm"))


def end(name, key):
    return MEASURED[name][key][-1]


def test_healthy_runs_are_as_described():
    teacher, distance = loss("teacher"), MEASURED["forward"]["w2"]
    assert teacher[1] < 0.5 * teacher[0]
    assert 0.8 * teacher[4] < teacher[-1] < teacher[4]
    assert norm("teacher")[-1] < norm("teacher")[1] < norm("teacher")[0]
    assert max(loss("forward")) < 2 * min(loss("forward"))
    errors = loss("forward", "student/tangent")
    assert 4 < max(errors) / min(errors) < 5
    assert distance[0] > 300
    assert all(180 < value < 210 for value in distance[1:])
    assert norm("forward")[-1] < 0.5 * norm("forward")[0]
    matching = loss("on-policy")
    assert all(1.7 * matching[0] < value < 2.2 * matching[0] for value in matching[3:])
    assert loss("on-policy", "fake/loss")[-1] < loss("on-policy", "fake/loss")[0]
    for key in ("spread", "motion", "size", "w2"):
        values = MEASURED["on-policy"][key]
        assert values == pytest.approx([values[0]] * len(values), rel=0.03)


def test_ill_runs_are_as_described():
    assert 0.8 * loss("collapse")[0] < loss("collapse")[-1] < loss("collapse")[0]
    assert end("collapse", "spread") < 0.52
    assert end("collapse", "motion") < 0.6
    spread = MEASURED["collapse"]["spread"]
    assert sorted(spread, reverse=True) == spread

    assert loss("saturation")[-1] < 0.01 * loss("saturation")[0]
    assert max(loss("saturation", "fake/loss")) > 90 * loss("saturation", "fake/loss")[0]
    assert end("saturation", "size") > 4

    assert all(ours < 0.85 * theirs for ours, theirs in zip(loss("still"), loss("teacher"), strict=True))
    assert loss("still")[-1] == pytest.approx(0.67 * loss("teacher")[-1], rel=0.03)
    assert end("still", "motion") < 0.42 < 1 < end("teacher", "motion")

    assert loss("nan")[1] > 1e6
    assert norm("nan")[1] > 1e5 * norm("nan")[0]
    assert REPORT["nan"]["stopped"] in " ".join(PAGE.split())

    assert loss("lagging")[-1] < loss("on-policy")[-1] / 4
    assert max(loss("lagging", "fake/loss")) > 1.8 * loss("lagging", "fake/loss")[0]
    assert end("lagging", "spread") < 5 / 6 * MEASURED["lagging"]["spread"][0] + 0.01
    assert end("lagging", "w2") > 1.6 * MEASURED["lagging"]["w2"][0]


def test_every_run_is_on_the_page_and_can_be_drawn():
    for name in CASES:
        assert f"(healthy/{name}.png)" in PAGE
        assert (ROOT / f"docs/healthy/{name}.png").is_file()
    assert len(draw(REPORT, "lagging").axes) == 5
