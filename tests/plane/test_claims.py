"""The claims of the README hold on a fresh run of the whole demo; its figures are those of the committed one."""

import json
from pathlib import Path

import pytest

from minianyflow.plane.race import METHODS, NFE, run, table

ROOT = Path(__file__).resolve().parents[2]
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
    pooled, floor = mean(report, "consistency", "sliced_w2_pooled"), report["fresh_noise"]["sliced_w2_pooled"]
    assert consistency[1] <= 0.030  # no weak baseline
    assert min(consistency.values()) <= 0.019
    assert consistency[1] < mixed[1]  # the better one-step sampler
    assert max(pooled[nfe] for nfe in (2, 4, 8)) < 1.3 * floor  # as good as fresh noise lets it be
    assert pooled[128] > 1.2 * max(floor, pooled[1])  # more steps end up hurting it
    assert mixed[128] < 0.6 * mixed[1]  # and helping the flow map
    assert lost[1] < 0.1 < 0.8 < lost[2] < 1.5 < lost[4] < lost[128]  # and the path is lost at once
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
    pooled, lost = mean(COMMITTED, "consistency", "sliced_w2_pooled"), mean(COMMITTED, "consistency", "path_error")
    floors, seeds = (
        COMMITTED["fresh_noise"],
        [each[-1] for each in COMMITTED["methods"]["consistency"]["sliced_w2_pooled"]],
    )
    few = [1000 * pooled[nfe] for nfe in (2, 4, 8)]
    for sentence in (
        f"{1000 * pooled[1]:.1f} against {1000 * mean(COMMITTED, 'mixed')[1]:.1f} for the best flow map",
        f"{1000 * COMMITTED['exact_flow']['sliced_w2']:.1f} for a sampler without fresh noise",
        f"{1000 * floors['sliced_w2']:.1f} for one with it, {1000 * floors['sliced_w2_pooled']:.1f} if four draws",
        f"{min(few):.1f} to {max(few):.1f} where the floor is {1000 * floors['sliced_w2_pooled']:.1f}",
        f"{lost[2]:.2f} away from where the exact flow leads, one step {lost[1]:.2f}".replace("0.", "."),
        f"pooled {1000 * pooled[64]:.1f} at 64 and {1000 * pooled[128]:.1f} at 128",
        f"single seeds from {1000 * min(seeds):.0f} to {1000 * max(seeds):.0f}",
    ):
        assert sentence in " ".join(readme.split()), sentence
    for document in ("README.md", "docs/plane.md"):
        assert "any_step" in (ROOT / document).read_text()


def test_the_docs_quote_the_committed_ablation():
    ablation = json.loads((ROOT / "docs/plane/ablation.json").read_text())
    assert table(ablation) in (ROOT / "docs/plane.md").read_text()
