"""Buckets: a mixed folder of clips is trained on whole, each clip in a batch of its size."""

import json

import pytest
import torch

from minianyflow.support.cli import run
from minianyflow.times import generator
from minianyflow.wan.commands import distill
from minianyflow.wan.data.buckets import Buckets, check_processes, open_latents
from minianyflow.wan.data.commands import prepare_latents
from minianyflow.wan.data.latents import LatentSet, write_latents
from minianyflow.wan.data.write_video import write_clip
from minianyflow.wan.folders import moving_shapes
from tests.refused import refused

SHAPES = {"long": ((5, 2, 4, 4), 12), "wide": ((3, 2, 4, 8), 6), "short": ((3, 2, 4, 4), 3)}


@pytest.fixture
def folder(tmp_path):
    for name, (shape, count) in SHAPES.items():
        row = torch.arange(float(count)).view(-1, 1, 1, 1, 1).expand(-1, *shape).clone()
        prompts = row[:, 0, 0, :1, :1].expand(-1, 4, 3) + 1
        write_latents(tmp_path / name, row, prompts, torch.ones(1, 4, 3), [f"{name} {k}" for k in range(count)])
    return tmp_path


def test_every_clip_comes_as_often_as_any_other_and_a_batch_is_of_one_size(folder):
    data, seen, rows = open_latents(folder), torch.zeros(21), 3
    assert (len(data), data.shape) == (21, SHAPES["long"][0])
    for step in range(70):  # ten epochs of 21 clips
        batch = data.draw(step, rows)
        other = data.draw(step, rows)
        assert torch.equal(batch["x"], other["x"])
        assert torch.equal(batch["row"], other["row"])
        names = [data.captions([row])[0] for row in batch["row"].tolist()]
        (name,) = {text.split()[0] for text in names}
        assert batch["x"].shape[1:] == batch["eps"].shape[1:] == SHAPES[name][0]
        assert [int(x) for x in batch["x"][:, 0, 0, 0, 0]] == [int(text.split()[1]) for text in names]
        seen[batch["row"]] += 1
        assert step or name == "long"
    assert int(seen.min()) >= 8
    assert int(seen.max()) <= 12
    files = data.files(range(21))
    assert len(set(files)) == 21
    assert all((folder / file).is_file() for file in files)


def test_processes_share_each_batch_of_a_bucket(folder):
    """Of the same bucket at the same step, all of its clips in the order of one process, each read once."""
    data = open_latents(folder)
    for step in range(21):
        whole = data.draw(step, 4)
        parts = [data.draw(step, 4, part=(k, 2)) for k in range(2)]
        assert len({part["x"].shape for part in parts}) == 1
        for name in ("x", "eps", "t", "row"):
            both = torch.cat([part[name] for part in parts])[torch.cat([part["place"] for part in parts]).argsort()]
            assert torch.equal(both, whole[name][whole["place"].argsort()]), name


def test_buckets_that_do_not_fit_are_refused(folder):
    check_processes(open_latents(folder), 3)
    with refused("short has 3 clips for 4 processes; expected one per process"):
        check_processes(open_latents(folder), 4)
    with refused("long has 12 clips for 13 processes"):
        check_processes(LatentSet(folder / "long"), 13)
    write_latents(folder / "other", torch.ones(1, 1, 2, 4, 4), torch.ones(1, 4, 3), torch.zeros(1, 4, 3), ["x"])
    with refused("have other null prompts"):
        Buckets(folder)


MIXED = [
    (64, 64, 17, 16),
    (64, 96, 17, 24),
    (96, 64, 34, 30),
    (48, 64, 40, 30),
    (80, 80, 25, 25),
]  # height, width, frames, rate


@pytest.mark.slow
def test_a_folder_of_five_sizes_and_four_rates_is_trained_on_whole(tiny, tmp_path, capsys):
    captions, video = moving_shapes(10, generator(1), frames=40, size=96)
    (tmp_path / "clips").mkdir()
    lines = []
    for k, caption in enumerate(captions):
        height, width, frames, fps = MIXED[k % 5]
        frames = 5 if k == 9 else frames  # one that is too short for all
        write_clip(tmp_path / f"clips/{k}.mp4", video[k, :frames, :, :height, :width], fps)
        lines.append({"file": f"{k}.mp4", "caption": caption})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"--base={tiny}", f"--videos={tmp_path / 'clips'}", f"--captions={tmp_path / 'captions.jsonl'}"]
    words += [f"--output={tmp_path / 'data'}", "--length=32", "--device=cpu", "--bucket"]
    sizes = ["17x64x64", "9x64x64", "9x64x96", "17x96x64"]
    assert run(lambda: prepare_latents([*words, *sizes])) == 0
    data = open_latents(tmp_path / "data")
    assert len(data) == 9
    found = {one.folder.name: len(one) for one in data.sets}
    assert found == {"17x96x64": 2, "17x64x64": 2, "9x64x96": 4, "9x64x64": 1}
    assert run(lambda: prepare_latents([f"--output={tmp_path / 'data'}", "--verify"])) == 0
    assert "data: 9 clips, whole" in capsys.readouterr().out
    for stage in ("teacher", "on_policy"):
        where = [f"base={tiny}", f"data={data.folder}", f"runs={tmp_path}", "samples.every=0", "steps=5"]
        where += [] if stage == "teacher" else [f"student={tmp_path}/causal-teacher", "teacher=null"]
        assert run(lambda stage=stage, where=where: distill(["--config", "causal", stage, "tiny", *where])) == 0
    refusals = {"17x64": "expected FRAMESxHEIGHTxWIDTH", "17x64x63": "width=63; expected a multiple of 16"}
    for size, message in refusals.items():
        assert run(lambda size=size: prepare_latents([*words, size])) == 2
        assert message in capsys.readouterr().err
    assert run(lambda: prepare_latents(words[:-1])) == 2
    assert "was made with --bucket" in capsys.readouterr().err
