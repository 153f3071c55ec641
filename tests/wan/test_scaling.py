"""Every command of docs/wan.md, first-week.md and scaling.md is run, as it stands but for the size, on a tiny Wan."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from minianyflow.__main__ import main
from minianyflow.planner.plan import plan_run
from minianyflow.support.install import ROOT
from minianyflow.times import generator
from minianyflow.wan.config import load_config
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.data.options import WAN_CLIP
from minianyflow.wan.data.write_video import write_clip
from minianyflow.wan.folders import moving_shapes
from minianyflow.wan.run import load_run

PAGES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("wan", "first-week", "scaling")}
BLOCKS = {
    name: [
        re.sub(" {2,}#.*", "", line)
        for body in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S)
        for line in body.replace("\\\n", " ").splitlines()
        if not line.startswith("tensorboard")
    ]
    for name, page in PAGES.items()
}
FIRST = next(k for k, line in enumerate(BLOCKS["wan"]) if " plan " in line) + 1  # a clone's first commands
BLOCKS |= {"tiny": BLOCKS["wan"][:FIRST], "wan": BLOCKS["wan"][FIRST:]}
COUNT, PROCESSES = 6, 2  # test_distill.py launches all eight
SMALL = "--base={wan} --frames=17 --height=64 --width=64 --length=32 --device=cpu"
TRAIN = "tiny base={wan} accumulate=2 steps=4 samples.every=4 samples.steps=[1]"
TINY = {"prepare": SMALL, "distill": TRAIN, "sample": "--device=cpu"}
STAGES = ["teacher", "forward", "on_policy"]


def test_each_page_leads_from_videos_to_samples_and_exports():
    for name, lines in BLOCKS.items():
        assert [
            line.split("--config ")[1].split()[2] for line in lines if "distill" in line
        ] == STAGES or name == "tiny"
        assert all(any(word in line for line in lines) for word in ("prepare", "distill", "sample", "export")), name
        assert name == "scaling" or any(line.endswith("--lora") for line in lines)
    several = [line for line in BLOCKS["scaling"] if re.search("distill.py|prepare_latents.py --videos", line)]
    assert all(line.startswith("accelerate launch --config_file") or "--dry-run" in line for line in several)
    one = BLOCKS["wan"] + BLOCKS["first-week"] + BLOCKS["tiny"]
    assert all(line.startswith("minianyflow ") for line in one)  # a launcher of one process passes no SIGTERM on


WEEK = {"frames": 33, "height": 256, "width": 448, "length": 512}


@pytest.mark.slow
def test_the_first_week_fits_in_the_hours_of_its_page():
    """Each option of the clip is on the page, and each row of its table is planned."""
    page = PAGES["first-week"]
    assert all(f"--{name} {WEEK[name]}" in page for name in ("frames", "height", "width"))
    total = {"rtx4090": 0.0, "h100": 0.0}
    for stage in STAGES:
        config = load_config(["wan-1.3b", "bidirectional", stage, "first-week"])
        plans = {gpu: plan_run(replace(config, data=""), WEEK, gpu=gpu, advise=False) for gpu in total}
        hours = {gpu: plan.hours(0.5) for gpu, plan in plans.items()}
        total = {gpu: total[gpu] + hours[gpu] for gpu in total}
        row = [plans["rtx4090"].peak / 1e9, *hours.values()]
        assert f"| {stage.replace('_', '-')} | {row[0]:.1f} | {row[1]:.2f} | {row[2]:.2f} |" in page
    five = [load_config(["wan-5b", "bidirectional", stage, "first-week"]) for stage in STAGES]
    five = [plan_run(replace(config, data=""), WEEK, gpu="rtx4090", advise=False) for config in five]
    teacher, forward, on_policy = (plan.peak / 1e9 for plan in five)
    hours = sum(plan.hours(0.5) for plan in five)
    expected = f"{teacher:.1f}, {forward:.1f} and {on_policy:.1f} GB and, on an RTX 4090, {hours:.1f} hours in all"
    assert expected in page.replace("\n", " ")
    assert f"| in all | | {total['rtx4090']:.1f} | {total['h100']:.1f} |" in page
    assert f"(examples) | | {0.5 * total['rtx4090']:.1f} | {3 * total['h100']:.1f} |" in page


@pytest.mark.long
@pytest.mark.parametrize(("name", "gpus"), [("wan", 1), ("scaling", 8)])
def test_the_commands_fit_the_gpus_they_are_for(name, gpus):
    for line in [line for line in BLOCKS[name] if "distill" in line]:
        words = shlex.split(line.split("--config ")[1])
        config = load_config([word for word in words if "=" not in word], [word for word in words if "=" in word])
        plan = plan_run(replace(config, data=""), WAN_CLIP, gpus=gpus, sharded="fsdp2" in line, steps=[0], advise=False)
        assert plan.fits, f"{line}: {plan.peak / 1e9:.0f} GB"


def at_tiny_size(line, wan, page):
    """The words of a command of a page, at tiny size."""
    kind = next((kind for kind in TINY if re.search(rf"\b{kind}", line)), None)
    more = "" if kind is None or page == "tiny" or "--verify" in line else TINY[kind].format(wan=wan)
    if kind == "distill" and more:
        week = "first-week" in line
        line = line.removesuffix(" first-week")
        more += " data=data/first-week runs=outputs/first-week" if week else " data=data/wan-1.3b runs=outputs/wan-1.3b"
    return [*shlex.split(line), *more.split()]


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """The working folder of the commands: videos with captions, one of them lost, and a tiny Wan."""
    (tmp_path / "wan").symlink_to(tiny)
    captions, video = moving_shapes(COUNT, generator(3))
    (tmp_path / "clips").mkdir()
    for number, caption in enumerate([*captions, "lost"]):
        (tmp_path / f"clips/{number}.txt").write_text(caption + "\n")
        if number < COUNT:
            write_clip(tmp_path / f"clips/{number}.mp4", video[number])
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["first-week"], re.S)
    exec(code, {})  # captions.jsonl
    return tmp_path


def check(line, folder, processes):
    """What a command of a page left."""
    output = shlex.split(line)[-1]
    if "--dry-run" in line:
        assert not (folder / "data").exists()
    elif "prepare" in line:
        assert len(LatentSet(output)) == (16 if "tiny" in line else COUNT)
    elif "distill" in line:
        overlays = [word for word in line.split("--config ")[1].split() if "=" not in word and word != "wan-1.3b"]
        (made,) = (folder / "outputs").glob(f"*/{'-'.join(overlays[:2])}/run.json")
        made = json.loads(made.read_text())
        assert (made["processes"], made["distribution"]) == (processes, "MULTI_CPU" if processes > 1 else "NO")
    elif "sample" in line:
        assert (folder / output / "sheet.png").is_file()
    elif "--lora" in line:
        assert (folder / shlex.split(line)[-2] / "pytorch_lora_weights.safetensors").is_file()


def run_alone(words):
    """Run Python in a process of its own; its exit status."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *words], env=environment, timeout=300).returncode


def check_export(folder, run):
    """`exported` is what stock diffusers loads: the network of the run."""
    code = "import sys, torch, diffusers; pipeline = diffusers.DiffusionPipeline.from_pretrained('exported'); "
    code += "assert 'minianyflow' not in sys.modules; torch.save(pipeline.transformer.state_dict(), 'loaded.pt')"
    assert run_alone(["-c", code]) == 0
    loaded, expected = torch.load(folder / "loaded.pt", weights_only=True), load_run(run)[0].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["tiny", "first-week", pytest.param("wan", marks=pytest.mark.long)])
def test_the_commands_for_one_gpu_lead_from_videos_to_a_sheet_and_a_lora(folder, page):
    for line in BLOCKS[page]:
        _, *words = at_tiny_size(line, folder / "wan", page)
        assert main(words) == 0, line
        check(line, folder, 1)
    if page == "wan":
        check_export(folder, "outputs/wan-1.3b/bidirectional-on_policy")


@pytest.mark.long
def test_the_commands_for_eight_gpus_lead_from_videos_to_a_model_that_stock_diffusers_loads(folder):
    launch = ["-m", "accelerate.commands.launch"]
    for line in BLOCKS["scaling"]:
        words = at_tiny_size(line, folder / "wan", "scaling")
        several = words[0] == "accelerate"
        words = [*launch, *words[2:4], "--num_processes", str(PROCESSES), *words[4:]] if several else words[1:]
        assert run_alone(words) == 0, line
        check(line, folder, PROCESSES if several else 1)
    check_export(folder, "outputs/wan-1.3b/causal-on_policy")
