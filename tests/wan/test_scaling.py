"""docs/scaling.md: every command on it is run, as it stands but for the size, from mp4 files to an export."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minianyflow.planner.plan import plan_run
from minianyflow.support.install import ROOT
from minianyflow.times import generator
from minianyflow.wan.config import load_config
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.data.options import WAN_CLIP
from minianyflow.wan.data.write_video import write_clips
from minianyflow.wan.folders import moving_shapes
from minianyflow.wan.run import load_run

PAGE = (ROOT / "docs/scaling.md").read_text()
BLOCKS = {
    name: [line for line in body.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    for name, body in re.findall(r"^### ([^\n]+)\n\n```sh\n(.*?)^```$", PAGE, re.M | re.S)
}
COUNT, PROCESSES = 6, 2  # test_distill.py launches all eight
TINY = {
    "prepare_latents.py": "--base={wan} --frames=17 --height=64 --width=64 --length=32 --device=cpu",
    "distill.py": "tiny base={wan} data=data/wan-1.3b runs=outputs/wan-1.3b accumulate=2 steps=4 "
    "samples.every=4 samples.steps=[1]",
    "sample.py": "--device=cpu",
    "export.py": "",
}


def test_the_page_has_a_block_for_one_gpu_and_for_eight():
    assert list(BLOCKS) == ["On one GPU", "On eight GPUs"]
    assert PAGE.count("```sh") == len(BLOCKS)  # no command is anywhere else
    for lines in BLOCKS.values():
        assert {re.search(r"scripts/(\w+\.py)", line)[1] for line in lines} == set(TINY)
    several = [line for line in BLOCKS["On eight GPUs"] if re.search("distill.py|prepare_latents.py --videos", line)]
    assert all(line.startswith("accelerate launch --config_file") or "--dry-run" in line for line in several)
    assert all(line.startswith("python ") for line in BLOCKS["On one GPU"])  # a launcher of one passes no SIGTERM on


@pytest.mark.long
@pytest.mark.parametrize(("name", "gpus"), list(zip(BLOCKS, (1, 8), strict=True)))
def test_the_commands_fit_the_gpus_they_are_for(name, gpus):
    for line in [line for line in BLOCKS[name] if "distill.py" in line]:
        words = shlex.split(line.split("--config ")[1])
        config = load_config([word for word in words if "=" not in word], [word for word in words if "=" in word])
        plan = plan_run(replace(config, data=""), WAN_CLIP, gpus=gpus, sharded="fsdp2" in line, steps=[0], advise=False)
        assert plan.fits, f"{line}: {plan.peak / 1e9:.0f} GB"


def at_tiny_size(line, wan):
    """The arguments of Python for a command of the page, and the number of processes it runs in."""
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word.startswith("scripts/") and word.endswith(".py"))
    more = "" if "--verify" in words else TINY[Path(script).name].format(wan=wan)
    if words[0] == "python":
        return [*words[1:], *more.split()], 1
    launcher = ["-m", "accelerate.commands.launch", *words[2:4], "--num_processes", str(PROCESSES)]
    return [*launcher, *words[4:], *more.split()], PROCESSES


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """The working folder of the commands: videos with captions, one of them lost, and a tiny Wan."""
    (tmp_path / "wan").symlink_to(tiny)
    captions, video = moving_shapes(COUNT, generator(3))
    write_clips(tmp_path / "clips", {"clip": video}, captions)
    lines = [json.dumps({"file": f"clip-{k}.mp4", "caption": captions[k]}) for k in range(COUNT)]
    (tmp_path / "captions.jsonl").write_text("\n".join([*lines, '{"file": "lost.mp4", "caption": "lost"}']) + "\n")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(line, folder, processes):
    """What a command of the page left."""
    if "--dry-run" in line:
        assert not (folder / "data").exists()
    elif "prepare_latents.py" in line:
        assert len(LatentSet(folder / "data/wan-1.3b")) == COUNT
    elif "distill.py" in line:
        overlays = [word for word in line.split("--config ")[1].split() if "=" not in word]
        made = json.loads((folder / f"outputs/wan-1.3b/{'-'.join(overlays[1:])}/run.json").read_text())
        assert (made["processes"], made["distribution"]) == (processes, "MULTI_CPU" if processes > 1 else "NO")


def run_here(words):
    """Run a script in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(words[0], run_name="__main__")
    return end.value.code


def run_alone(words):
    """Run Python in a process of its own; its exit status."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *words], env=environment, timeout=300).returncode


@pytest.mark.parametrize(
    ("name", "execute"),
    [
        pytest.param("On one GPU", run_here, marks=pytest.mark.slow),
        pytest.param("On eight GPUs", run_alone, marks=pytest.mark.long),
    ],
)
def test_the_commands_lead_from_videos_to_a_model_that_stock_diffusers_loads(folder, name, execute):
    for line in BLOCKS[name]:
        words, processes = at_tiny_size(line, folder / "wan")
        assert execute(words) == 0, line
        check(line, folder, processes)
    assert list((folder / "samples").glob("*.mp4"))
    code = "import sys, torch, diffusers; pipeline = diffusers.DiffusionPipeline.from_pretrained('exported'); "
    code += "assert 'minianyflow' not in sys.modules; assert type(pipeline).__name__ == 'AnyFlowFARPipeline'; "
    code += "torch.save(pipeline.transformer.state_dict(), 'loaded.pt')"
    assert run_alone(["-c", code]) == 0
    loaded = torch.load(folder / "loaded.pt", weights_only=True)
    expected = load_run(folder / "outputs/wan-1.3b/causal-on_policy")[0].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)
