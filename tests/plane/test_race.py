"""The claims of the README: on the committed run, on a whole fresh one (long), and every step of a tiny one."""

import json
from statistics import stdev

import pytest
import torch
from safetensors.torch import save_file

from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.plane import race
from minianyflow.plane.race import METHODS, NFE, load_student, run, sample
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from minianyflow.support.reports import mean, rounded, seed_means, text_table


def means(report, method, measure="sliced_w2"):
    """{nfe: mean over the seeds}."""
    return dict(zip(NFE, seed_means(report["methods"][method][measure]), strict=True))


def committed(name):
    return json.loads((ROOT / "docs/plane" / name).read_text())


def claims(report):
    """What README says of a run; the bounds are thrice what other seeds read, or compare methods with each other."""
    taught, path = means(report, "teacher_step"), means(report, "teacher_step", "path_error")
    consistency, lost = means(report, "consistency"), means(report, "consistency", "path_error")
    other = committed("fresh.json")
    for name, found in (("teacher_step, spiral", taught), ("consistency, spiral", {1: consistency[1]})):
        bars = dict(zip(other["methods"][name]["nfe"], seed_means(other["methods"][name]["sliced_w2"]), strict=True))
        assert all(found[nfe] < 3 * bars[nfe] for nfe in found if nfe in bars), name
    for fewer, more in ((4, 8), (8, 16), (16, 32), (32, 64)):
        assert path[more] < path[fewer]
    floor, fresh_noise = (report["floors"][name]["sliced_w2"] for name in ("exact flow", "fresh noise, pooled"))
    for name in ("eulerian", "lagrangian", "semigroup", "mixed", "teacher_step"):  # more steps help every flow map
        flow_map = means(report, name)
        assert flow_map[128] < 0.7 * flow_map[4]
        assert flow_map[128] < 3 * mean(floor)
    pooled = means(report, "consistency", "sliced_w2_pooled")
    assert consistency[1] < taught[1]  # the better one-step sampler
    assert stdev(fresh_noise) < 0.1 * (pooled[1] - mean(fresh_noise))  # seen above its floor, far beyond the scatter
    assert max(pooled.values()) < 3 * mean(fresh_noise)  # more steps do not ruin it
    assert min(pooled[nfe] for nfe in NFE[1:]) > 0.8 * pooled[1]  # nor help it
    assert taught[128] < 0.7 * taught[1]  # as they help the flow map
    assert taught[128] < 1.3 * mean(floor)  # to its floor
    assert 10 * lost[1] < lost[2] < lost[4] < lost[128]  # and the path is lost at once
    cost = [report["methods"][name]["evaluations"] for name in METHODS[1:]]
    assert max(cost) <= 1.01 * min(cost)


def test_the_committed_run_bears_the_claims_out():
    claims(committed("any_step.json"))


def test_five_fresh_seeds_bear_the_page_out():
    """docs/plane.md: consistency ahead at one step on each seed, path errors that fall on each seed and target."""
    report = committed("fresh.json")
    methods, taught = report["methods"], report["methods"]["teacher_step, spiral"]
    assert len(report["seeds"]) == 5
    assert not set(report["seeds"]) & set(committed("any_step.json")["seeds"])
    one_step = {name: [seed[0] for seed in method["sliced_w2"]] for name, method in methods.items()}
    assert max(one_step["consistency, spiral"]) < min(one_step["teacher_step, spiral"])
    for name in methods:
        if name.startswith("teacher_step"):
            assert all(seed == sorted(seed, reverse=True) for seed in methods[name]["path_error"]), name
    assert seed_means(taught["sliced_w2"])[-1] < 1.3 * report["floors"]["exact flow, spiral"]["sliced_w2"]


@pytest.mark.long
def test_a_fresh_run_bears_the_claims_out(tmp_path):
    report = run(output=tmp_path, quiet=True)
    claims(report)
    for found, read in zip(
        means(report, "euler").values(), means(committed("any_step.json"), "euler").values(), strict=True
    ):
        assert found == pytest.approx(read, rel=0.01)  # nothing is trained there


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
    save_file({"weight0": torch.zeros(1, 2, 2)}, tmp_path / "mixed.safetensors")  # somebody else's
    (tmp_path / "eulerian.safetensors").write_bytes(b"cut short")
    for name in ("mixed", "eulerian"):
        with pytest.raises(InputError, match=f"{name}.safetensors is no file of students"):
            load_student(name, folder=tmp_path)


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
