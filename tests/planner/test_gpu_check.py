"""scripts/gpu_check.py at tiny size on a CPU: every line but CUDA's own; and what it refuses, where a GPU is small."""

import importlib.util
import json

import pytest
import torch

from minianyflow.networks.lora_roles import storages
from minianyflow.planner import gpu_check
from minianyflow.planner.gpu_check import (
    Meter,
    Request,
    attention_rates,
    check,
    markdown,
    matrix_rate,
    settings,
    too_large,
)
from minianyflow.planner.plan import plan_run
from minianyflow.support.cli import run
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from minianyflow.wan import trainer as training

CPU = torch.device("cpu")


def script():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(*stages, architectures=("bidirectional",), **changes):
    return Request(("tiny",), architectures, stages, device="cpu", **{"steps": 2} | changes)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A report, where it was written, what was told, and the steps that training took."""
    folder, told, trained, real = tmp_path_factory.mktemp("check"), [], [], training.train_run

    def train(roles, draw, steps, *arguments, **options):
        trained.append((sorted(roles), steps))
        return real(roles, draw, steps, *arguments, **options)

    gpu_check.train_run = train
    try:
        request = tiny("forward", "on_policy", profile=True, options=("keep_attention=true",))
        report = check(request, folder, told.append)
    finally:
        gpu_check.train_run = real
    return report, folder, told, trained


def test_it_trains_with_the_very_loop(checked):
    report, _, told, trained = checked
    assert trained == [(["student"], 4), (["fake", "student"], 4)]  # one to warm up, two timed, one profiled
    assert [entry["case"] for entry in report["cases"]] == [
        "tiny bidirectional forward",
        "tiny bidirectional on_policy",
    ]
    assert all("planned peak" in line for line in told)
    assert report["options"] == ["keep_attention=true"]


def test_rates_are_of_the_planned_work_and_the_timed_steps(checked):
    for entry in checked[0]["cases"]:
        mean = sum(entry["seconds"]) / len(entry["seconds"])
        assert len(entry["seconds"]) == 2
        assert entry["seconds_a_step"] == mean > 0
        assert entry["tflops"] == pytest.approx(entry["plan"]["flop"] / mean / 1e12)
        assert entry["share"] == pytest.approx(entry["tflops"] / checked[0]["matrix"]["tflops"])


def test_the_plan_beside_is_that_of_the_steps_that_were_timed(checked, tmp_path):
    """And it counts the evaluations that training made."""
    config, clip = settings(tiny("forward"), ("tiny", "bidirectional", "forward"), tmp_path)
    entry = checked[0]["cases"][0]
    assert entry["plan"]["flop"] == plan_run(config, clip, steps=[1, 2], advise=False).flop
    planned = plan_run(config, clip, steps=[0, 1, 2, 3], advise=False).evaluations["student"]
    rows = entry["rows"]["student"]
    assert (rows["forwards"] / 8, rows["with_grad"] / 8) == pytest.approx(tuple(planned))


def test_memory_by_part(checked):
    """The base is what its storages are; adapters, an average and AdamW's numbers come on top; no peak on a CPU."""
    report, *_ = checked
    forward, on_policy = (entry["memory"] for entry in report["cases"])
    plan = report["cases"][0]["plan"]["memory"]
    base = storages(gpu_check.build_transformer(gpu_check.TINY, "bidirectional", "cpu"))[0]
    assert forward["base"] == pytest.approx(base, rel=0.05)
    assert forward["roles"] == pytest.approx(plan["adapters"] + plan["averages"], rel=0.05)
    assert forward["optimiser"] >= plan["optimiser"]
    assert on_policy["roles"] > 1.4 * forward["roles"]  # the fake score's adapter, too
    assert forward["peak"] is None


def test_what_is_written(checked):
    report, folder, *_ = checked
    assert json.loads((folder / "gpu_check.json").read_text()) == json.loads(json.dumps(report))
    page = (folder / "gpu_check.md").read_text()
    assert page == markdown(report)
    assert page.count("| tiny bidirectional") == 2
    assert "not measured" in page
    assert report["date"] in page
    assert "CPU" in page
    for stage in ("forward", "on_policy"):
        assert "aten::" in (folder / f"profile-tiny-bidirectional-{stage}.txt").read_text()


@pytest.mark.slow
def test_every_case_through_the_script(tmp_path, capsys):
    arguments = ["--device", "cpu", "--sizes", "tiny", "--steps", "1", "--output", str(tmp_path), "--json"]
    arguments += ["--architectures", "causal", "--stages", "forward", "on_policy"]
    assert run(lambda: script().main(arguments)) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["case"] for entry in report["cases"]] == ["tiny causal forward", "tiny causal on_policy"]
    assert all(entry["tflops"] > 0 for entry in report["cases"])


# ---- the parts


def test_a_meter_counts_each_storage_once():
    meter = Meter(CPU)
    a = torch.zeros(1000)
    views = [a[:10], a.view(10, 100)]
    assert meter.live() == 4000
    del a, views
    assert meter.live() == 0
    assert meter.peak() is None


def test_matrix_rate_is_the_median(monkeypatch):
    monkeypatch.setattr(gpu_check, "_median", lambda action, device, repeats: 2.0)
    assert matrix_rate(CPU, size=100)["tflops"] == pytest.approx(2 * 100**3 / 2 / 1e12)


def test_attention_rates_say_what_is_not_to_be_had():
    shape = {"num_attention_heads": 1, "attention_head_dim": 16}
    rates = attention_rates(shape, {"frames": 5, "height": 64, "width": 64}, CPU, repeats=1)
    assert rates["cudnn"] is None
    assert rates["flash"] > 0


# ---- too small, not there, misspelt


class SmallGpu:
    """What torch.cuda says of a GPU with 24 GB, 20 of them free."""

    @staticmethod
    def mem_get_info(device):
        return 20e9, 24e9


def test_a_gpu_with_too_little_memory_is_told_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "mem_get_info", SmallGpu.mem_get_info)
    assert too_large(19e9, torch.device("cuda")) is None
    assert "planned peak 73.0 GB; this GPU has 20.0 of 24.0 GB free" in too_large(73e9, torch.device("cuda"))
    monkeypatch.setattr(gpu_check, "too_large", lambda peak, device: "planned peak too large: not run")
    monkeypatch.setattr(gpu_check, "measure", None)  # not called
    with pytest.raises(
        InputError, match="nothing could be measured: tiny bidirectional teacher: planned peak too large"
    ):
        check(tiny("teacher"), tmp_path)
    assert "planned peak too large: not run" in (tmp_path / "gpu_check.md").read_text()


def test_running_out_of_memory_is_a_row_of_the_table(monkeypatch, tmp_path):
    def measure(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_check, "measure", measure)
    with pytest.raises(InputError, match="out of memory where the plan had room"):
        check(tiny("teacher"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ("1.4b",)}, "1.3b"),
        ({"stages": ("on-policy",)}, "on_policy"),
        ({"architectures": ("casual",)}, "causal"),
        ({"steps": 0}, "at least one of each"),
        ({"clip": {"frames": 16}}, "frames 16; expected 4 n"),
        ({"clip": {"frames": 0}}, "frames 0; expected 4 n"),
        ({"clip": {"height": 100}}, "height 100; expected 16 n pixels"),
        ({"sizes": ("1.3b",)}, "expected --sizes tiny"),
        ({"options": ("compiled=true", "steps=1")}, "steps among other options; .* leave it out"),
    ],
)
def test_what_is_refused(changes, message):
    given = {"sizes": ("tiny",), "device": "cpu"} | changes
    with pytest.raises(InputError, match=message):
        Request(**given)


@pytest.mark.parametrize(("made", "message"), [("a file", "cannot write"), ("a report", "holds a report")])
def test_a_folder_that_is_no_place_for_a_report_is_told_first(made, message, monkeypatch, tmp_path):
    where = tmp_path / "here"
    if made == "a file":
        where.touch()
    else:
        where.mkdir()
        (where / "gpu_check.json").write_text("{}")
    monkeypatch.setattr(gpu_check, "matrix_rate", None)  # the first that is measured
    with pytest.raises(InputError, match=message):
        check(tiny("teacher"), where)


def test_no_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(lambda: script().main([])) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "torch finds no GPU here" in told
