"""The claims of the README hold on a fresh run of the whole demo; its figures are those of the committed one."""

import json
from pathlib import Path

import pytest

from minianyflow.demo import METHODS, NFE, run, table

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = json.loads((ROOT / "docs/plane/any_step.json").read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The demo as `make demo` runs it."""
    return run(output=tmp_path_factory.mktemp("demo"), quiet=True)


def mean(report, method, figure="sliced_w2"):
    """{nfe: mean over the seeds}."""
    seeds = report["methods"][method][figure]
    assert len(seeds) == 3
    return dict(zip(NFE, (sum(each) / len(each) for each in zip(*seeds, strict=True)), strict=True))


def claims(report):
    mixed, path = mean(report, "mixed"), mean(report, "mixed", "path_error")
    for nfe, bar in ((1, 0.020), (4, 0.020), (16, 0.018), (64, 0.009)):
        assert mixed[nfe] <= bar, f"mixed flow map at {nfe}: {mixed[nfe]:.4f}"
    for fewer, more in ((4, 8), (8, 16), (16, 32), (32, 64)):
        assert path[more] < path[fewer]
    for name in ("eulerian", "lagrangian", "semigroup", "mixed"):  # more steps help every flow map, to the last
        flow_map = mean(report, name)
        assert flow_map[128] < 0.6 * flow_map[4]
        assert flow_map[128] < 0.007
    consistency, lost = mean(report, "consistency"), mean(report, "consistency", "path_error")
    assert consistency[1] <= 0.030  # no weak baseline
    assert min(consistency.values()) <= 0.019
    assert consistency[128] > 1.2 * min(consistency.values())  # more steps end up hurting it
    assert consistency[128] > 2 * mixed[128]
    assert lost[1] < 0.1 < 1.5 < lost[4] < lost[128]  # and the path is lost at once
    euler = mean(report, "euler")
    assert euler[1] == pytest.approx(1.073, rel=0.02)
    assert euler[8] == pytest.approx(0.090, rel=0.04)
    assert euler[64] == pytest.approx(0.0115, rel=0.15)
    assert report["exact_flow"]["sliced_w2"] < 0.0045
    cost = [report["methods"][name]["network_evaluations"] for name in METHODS[1:]]
    assert max(cost) <= 1.05 * min(cost)


@pytest.mark.slow
def test_a_fresh_run_bears_the_claims_out(report):
    claims(report)


def test_the_committed_run_bears_the_claims_out():
    claims(COMMITTED)


def test_the_readme_quotes_the_committed_run():
    readme = (ROOT / "README.md").read_text()
    assert table(COMMITTED) in readme
    for document in ("README.md", "docs/plane.md"):
        assert "any_step" in (ROOT / document).read_text()


def test_the_docs_quote_the_committed_ablation():
    ablation = json.loads((ROOT / "docs/plane/ablation.json").read_text())
    assert table(ablation) in (ROOT / "docs/plane.md").read_text()
