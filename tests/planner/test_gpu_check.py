"""The check of a GPU at tiny size on a CPU: every line but CUDA's own; and what it refuses."""

import json
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch

from minianyflow.networks.lora_roles import storages
from minianyflow.planner import gpu_check
from minianyflow.planner.commands import gpu_check as command
from minianyflow.planner.forward_cost import rope_table
from minianyflow.planner.gpu_check import Request, check, markdown, memory_reader, settings, too_large
from minianyflow.planner.plan import plan_run
from minianyflow.planner.report import ways
from minianyflow.support.cli import run
from tests.refused import refused

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(gpu_check, "TIMING", 0.01)
        yield


def tiny(*stages, **changes):
    return Request(("tiny",), ("bidirectional",), stages, device="cpu", **{"steps": 2} | changes)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A report, its folder and the lines said along the way."""
    folder, lines = tmp_path_factory.mktemp("check"), []
    with patch.object(gpu_check, "train_run", wraps=gpu_check.train_run) as train:
        report = check(tiny("forward", options=("keep_attention=true",)), folder, lines.append)
    (roles, _, steps, *_), _ = train.call_args
    assert (list(roles), steps) == (["student"], 3)  # with the loop of a run: one step to warm up, two timed
    return report, folder, lines


@pytest.mark.slow
def test_a_report_and_its_page(checked):
    report, folder, lines = checked
    assert "planned peak" in lines[0]
    assert (len(report["cases"]), report["options"]) == (1, ["keep_attention=true"])
    assert json.loads((folder / "gpu_check.json").read_text()) == json.loads(json.dumps(report))
    page = (folder / "gpu_check.md").read_text()
    assert page == markdown(report)
    assert page.count("| tiny bidirectional forward |") == 1
    assert f"CPU, {report['date']}" in page


@pytest.mark.slow
def test_rates_are_of_the_planned_work_and_the_timed_steps(checked, tmp_path):
    """And the plan counts the evaluations that training made."""
    entry = checked[0]["cases"][0]
    mean = sum(entry["seconds"]) / 2
    assert entry["seconds_a_step"] == mean > 0
    assert entry["tflops"] == pytest.approx(entry["plan"]["flop"] / mean / 1e12)
    assert entry["share"] == pytest.approx(entry["tflops"] / checked[0]["matrix"]["tflops"])
    config, clip = settings(tiny("forward"), ("tiny", "bidirectional", "forward"), tmp_path)
    assert entry["plan"]["flop"] == plan_run(config, clip, steps=[1, 2], advise=False).flop
    rows, planned = entry["rows"]["student"], plan_run(config, clip, steps=[0, 1, 2], advise=False).evaluations
    assert (rows["forwards"] / 6, rows["with_grad"] / 6) == pytest.approx(tuple(planned["student"]))


@pytest.mark.slow
def test_memory_by_part(checked):
    """The base is what its storages are; adapters, an average and AdamW's state come on top."""
    memory, plan = (checked[0]["cases"][0][name] for name in ("memory", "plan"))
    base = storages(gpu_check.build_transformer(gpu_check.TINY, "bidirectional", "cpu"))[0]
    assert memory["base"] == pytest.approx(base, rel=0.05)
    assert memory["roles"] == pytest.approx(plan["memory"]["adapters"] + plan["memory"]["averages"], rel=0.05)
    assert memory["optimiser"] >= plan["memory"]["optimiser"]
    assert memory["peak"] == pytest.approx(plan["peak"], rel=0.3)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["forward", "on_policy"])
def test_every_way_to_hold_a_run_is_measured_the_smallest_first(stage, tmp_path):
    report = check(tiny(stage, ways=True, steps=1), tmp_path)
    assert len(report["cases"]) == len(ways(stage))
    peaks = [entry["plan"]["peak"] for entry in report["cases"]]
    assert peaks == sorted(peaks)
    tables = rope_table(gpu_check.build_transformer(gpu_check.TINY, "bidirectional", "cpu")).nbytes  # of the first step
    for entry in report["cases"]:
        base = entry["plan"]["memory"]["base weights"]
        assert entry["memory"]["base"] + tables == pytest.approx(base, rel=0.05), entry["case"]
        assert entry["memory"]["peak"] == pytest.approx(entry["plan"]["peak"], rel=0.3), entry["case"]


@pytest.mark.parametrize(
    ("architecture", "stages", "profile"),
    [
        pytest.param("bidirectional", ["on_policy"], [], marks=pytest.mark.slow),
        pytest.param("causal", ["forward", "on_policy"], ["--profile"], marks=pytest.mark.long),
    ],
)
def test_cases_through_the_command(checked, architecture, stages, profile, tmp_path, capsys):
    arguments = ["--device", "cpu", "--sizes", "tiny", "--steps", "1", "--output", str(tmp_path), "--json", *profile]
    assert run(lambda: command([*arguments, "--architectures", architecture, "--stages", *stages])) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [entry["case"] for entry in cases] == [f"tiny {architecture} {stage}" for stage in stages]
    assert all(entry["tflops"] > 0 for entry in cases)
    forward = checked[0]["cases"][0]["memory"]["roles"]
    assert cases[-1]["memory"]["roles"] > 1.4 * forward  # the adapter of the fake score, too
    for path in [tmp_path / f"profile-tiny-{architecture}-{stage}.txt" for stage in stages if profile]:
        assert "aten::" in path.read_text()


def test_the_rate_of_a_product_counts_two_operations_per_number(monkeypatch):
    timer = Mock()
    timer.return_value.blocked_autorange.return_value.median = 1e-3
    monkeypatch.setattr(gpu_check, "Timer", timer)
    assert gpu_check.matrix_rate(CPU) == {"size": 512, "tflops": pytest.approx(2 * 512**3 / 1e9)}


def test_a_storage_counts_once():
    with memory_reader(CPU) as read:
        a = torch.zeros(1000)
        views = [a[:10], a.view(10, 100)]
        assert read() == (4000, 4000)
        del a, views
        assert read() == (0, 4000)
        assert read() == (0, 0)


# ---- too small, missing, misspelt


def test_a_planned_peak_is_compared_with_the_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20e9, 24e9))
    assert too_large(19e9, torch.device("cuda")) is None
    assert "planned peak 73.0 GB; this GPU has 20.0 of 24.0 GB free" in too_large(73e9, torch.device("cuda"))


@pytest.mark.parametrize(
    ("function", "instead", "reason"),
    [
        ("too_large", lambda peak, device: "planned peak too large: not run", "planned peak too large: not run"),
        ("measure", Mock(side_effect=torch.OutOfMemoryError), "out of memory, although the plan fits"),
    ],
)
def test_what_does_not_fit_is_a_row_of_the_table(function, instead, reason, monkeypatch, tmp_path):
    plan = SimpleNamespace(peak=1e9, memory={}, flop=1e12)
    monkeypatch.setattr(gpu_check, "plan_run", lambda *given, **options: plan)
    monkeypatch.setattr(gpu_check, "measure", None)  # not called for a planned peak that is too large
    monkeypatch.setattr(gpu_check, function, instead)
    with refused(f"nothing could be measured: tiny bidirectional teacher: {reason}"):
        check(tiny("teacher"), tmp_path)
    assert f" | {reason} |" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.parametrize(("file", "message"), [("here", "cannot write"), ("here/gpu_check.json", "holds a report")])
def test_a_folder_that_cannot_hold_a_report_is_refused_first(file, message, monkeypatch, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.setattr(gpu_check, "matrix_rate", None)  # the first that is measured
    with refused(message):
        check(tiny("teacher"), tmp_path / "here")


BAD = {
    "": "torch finds no GPU here",
    "--device cpu --sizes 1.3b": "expected size tiny",
    "--device cpu --sizes tiny --steps 0": "at least one of each",
    "--device cpu --sizes tiny --frames 16": "frames=16; expected 4 n",
    "--device cpu --sizes tiny --height 100": "height=100; expected a multiple of 16",
    "--device cpu --sizes tiny --set compiled=true steps=1": "steps among other options; the check sets it itself",
    "--sizes 1.4b": "1.3b",
    "--stages on-policy": "on_policy",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(lambda: command(arguments.split())) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert BAD[arguments] in error
