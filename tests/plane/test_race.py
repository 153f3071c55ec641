"""The claims of the README: on the committed run, on a whole fresh one (long), and every step of a tiny one."""

import json
from statistics import stdev

import pytest
import torch

from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.plane import race
from minianyflow.plane.race import METHODS, NFE, load_student, run, sample
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from minianyflow.support.reports import mean, rounded, seed_means, text_table


def means(report, method, measure="sliced_w2"):
    """{nfe: mean over the seeds}."""
    return dict(zip(NFE, seed_means(report["methods"][method][measure]), strict=True))


def claims(report):
    taught, path = means(report, "teacher_step"), means(report, "teacher_step", "path_error")
    for nfe, bar in ((1, 0.020), (4, 0.018), (16, 0.013), (64, 0.009)):
        assert taught[nfe] <= bar, f"flow map at {nfe}: {taught[nfe]:.4f}"
    for fewer, more in ((4, 8), (8, 16), (16, 32), (32, 64)):
        assert path[more] < path[fewer]
    for name in ("eulerian", "lagrangian", "semigroup", "mixed", "teacher_step"):  # more steps help every flow map
        flow_map = means(report, name)
        assert flow_map[128] < 0.7 * flow_map[4]
        assert flow_map[128] < 0.012
    consistency, lost = means(report, "consistency"), means(report, "consistency", "path_error")
    pooled, floor = means(report, "consistency", "sliced_w2_pooled"), report["floors"]["fresh noise, pooled"]
    assert consistency[1] <= 0.015  # no weak baseline
    assert consistency[1] < taught[1]  # the better one-step sampler
    assert max(pooled.values()) < mean(floor["sliced_w2"]) + 3 * stdev(floor["sliced_w2"])  # as good as it can be seen
    assert min(pooled[nfe] for nfe in NFE[1:]) > pooled[1]  # and more steps do not help it
    assert taught[128] < 0.7 * taught[1]  # as they help the flow map
    assert taught[128] < 1.3 * mean(report["floors"]["exact flow"]["sliced_w2"])  # to its floor
    assert lost[1] < 0.05 < 0.8 < lost[2] < 1.5 < lost[4] < lost[128]  # and the path is lost at once
    euler = means(report, "euler")
    assert euler[1] == pytest.approx(1.073, rel=0.02)
    assert euler[8] == pytest.approx(0.090, rel=0.04)
    assert euler[64] == pytest.approx(0.0115, rel=0.15)
    assert mean(report["floors"]["exact flow"]["sliced_w2"]) < 0.0045
    cost = [report["methods"][name]["evaluations"] for name in METHODS[1:]]
    assert max(cost) <= 1.01 * min(cost)


def test_the_committed_run_bears_the_claims_out():
    claims(json.loads((ROOT / "docs/plane/any_step.json").read_text()))


@pytest.mark.long
def test_a_fresh_run_bears_the_claims_out(tmp_path):
    claims(run(output=tmp_path, quiet=True))


@pytest.mark.slow
def test_a_tiny_race_goes_the_whole_way(tiny_demo):
    folder, printed = tiny_demo
    report, students = json.loads((folder / "any_step.json").read_text()), [f"{m}.safetensors" for m in METHODS[1:]]
    assert {file.name for file in folder.iterdir()} == {"any_step.json", "any_step.png", *students}
    assert (report["dataset"], report["seeds"], list(report["methods"])) == ("spiral", [4, 5], list(METHODS))
    assert text_table(report) in printed
    for name, method in report["methods"].items():
        pooled = name == "consistency"
        for measure in ("sliced_w2", "path_error", *["sliced_w2_pooled"] * pooled):
            assert [len(values) for values in method[measure]] == [len(method["nfe"])] * 2
        assert (method["train_seconds"] > 0) == (method["evaluations"] > 0) == (name != "euler")
    cost = [report["methods"][name]["evaluations"] for name in METHODS[1:]]
    assert max(cost) <= 1.05 * min(cost)  # the same for all; a consistency target at t = 0 is free


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixed", "consistency"])
def test_a_written_student_samples_what_the_report_says(method, tiny_demo, monkeypatch):
    folder, _ = tiny_demo
    said = json.loads((folder / "any_step.json").read_text())
    points = said["measure"]["points"]
    monkeypatch.setattr(race, "POINTS", points)
    for copy in (0, 1):
        student = load_student(method, copy, folder)
        end = sample(method, student, "spiral", sobol_noise(points, (2,)), 1)[-1]
        found = sliced_w2(end, race.references("spiral")[0])
        assert found == pytest.approx(said["methods"][method]["sliced_w2"][copy][0], rel=1e-3)
    weights = [load_student(method, copy, folder).weight0 for copy in (0, 1)]
    assert not torch.equal(*weights)


def test_a_student_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no mixed\.safetensors in"):
        load_student("mixed", folder=tmp_path)
    with pytest.raises(InputError, match="copy 3 of mixed; expected 0 to 2"):
        load_student("mixed", copy=3)
    with pytest.raises(InputError, match="did you mean 'mixed'"):
        load_student("mixd")


def test_a_report_can_be_written_and_read_by_people():
    values = {"a": [torch.tensor([0.12345678, 2.0]), float("nan")], "b": 3}
    assert rounded(values, 4) == {"a": [[0.1235, 2.0], None], "b": 3}
    methods = {"x": {"nfe": [1, 2], "w": [[0.001, 0.002], [0.003, 0.002]], "w_pooled": [[0.001, 0.001]]}}
    floors = {"data": {"w": 0.0005}, "flow": {"w": [0.001, 0.003]}}
    table = text_table({"methods": methods, "floors": floors}, "w").splitlines()
    assert [line.split() for line in table] == [
        ["w", "x", "1000", "1", "2"],
        ["x", "2.0", "(2.0)", "2.0", "(0.0)"],
        ["x,", "pooled", "1.0", "1.0"],
        ["data", "0.5"],
        ["flow", "2.0", "(1.4)"],
    ]
