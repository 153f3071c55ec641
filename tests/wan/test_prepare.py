"""Videos to latents: the numbers that Wan's own parts make, by any number of processes, however often killed."""

import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from minianyflow.times import generator
from minianyflow.wan.data import commands, prepare
from minianyflow.wan.data.captions import Clip, read_captions
from minianyflow.wan.data.commands import prepare_latents
from minianyflow.wan.data.latents import LatentSet, clip_name
from minianyflow.wan.data.options import WAN_NULL, Options
from minianyflow.wan.data.prepare import BATCH, Preparation
from minianyflow.wan.data.read_video import read_frames, to_float
from minianyflow.wan.data.write_video import write_clips
from minianyflow.wan.folders import encode_prompts, encode_video, load_parts, make_tiny_wan, moving_shapes

COUNT, LENGTH = 9, 32
TINY = {"frames": 9, "height": 32, "width": 48, "length": LENGTH}
FLAGS = [f"--{name}={value}" for name, value in TINY.items()] + ["--device=cpu"]
BAD = {"junk.mp4": "cannot be read (", "short.mp4": "has 7 frames at 16 per second; expected at least 9"}
BAD |= {"gone.mp4": "no such file", "silent.mp4": "empty caption"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
SCRIPT = str(ROOT / "scripts/prepare_latents.py")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder of a tiny Wan, 9 good videos and 4 bad ones, captions.jsonl, and `whole`, which one run makes."""
    folder = tmp_path_factory.mktemp("prepare")
    make_tiny_wan(folder / "wan", clips=2)
    captions, video = moving_shapes(COUNT, generator(5))
    write_clips(folder / "videos", {"clip": video[:, :9]}, captions)
    (folder / "videos/junk.mp4").write_text("no video")
    write_clips(folder / "short", {"x": video[:1, :7]}, captions[:1])
    shutil.copy(folder / "short/x-0.mp4", folder / "videos/short.mp4")
    rows = [{"file": f"clip-{k}.mp4", "caption": captions[k]} for k in range(COUNT)]
    bad = [{"file": name, "caption": " " if name == "silent.mp4" else f"of {name}"} for name in BAD]
    rows[1:1], rows[9:9] = bad[:1], bad[1:]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert run(folder, folder / "whole") == 0
    return folder


def flags(here, output, *changes):
    given = [f"--videos={here}/videos", f"--captions={here}/captions.jsonl", f"--base={here}/wan", *FLAGS]
    return [*given, f"--output={output}", *changes]


def run(here, output, *changes):
    return prepare_latents(flags(here, output, *changes))


def refused(message, function, *arguments, **options):
    with pytest.raises(InputError, match=message) as problem:
        function(*arguments, **options)
    assert "\n" not in str(problem.value)


def contents(folder):
    """{name: bytes} of all files, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("0*/*")}


def work(here, output, **changes):
    clips = read_captions(here / "captions.jsonl")
    return Preparation(here / "wan", clips, here / "videos", output, Options(**TINY), **changes)


def finish(job, encode=True):
    """What the command does, on one process. Returns the number of videos that it read."""
    read = []
    job._read = lambda clip: read.append(clip) or Preparation._read(job, clip)
    try:
        job.begin()
        pending = job.pending()
        if pending is not None:
            job.finish(job.encode(pending))
    finally:
        if job.lock:
            job.lock.close()  # as the end of a process does
    return len(read)


# What is written


def test_clips_hold_what_wans_parts_make(here):
    data, clips = LatentSet(here / "whole"), read_captions(here / "captions.jsonl")
    good = [clip for clip in clips if clip.file not in BAD]
    assert (len(data), data.shape) == (COUNT, (3, 16, 4, 6))
    assert data.captions(range(COUNT)) == [clip.caption for clip in good]
    (vae,) = load_parts(here / "wan", "vae")
    parts = load_parts(here / "wan", "tokenizer", "text_encoder", dtype=torch.bfloat16)
    latents, prompts = data.rows(range(COUNT))
    for number, clip in enumerate(good):
        video = to_float(read_frames(here / "videos" / clip.file, 9, 32, 48))
        torch.testing.assert_close(latents[number], encode_video(vae, video)[0].bfloat16().float(), atol=0.0, rtol=0.0)
    expected = encode_prompts(*parts, [clip.caption for clip in clips[:BATCH]], LENGTH).float()
    assert torch.equal(prompts[0], expected[0])
    assert torch.equal(prompts[1:7], expected[2:])  # clip 1 is a bad one
    assert torch.equal(data.null, encode_prompts(*parts, [WAN_NULL], LENGTH).float())
    assert data.null_text == WAN_NULL
    assert len(WAN_NULL.split("，")) == 28  # noqa: RUF001
    stored = load_file(data.path(0))
    assert stored["latents"].dtype == stored["prompt"].dtype == torch.bfloat16
    assert 1 < len(stored["prompt"]) < LENGTH


def test_single_precision_and_another_null_prompt(here, tmp_path):
    assert run(here, tmp_path / "out", "--dtype=fp32", "--null=a blur", "--limit=1") == 0
    data = LatentSet(tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(data.path(0)).values()} == {torch.float32}
    (vae,) = load_parts(here / "wan", "vae")
    assert torch.equal(
        data.rows([0])[0], encode_video(vae, to_float(read_frames(here / "videos/clip-0.mp4", 9, 32, 48)))
    )
    assert data.null_text == "a blur"
    parts = load_parts(here / "wan", "tokenizer", "text_encoder")
    assert torch.equal(data.null, encode_prompts(*parts, ["a blur"], LENGTH))


def test_skipped_clips_are_listed_with_their_reasons(here, tmp_path, capsys):
    assert run(here, tmp_path / "out") == 0
    assert "skipped: 4 of 13 clips" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == list(BAD)
    assert all(line["reason"].startswith(BAD[line["file"]]) and "\n" not in line["reason"] for line in lines)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["skipped"] == [1, 9, 10, 11]
    assert contents(tmp_path / "out") == contents(here / "whole")


def test_the_disk_is_computed_and_a_dry_run_leaves_nothing(here, tmp_path, capsys, monkeypatch):
    assert run(here, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert "13 clips to encode, 0 are there; 9 frames of 48 x 32; 1 process" in out
    assert "s per clip on one process" in out
    job = work(here, tmp_path / "out")
    job.clips = [clip for clip in job.clips if clip.file not in BAD]
    size, _ = job.check_room([*range(COUNT)])
    written = sum(path.stat().st_size for path in (here / "whole").glob("0*/*"))
    assert abs(size / written - 1) < 0.1
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda place: SimpleNamespace(free=20000))
    refused(r"GB are needed and 2e-05 GB free in .*make room, name another", run, here, tmp_path / "out")


def test_text_encoder_and_codec_are_loaded_in_turn_and_nothing_is_encoded_twice(here, tmp_path, monkeypatch):
    job, texts = work(here, tmp_path / "out"), []

    def encode(*parts_and_texts):
        texts.append(parts_and_texts[2])
        return encode_prompts(*parts_and_texts)

    def encode_one(vae, video):
        assert job.text_parts is None  # UMT5 is larger than everything else
        return encode_video(vae, video)

    monkeypatch.setattr(prepare, "encode_prompts", encode)
    monkeypatch.setattr(prepare, "encode_video", encode_one)
    assert finish(job) == 13
    captions = [clip.caption for clip in job.clips]
    assert texts == [[WAN_NULL], captions[:8], captions[8:]]
    assert finish(work(here, tmp_path / "out")) == 0  # it is finished


def test_a_finished_folder_is_left_alone(here, capsys):
    before = times(here / "whole")
    assert run(here, here / "whole") == 0
    assert "is finished already" in capsys.readouterr().out
    assert times(here / "whole") == before


# Any number of processes, and any interruption


def test_the_number_of_processes_changes_nothing(here, tmp_path):
    """One after the other, each as one of four, the last without work; prompts of one wait meanwhile."""
    jobs = [work(here, tmp_path / "out", part=(index, 4)) for index in range(4)]
    jobs[0].begin()
    refused("another run is at work in", work(here, tmp_path / "out").begin)
    pending = jobs[0].pending()
    skipped = [line for job in reversed(jobs) for line in job.encode(pending)]
    refused(r"silent.mp4 was not encoded \(1 clips in all\)", jobs[0].finish, [s for s in skipped if s["number"] != 11])
    jobs[0].finish(skipped)
    assert contents(tmp_path / "out") == contents(here / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(here, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", SCRIPT]
    command = [*launch, *flags(here, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert "13 clips to encode, 0 are there; 9 frames of 48 x 32; 2 processes (MULTI_CPU)" in done.stdout
    assert "skipped: 4 of 13 clips" in done.stdout
    assert contents(tmp_path / "out") == contents(here / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_goes_on(here, tmp_path, how):
    """Killed at random moments until it is done: what is encoded stays, and the result is that of one run."""
    output, draw, kills = tmp_path / "out", random.Random(how), 0
    while kills < 2:
        before, started = times(output), output.exists()
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags(here, output)], stderr=subprocess.PIPE, env=ENVIRONMENT
        )
        target = len(before) + draw.randrange(1, 4)
        while process.poll() is None and len(times(output)) < target:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(how)
        _, complaint = process.communicate()
        assert process.returncode == (130 if how == signal.SIGTERM else -how), complaint
        assert (b"interrupted" in complaint) == (how == signal.SIGTERM)
        assert before.items() <= times(output).items() or not started
        refused("is unfinished; expected all its clips: run prepare-latents again", LatentSet, output)
        kills += 1
    assert run(here, output) == 0
    assert contents(output) == contents(here / "whole")


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_stopped_at_any_write_it_goes_on(here, tmp_path, monkeypatch, after):
    """The manifest, the null prompt, prompts of two batches, clips: a file was written and did not take its place."""
    replace, count = os.replace, []

    def stop(source, target):
        count.append(target)
        if len(count) > after:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        finish(work(here, tmp_path / "out"))
    monkeypatch.undo()
    assert finish(work(here, tmp_path / "out")) == min(13, 13 + 4 - after)  # and no clip is encoded twice
    assert contents(tmp_path / "out") == contents(here / "whole")


def test_a_full_disk_keeps_what_was_written(here, tmp_path):
    """The system refuses files larger than so much: that of a long prompt."""
    output, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [
        (here / "whole" / clip_name(number)).stat().st_size for number in range(13) if number not in (1, 9, 10, 11)
    ]
    waiting = max(len(data) for data in contents(here / "whole").values())
    assert waiting > max(sizes) - 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, before[1]))
        refused(r"cannot write .*\(File too large\); make room and run the same", finish, work(here, output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = contents(output)
    assert not [name for name in kept if ".unfinished-" in name]
    assert finish(work(here, output)) > 0
    assert contents(output) == contents(here / "whole")


def test_videos_that_go_away_are_not_skipped(here, tmp_path, monkeypatch):
    """The folder of the videos disappears in the middle: one line, and it goes on once the folder is back."""
    output, videos, away, read = tmp_path / "out", here / "videos", here / "away", prepare.read_frames

    def gone(path, *options):
        if path.name == "clip-7.mp4" and videos.exists():
            videos.rename(away)
        return read(path, *options)

    monkeypatch.setattr(prepare, "read_frames", gone)
    try:
        refused(r"the folder of videos .* is gone; put it back and run the same", finish, work(here, output))
    finally:
        away.rename(videos)
    monkeypatch.undo()
    assert not (output / "skipped.jsonl").exists()
    assert 0 < finish(work(here, output)) < 13
    assert contents(output) == contents(here / "whole")


# Too much skipped, and tried again


def test_more_skipped_than_is_allowed_stops_and_is_no_finished_set(here, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "FEW", 3)
    expected = r"4 of 12 clips had to be skipped, the last was silent\.mp4 \(empty caption\); .* 3 \(skip=0\.1\): "
    refused(expected + ".* run the same command again, or allow more", finish, work(here, tmp_path / "out"))
    before = times(tmp_path / "out")
    assert len(before) == 8
    refused("4 of [0-9]+ clips had to be skipped", finish, work(here, tmp_path / "out"))  # nor piece by piece
    refused("is unfinished", LatentSet, tmp_path / "out")
    finish(work(here, tmp_path / "out", skip=0.4))
    assert contents(tmp_path / "out") == contents(here / "whole")
    assert before.items() <= times(tmp_path / "out").items()


def test_the_last_clips_count_and_a_few_may_always_be_skipped(here, tmp_path, monkeypatch):
    """Videos that go away after a million good ones are noticed before another hundred thousand."""
    finish(work(here, tmp_path / "few", skip=0.001))
    assert contents(tmp_path / "few") == contents(here / "whole")
    refused(r"1 of 2 clips .* junk\.mp4 .* at most 0 \(skip=0\)", finish, work(here, tmp_path / "none", skip=0))
    monkeypatch.setattr(prepare, "FEW", 1)
    monkeypatch.setattr(prepare, "RECENT", 4)
    refused("3 of 4 clips", finish, work(here, tmp_path / "out", skip=0.6))


@pytest.fixture(scope="module")
def mended(here, tmp_path_factory):
    """As `here`, with all videos good; one caption is still empty. `whole` is what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("mended")
    for name in ("wan", "captions.jsonl"):
        (folder / name).symlink_to(here / name)
    shutil.copytree(here / "videos", folder / "videos")
    for number, name in enumerate(BAD):
        shutil.copy(here / f"videos/clip-{number}.mp4", folder / "videos" / name)
    finish(work(folder, folder / "whole"))
    return folder


def test_only_skipped_and_lost_clips_are_tried_again(here, mended, tmp_path):
    """In a finished folder, which stays as it is meanwhile: a run that reads it is not disturbed."""
    output = tmp_path / "out"
    shutil.copytree(here / "whole", output)
    (output / clip_name(12)).unlink()
    before, manifest = times(output), (output / "manifest.json").read_bytes()
    assert finish(work(mended, output)) == 0  # only with retry
    job = work(mended, output, retry=True)
    job.begin()
    assert job.pending() == [1, 9, 10, 11, 12]
    skipped = job.encode(job.pending())
    assert (output / "manifest.json").read_bytes() == manifest
    assert len(LatentSet(output)) == COUNT
    job.finish(skipped)
    job.lock.close()
    assert before.items() <= times(output).items()
    assert without_base(output) == without_base(mended / "whole")
    assert len(LatentSet(output)) == COUNT + 3
    assert finish(work(mended, output, retry=True)) == 1  # the empty caption
    assert without_base(output) == without_base(mended / "whole")


def without_base(folder):
    """The contents of a folder, and what its manifest says but for where the model was."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return contents(folder) | {"manifest.json": {key: value for key, value in manifest.items() if key != "base"}}


def test_videos_that_leave_an_empty_folder_behind(mended, tmp_path, monkeypatch):
    """As a network disk does: the run stops, and the next one encodes all that was skipped."""
    monkeypatch.setattr(prepare, "FEW", 4)
    output, videos, away, read = tmp_path / "out", mended / "videos", mended / "away", prepare.read_frames

    def gone(path, *options):
        frames = read(path, *options)
        if path.name == "clip-3.mp4":
            videos.rename(away)
            videos.mkdir()
        return frames

    monkeypatch.setattr(prepare, "read_frames", gone)
    try:
        refused(r"5 of [0-9]+ clips .*no such file", finish, work(mended, output))
    finally:
        videos.rmdir()
        away.rename(videos)
    monkeypatch.undo()
    gc.collect()
    finish(work(mended, output))
    assert without_base(output) == without_base(mended / "whole")


# Verifying, and bad input


def test_verify_reads_everything(here, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(here / "whole", output)
    assert prepare_latents(["--verify", f"--output={output}", f"--base={here}/wan"]) == 0
    assert f"{output}: {COUNT} clips, whole" in capsys.readouterr().out
    path = output / clip_name(8)
    path.write_bytes(path.read_bytes()[:-7])
    shutil.copy(path.with_name("00000003.safetensors"), path.with_name("00000099.safetensors"))
    make_tiny_wan(tmp_path / "other", seed=1, clips=1)
    assert prepare_latents(["--verify", f"--output={output}", f"--base={tmp_path}/other"]) == 1
    broken, extra, *models = capsys.readouterr().out.splitlines()
    assert broken.startswith(f"{path} cannot be read")
    assert extra == f"{output}/{clip_name(99)} is not in manifest.json"
    assert f"{output} was made with another vae than that of {tmp_path}/other" in models


def test_the_model_is_its_configuration_and_weights(here, tmp_path):
    """Not the files that they are in, nor the version that wrote them."""
    shutil.copytree(here / "wan", tmp_path / "wan")
    expected = prepare.model_identity(here / "wan")
    vae = load_parts(tmp_path / "wan", "vae")[0]
    shutil.rmtree(tmp_path / "wan/vae")
    vae.register_to_config(_diffusers_version="0")
    vae.save_pretrained(tmp_path / "wan/vae", max_shard_size="200KB")
    assert len(list((tmp_path / "wan/vae").glob("*.safetensors"))) > 1
    assert prepare.model_identity(tmp_path / "wan") == expected
    with torch.no_grad():
        next(vae.parameters()).flatten()[0] += 1
    vae.save_pretrained(tmp_path / "wan/vae", max_shard_size="200KB")
    changed = prepare.model_identity(tmp_path / "wan")
    assert {name for name in expected if changed[name] != expected[name]} == {"vae"}


GOOD = '{"file": "a.mp4", "caption": "a"}\n'
CAPTIONS = {
    "no file": (None, r"captions .* cannot be read \(No such file or directory\); expected jsonl or csv"),
    "other keys": ('{"path": "a.mp4", "text": "a"}\n', r"line 1 of .* has path, text; expected texts file and caption"),
    "no json": (GOOD + "a.mp4,a\n", r"line 2 of .* is not a JSON object; expected .*for a csv name the file \.csv"),
    "twice": (GOOD + GOOD, r"a\.mp4 is in lines 1 and 2 of .*; expected each file once"),
    "empty": ("\n", r"no clips in .*; expected one line per clip"),
    "half an emoji": (
        '{"file": "a.mp4", "caption": "\\ud83d"}\n',
        r"line 1 .* half a character \('.ud83d'\); expected",
    ),
    "number": ('{"file": "a.mp4", "caption": 3}\n', r"line 1 of .* has file, caption; expected texts"),
    "csv columns": ("video,caption\na.mp4,red\n", "has columns video, caption; .* rename file"),
    "csv not UTF-8": (b"file,caption\na.mp4,\xff\n", r"cannot be read \(.*\); expected jsonl or csv in UTF-8"),
}


@pytest.mark.parametrize("how", CAPTIONS)
def test_captions_that_do_not_fit_are_one_line(tmp_path, how):
    text, message = CAPTIONS[how]
    path = tmp_path / ("captions.csv" if "csv" in how.split() else "captions.jsonl")
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(message, read_captions, path)


def test_captions_from_a_csv(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('\ufefffile,score,caption\na.mp4,1,"red, and\nblue"\nb.mp4,2,green\n', encoding="utf-8")
    assert read_captions(path) == [Clip("a.mp4", "red, and\nblue"), Clip("b.mp4", "green")]
    assert read_captions(path, limit=1) == [Clip("a.mp4", "red, and\nblue")]


REFUSED = {
    "frames": (["--frames=16"], r"frames=16; expected 4 n \+ 1, as the codec takes them: 13 or 17"),
    "height": (["--height=100"], r"height=100; expected a multiple of 16: 96"),
    "fps": (["--fps=0"], r"fps=0\.0; expected more than 0"),
    "limit": (["--limit=0"], r"limit=0; expected at least 1"),
    "skip": (["--skip=10"], r"skip=10\.0; expected a share of the clips, from 0 to 1"),
    "videos": (["--videos=nowhere"], r"no folder nowhere; expected the folder of the videos"),
    "base": (["--base=./nowhere"], r"no folder \./nowhere; expected a pipeline folder"),
    "no pipeline": (["--base=docs"], r"no config\.json in docs/text_encoder; expected a pipeline folder"),
    "another family": (["--base={stranger}"], r"the vae of .*stranger has no z_dim; expected a pipeline of Wan's"),
    "dtype": (["--dtype=fp16"], r"invalid choice: 'fp16'"),
    "other frames": (["--frames=13", "whole"], r"was made with frames=9; asked for frames=13: name another output"),
    "other null": (["--null=", "whole"], r"was made with null='.*'; asked for null='': name another"),
    "other clips": (["--limit=2", "whole"], r"was made with captions='13 clips, .*'; asked for captions='2 clips, "),
    "other model": (["--base={other}", "whole"], r"was made with vae='weights .*'; asked for vae='weights .*: name"),
    "not prepared": (["wan/latents"], r"was made with captions=None; asked for .*: name another output folder"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(here, tmp_path, monkeypatch, how):
    monkeypatch.chdir(ROOT)
    changes, message = REFUSED[how]
    names = [change for change in changes if not change.startswith("--")]
    output = here / names[0] if names else tmp_path / "out"
    if how == "other model":
        make_tiny_wan(tmp_path / "other", seed=1, clips=1)
    if how == "another family":
        shutil.copytree(here / "wan/text_encoder", tmp_path / "stranger/text_encoder")
        (tmp_path / "stranger/vae").mkdir()
        (tmp_path / "stranger/vae/config.json").write_text('{"latent_channels": 4}')
    before = contents(output) if names else {}
    places = {name: tmp_path / name for name in ("other", "stranger")}
    refused(message, run, here, output, *(change.format(**places) for change in changes if change.startswith("--")))
    assert not names or contents(output) == before
    assert names or not output.exists()


def test_nothing_readable_is_an_error(here, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"file": "junk.mp4", "caption": "a"}\n{"file": "gone.mp4", "caption": "b"}\n')
    message = r"none of 2 clips could be read; .*skipped\.jsonl says why"
    refused(message, run, here, tmp_path / "out", f"--captions={path}")
    assert len((tmp_path / "out/skipped.jsonl").read_text().splitlines()) == 2


def test_the_command_says_what_is_missing_and_has_the_library_s_defaults(tmp_path, monkeypatch):
    missing = r"--videos is missing; expected --videos FOLDER --captions FILE, or --verify"
    refused(missing, prepare_latents, [f"--output={tmp_path}"])
    refused(
        "no latents in .*; expected a folder that prepare-latents",
        prepare_latents,
        [f"--output={tmp_path}", "--verify"],
    )
    monkeypatch.setattr(commands, "_prepare", lambda arguments: arguments)
    given = prepare_latents(["--videos=a", "--captions=b", "--output=c"])
    assert given.null is None  # Wan's
    assert all(getattr(given, name) == getattr(Options(), name) for name in (*TINY, "fps", "dtype"))
    assert given.skip == prepare.SKIP
