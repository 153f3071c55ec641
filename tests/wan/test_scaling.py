"""docs/scaling.md: every command on it is run, as it stands but for the size, from mp4 files to an export."""

import json
import os
import re
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
from minianyflow.wan.folders import make_tiny_wan, moving_shapes
from minianyflow.wan.run import load_run

PAGE = (ROOT / "docs/scaling.md").read_text()
BLOCKS = {
    name: [line for line in body.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    for name, body in re.findall(r"^### ([^\n]+)\n\n```sh\n(.*?)^```$", PAGE, re.M | re.S)
}
COUNT, PROCESSES = 6, {"eight_gpus_ddp": 2, "eight_gpus_fsdp2": 2}  # test_distill.py launches all eight
TINY = {
    "prepare_latents.py": "--base={wan} --frames=17 --height=64 --width=64 --length=32 --shard-size=2 --device=cpu",
    "distill.py": "base={wan} data=data/wan-1.3b runs=outputs/wan-1.3b accumulate=2 steps=4 "
    "samples.every=4 samples.steps=[1]",
    "sample.py": "--device=cpu",
    "export.py": "",
}


def test_the_page_has_a_block_for_one_gpu_and_for_eight():
    assert list(BLOCKS) == ["On one GPU", "On eight GPUs"]
    assert PAGE.count("```sh") == len(BLOCKS)  # no command is anywhere else
    for lines in BLOCKS.values():
        scripts = [re.search(r"scripts/(\w+\.py)", line)[1] for line in lines]
        assert set(scripts) == set(TINY)
    launched = [
        line for line in BLOCKS["On eight GPUs"] if "distill.py" in line or "prepare_latents.py --videos" in line
    ]
    assert all(line.startswith("accelerate launch --config_file") or "--dry-run" in line for line in launched)
    assert all(line.startswith("python ") for line in BLOCKS["On one GPU"])  # a launcher of one passes no SIGTERM on


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpus"), list(zip(BLOCKS, (1, 8), strict=True)))
def test_the_commands_fit_the_gpus_they_are_for(name, gpus):
    for line in [line for line in BLOCKS[name] if "distill.py" in line]:
        words = shlex.split(line.split("--config ")[1])
        config = load_config([word for word in words if "=" not in word], [word for word in words if "=" in word])
        plan = plan_run(replace(config, data=""), WAN_CLIP, gpus=gpus, sharded="fsdp2" in line, steps=[0], advise=False)
        assert plan.fits, f"{line}: {plan.peak / 1e9:.0f} GB"


def at_tiny_size(line, wan):
    """What is run for a command of the page, and in how many processes."""
    words, processes = shlex.split(line, comments=True), 1
    name = next(Path(word).name for word in words if word.startswith("scripts/") and word.endswith(".py"))
    if words[0] == "accelerate":
        processes = PROCESSES[Path(words[3]).stem]
        several = ["--num_processes", str(processes)] if processes > 1 else []
        words = ["-m", "accelerate.commands.launch", *words[2:4], *several, *words[4:]]
    else:
        assert words.pop(0) == "python"
    more = [] if "--verify" in words else TINY[name].format(wan=wan).split()
    return [sys.executable, *words, *(["tiny"] if name == "distill.py" else []), *more], processes


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_the_commands_lead_from_videos_to_a_model_that_stock_diffusers_loads(tmp_path, name):
    make_tiny_wan(tmp_path / "wan")
    captions, video = moving_shapes(COUNT, generator(3))
    write_clips(tmp_path / "clips", {"clip": video}, captions)
    lines = [json.dumps({"file": f"clip-{k}.mp4", "caption": captions[k]}) for k in range(COUNT)]
    (tmp_path / "captions.jsonl").write_text("\n".join([*lines, '{"file": "lost.mp4", "caption": "lost"}']) + "\n")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    places = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for line in BLOCKS[name]:
        command, processes = at_tiny_size(line, tmp_path / "wan")
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | places, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-3000:]}"
        if "--dry-run" in line:
            assert not (tmp_path / "data").exists()
        elif "prepare_latents.py" in line:
            assert len(LatentSet(tmp_path / "data/wan-1.3b")) == COUNT
        elif "distill.py" in line:
            overlays = [word for word in line.split("--config ")[1].split() if "=" not in word]
            run = tmp_path / f"outputs/wan-1.3b/{'-'.join(overlays[1:])}"
            made, kind = json.loads((run / "run.json").read_text()), "MULTI_CPU" if processes > 1 else "NO"
            assert (made["processes"], made["distribution"]) == (processes, kind)
    assert list((tmp_path / "samples").glob("*.mp4"))
    assert_stock_loads(tmp_path, load_run(run)[0].state_dict())


def assert_stock_loads(folder, expected):
    """In a process that knows nothing of us: a pipeline with these weights."""
    look = "import sys, torch, diffusers; pipeline = diffusers.DiffusionPipeline.from_pretrained('exported'); "
    look += "assert 'minianyflow' not in sys.modules; print(type(pipeline).__name__); "
    look += "torch.save(pipeline.transformer.state_dict(), 'loaded.pt')"
    done = subprocess.run([sys.executable, "-c", look], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["AnyFlowFARPipeline"], done.stderr[-2000:]
    loaded = torch.load(folder / "loaded.pt", weights_only=True)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)
