"""Videos to latents: the numbers that Wan's own parts make, by any number of processes, however often killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minianyflow.support.install import ROOT
from minianyflow.times import generator
from minianyflow.wan.data import commands, prepare
from minianyflow.wan.data.captions import Clip, read_captions
from minianyflow.wan.data.commands import prepare_latents
from minianyflow.wan.data.latents import LatentSet, clip_name, read_file
from minianyflow.wan.data.options import WAN_NULL, Options
from minianyflow.wan.data.prepare import Preparation
from minianyflow.wan.data.read_video import read_frames, to_float
from minianyflow.wan.data.write_video import write_clips
from minianyflow.wan.folders import (
    decode_latents,
    encode_prompts,
    encode_video,
    load_parts,
    make_tiny_wan,
    moving_shapes,
)
from tests.refused import refused

COUNT, LENGTH = 9, 32
TINY = {"frames": 9, "height": 32, "width": 48, "length": LENGTH}
BAD = {"junk.mp4": "cannot be read (", "short.mp4": "is too short (7 frames at 16 per second); expected at least 9"}
BAD |= {"gone.mp4": "cannot be read (", "silent.mp4": "empty caption"}
SKIPPED = [1, 9, 10, 11]  # their numbers
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
SCRIPT = str(ROOT / "scripts/prepare_latents.py")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A tiny Wan, two other models, 9 good videos, 4 bad ones, captions.jsonl, and `whole`, which one run makes."""
    folder = tmp_path_factory.mktemp("prepare")
    make_tiny_wan(folder / "wan", clips=2)
    make_tiny_wan(folder / "other", seed=1, clips=1)
    (folder / "stranger/vae").mkdir(parents=True)
    (folder / "stranger/vae/config.json").write_text('{"latent_channels": 4}')
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
    given = [f"--videos={here}/videos", f"--captions={here}/captions.jsonl", f"--base={here}/wan", "--device=cpu"]
    return [*given, *(f"--{name}={value}" for name, value in TINY.items()), f"--output={output}", *changes]


def run(here, output, *changes):
    return prepare_latents(flags(here, output, *changes))


def work(here, output, **changes):
    clips = read_captions(here / "captions.jsonl")
    return Preparation(here / "wan", clips, here / "videos", output, Options(**TINY), **changes)


def finish(job):
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


def contents(folder):
    """{name: bytes} of all files but the sheet, hidden ones too; of a manifest all but where the model was."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("sheet.png", None)
    return files | {"manifest.json": {**json.loads(files["manifest.json"]), "base": None}}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("0*/*")}


def vanish(monkeypatch, folder, name, left=()):
    """The folder of the videos is renamed when the video `name` is read; `left` is made in its place."""
    videos, read = folder / "videos", prepare.read_clip

    def gone(path, *options):
        frames = read(path, *options)
        if path.name == name:
            videos.rename(folder / "away")
            for place in left:
                (folder / place).mkdir()
        return frames

    monkeypatch.setattr(prepare, "read_clip", gone)


@pytest.fixture
def own(here, tmp_path):
    """As `here`, with videos of its own."""
    folder = tmp_path / "own"
    shutil.copytree(here, folder, ignore=shutil.ignore_patterns("short", "whole", "other"))
    return folder


# What is written


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "null"), [(torch.bfloat16, WAN_NULL), (torch.float32, "a blur")])
def test_clips_hold_what_wans_parts_make(here, tmp_path, dtype, null):
    output = here / "whole"
    if dtype == torch.float32:
        output = tmp_path / "out"
        assert run(here, output, "--dtype=fp32", f"--null={null}") == 0
    data, clips = LatentSet(output), read_captions(here / "captions.jsonl")
    good = [clip for clip in clips if clip.file not in BAD]
    assert (len(data), data.shape, data.null_text) == (COUNT, (3, 16, 4, 6), null)
    assert data.captions(range(COUNT)) == [clip.caption for clip in good]
    (vae,) = load_parts(here / "wan", "vae")
    parts = load_parts(here / "wan", "tokenizer", "text_encoder", dtype=dtype)
    latents, prompts = data.rows(range(COUNT))
    for number, clip in enumerate(good):
        video = to_float(read_frames(here / "videos" / clip.file, 9, 32, 48))
        assert torch.equal(latents[number], encode_video(vae, video)[0].to(dtype).float())
    expected = [encode_prompts(*parts, [clip.caption], LENGTH).float() for clip in good]
    assert torch.equal(prompts, torch.cat(expected))
    assert torch.equal(data.null, encode_prompts(*parts, [null], LENGTH).float())
    stored = load_file(data.path(0))
    assert stored["latents"].dtype == stored["prompt"].dtype == dtype
    assert 1 < len(stored["prompt"]) < LENGTH


@pytest.mark.slow
def test_skipped_clips_are_listed_with_their_reasons(here, tmp_path, capsys):
    before = {}
    for _ in range(2):  # a second run tries them again, and changes nothing
        assert run(here, tmp_path / "out") == 0
        assert "skipped: 4 of 13 clips" in capsys.readouterr().out
        lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
        assert [line["file"] for line in lines] == list(BAD)
        assert all(line["reason"].startswith(BAD[line["file"]]) and "\n" not in line["reason"] for line in lines)
        assert contents(tmp_path / "out") == contents(here / "whole")
        before = before or times(tmp_path / "out")
    assert times(tmp_path / "out") == before


@pytest.mark.slow
def test_the_disk_is_computed_and_a_dry_run_leaves_nothing(here, tmp_path, capsys, monkeypatch):
    assert run(here, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert "13 clips to encode, 0 are there; 9 frames of 48 x 32; 1 process" in out
    assert "s per clip on one process" in out
    _, size, _ = work(here, tmp_path / "out").estimate([k for k in range(13) if k not in SKIPPED])
    written = sum(path.stat().st_size for path in (here / "whole").glob("0*/*"))
    assert abs(size / written - 1) < 0.3
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda place: SimpleNamespace(free=20000))
    with refused(r"GB are needed and 2e-05 GB free in .*make room, name another"):
        run(here, tmp_path / "out")


@pytest.mark.slow
def test_text_encoder_and_codec_take_turns_and_nothing_is_encoded_twice(here, tmp_path, monkeypatch):
    job, texts = work(here, tmp_path / "out"), []
    encode_text, encode_clip = Preparation._encode_text, Preparation._encode_video
    monkeypatch.setattr(job, "_encode_text", lambda text: texts.append(text) or encode_text(job, text))
    monkeypatch.setattr(job, "_encode_video", lambda frames: job.text_parts is None and encode_clip(job, frames))
    assert finish(job) == 13
    assert texts == [WAN_NULL, *(clip.caption for clip in job.clips)]
    assert contents(tmp_path / "out") == contents(here / "whole")


@pytest.mark.slow
def test_what_was_changed_is_counted_in_the_summary_and_the_manifest(own, tmp_path, capsys):
    shades = [Image.fromarray(np.full((32, 48), 20 * k, np.uint8)) for k in range(9)]
    for name, frames, times in (("a.gif", shades, 60), ("b.gif", shades[:5], 120)):
        frames[0].save(own / "videos" / name, save_all=True, append_images=frames[1:], duration=times)
    shutil.copy(own / "videos/a.gif", own / "videos/d.gif")
    hdr = ["-bsf:v", "h264_metadata=transfer_characteristics=18", "-c", "copy", own / "videos/e.mp4"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", own / "videos/clip-0.mp4", *hdr], check=True)
    names = ["a.gif", "b.gif", "d.gif", "e.mp4", "junk.mp4", "short.mp4", "gone.mp4"]
    rows = [{"file": name, "caption": "x" * (40 if name == "d.gif" else 5)} for name in names]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(own, own / "out", f"--captions={tmp_path}/rows.jsonl") == 0
    expected = {"captions cut at 32 tokens": 1, "clips with repeated frames": 1, "colours converted from HLG": 1}
    expected |= {"frames repeated": 4, "skipped: cannot be read": 2, "skipped: is too short": 1}
    manifest = json.loads((own / "out/manifest.json").read_text())
    assert (manifest["report"], manifest["cleaned"]) == (expected, "ftfy, HTML entities, blanks")
    out = capsys.readouterr().out
    assert all(f"  {what}: {count}\n" in out for what, count in expected.items())


@pytest.mark.slow
def test_the_contact_sheet_shows_random_clips_as_they_decode(here, monkeypatch):
    monkeypatch.setattr(prepare, "SHOWN", 3)
    shown, draw = [], prepare.clip_sheet
    monkeypatch.setattr(
        prepare, "clip_sheet", lambda clips, titles, **k: shown.append((clips[""], titles)) or draw(clips, titles, **k)
    )
    sheets = [work(here, here / "whole").draw_sheet(seed).read_bytes() for seed in (0, 0, 1)]
    assert sheets[0] == sheets[1] != sheets[2]
    (vae,) = load_parts(here / "wan", "vae")
    for videos, titles in shown:
        for video, title in zip(videos, titles, strict=True):
            path = here / "whole" / clip_name(int(title.split(":")[0]))
            latents = load_file(path)["latents"][None].float()
            assert torch.equal(video, decode_latents(vae, latents)[0])
            assert read_file(path)[1]["text"] in title


# Any number of processes, and any interruption


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(here, tmp_path, monkeypatch):
    """One after the other, each as one of three, the last without work."""
    monkeypatch.setattr(prepare, "ROUND", 1)
    jobs = [work(here, tmp_path / "out", part=(index, 3)) for index in range(3)]
    jobs[0].begin()
    with refused("another run is at work in"):
        work(here, tmp_path / "out").begin()
    pending = jobs[0].pending()
    jobs[0].finish([line for job in reversed(jobs) for line in job.encode(pending)])
    assert contents(tmp_path / "out") == contents(here / "whole")


@pytest.mark.long
def test_two_processes_equal_one(here, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", SCRIPT]
    command = [*launch, *flags(here, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert "13 clips to encode, 0 are there; 9 frames of 48 x 32; 2 processes (MULTI_CPU)" in done.stdout
    assert "skipped: 4 of 13 clips" in done.stdout
    assert contents(tmp_path / "out") == contents(here / "whole")


@pytest.mark.long
def test_a_killed_process_goes_on(here, tmp_path):
    """Killed at random moments: what is encoded stays, and the result is that of one run."""
    output, draw = tmp_path / "out", random.Random(0)
    for kill in (signal.SIGKILL, signal.SIGTERM):
        before, command = times(output), [sys.executable, SCRIPT, *flags(here, output)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT)
        target = len(before) + draw.randrange(1, 4)
        while process.poll() is None and len(times(output)) < target:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(kill)
        _, complaint = process.communicate()
        assert process.returncode == (130 if kill == signal.SIGTERM else -kill), complaint
        assert (b"interrupted" in complaint) == (kill == signal.SIGTERM)
        assert before.items() <= times(output).items()
        with refused("is unfinished; expected all its clips: run prepare-latents again"):
            LatentSet(output)
    assert run(here, output) == 0
    assert contents(output) == contents(here / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4])
def test_stopped_at_any_write_it_goes_on(here, tmp_path, monkeypatch, after):
    """After the manifest, or some clips: a file was written and did not take its place."""
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
    assert finish(work(here, tmp_path / "out")) == min(13, 13 + 2 - after)  # and no clip is encoded twice
    assert contents(tmp_path / "out") == contents(here / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "message"),
    [
        ((), r"the folder of videos .* is gone; put it back and run the same"),
        (("videos",), r"5 of [0-9]+ clips .*No such file"),  # as a network disk does
    ],
)
def test_videos_that_go_away_are_encoded_by_the_next_run(here, own, monkeypatch, left, message):
    monkeypatch.setattr(prepare, "FEW", 4)
    with monkeypatch.context() as patch:
        vanish(patch, own, "clip-3.mp4", left)
        with refused(message):
            finish(work(own, own / "out"))
    assert not (own / "out/skipped.jsonl").exists()
    for place in left:
        (own / place).rmdir()
    (own / "away").rename(own / "videos")
    assert 0 < finish(work(own, own / "out")) < 13
    assert contents(own / "out") == contents(here / "whole")


# Too much skipped, and tried again


@pytest.mark.slow
def test_more_skipped_than_is_allowed_stops_and_is_no_finished_set(here, tmp_path, monkeypatch):
    finish(work(here, tmp_path / "few", skip=0.001))  # a few always may
    with refused(r"1 of 2 clips .* junk\.mp4 .* at most 0 \(skip=0\)"):
        finish(work(here, tmp_path / "none", skip=0))
    monkeypatch.setattr(prepare, "FEW", 1)
    expected = r"4 of 12 clips had to be skipped, the last was silent\.mp4 \(empty caption\); .* 3 \(skip=0\.3\): "
    for _ in range(2):  # nor piece by piece
        with refused(expected + ".* run the same command again, or allow more"):
            finish(work(here, tmp_path / "out", skip=0.3))
        assert len(times(tmp_path / "out")) == 8
    with refused("is unfinished"):
        LatentSet(tmp_path / "out")
    before = times(tmp_path / "out")
    finish(work(here, tmp_path / "out", skip=0.4))
    assert contents(tmp_path / "out") == contents(here / "whole")
    assert before.items() <= times(tmp_path / "out").items()


@pytest.mark.slow
def test_skipped_and_lost_clips_of_a_finished_folder_are_tried_again(own):
    """The folder stays as it is meanwhile: a run that reads it is not disturbed."""
    output, videos = own / "out", own / "videos"
    finish(work(own, output))
    for number, name in enumerate(BAD):
        shutil.copy(videos / f"clip-{number}.mp4", videos / name)
    finish(work(own, own / "undisturbed"))
    (output / clip_name(12)).unlink()
    before, manifest = times(output), (output / "manifest.json").read_bytes()
    job = work(own, output)
    job.begin()
    assert job.pending() == [*SKIPPED, 12]
    skipped = job.encode(job.pending())
    assert (output / "manifest.json").read_bytes() == manifest
    assert len(LatentSet(output)) == COUNT
    job.finish(skipped)
    job.lock.close()
    assert before.items() <= times(output).items()
    assert contents(output) == contents(own / "undisturbed")
    assert finish(work(own, output)) == 1  # the empty caption


# Verifying, and bad input


@pytest.mark.slow
def test_verify_says_what_is_wrong(here, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(here / "whole", output)
    assert prepare_latents(["--verify", f"--output={output}"]) == 0
    assert f"{output}: {COUNT} clips, whole" in capsys.readouterr().out
    shutil.copy(output / clip_name(3), output / clip_name(99))
    assert prepare_latents(["--verify", f"--output={output}"]) == 1
    assert capsys.readouterr().out == f"{output}/{clip_name(99)} is not in manifest.json\n"


GOOD = '{"file": "a.mp4", "caption": "a"}\n'
CAPTIONS = {
    "no file": (None, r"captions .* cannot be read \(.*No such file or directory.*\); expected jsonl or csv"),
    "other keys": (
        '{"path": "a.mp4", "text": "a"}\n',
        r"line 1 of .* has 'path', 'text'; expected texts named file and",
    ),
    "no json": (GOOD + "a.mp4,a\n", r"line 2 of .* is not a JSON object .*for a csv name the file \.csv"),
    "twice": (GOOD + GOOD, r"a\.mp4 is in lines 1 and 2 of .*; expected each file once"),
    "empty": ("\n", r"no clips in .*; expected one line per clip"),
    "half an emoji": ('{"file": "a.mp4", "caption": "\\ud83d"}\n', "line 1 .* not a JSON object .*surrogates not"),
    "list": ("[1]\n", "line 1 of .* is not a JSON object"),
    "number": ('{"file": "a.mp4", "caption": 3}\n', r"line 1 of .* has 'file', 'caption'; expected texts"),
    "csv columns": ("video,caption\na.mp4,red\n", "line 1 of .* has 'video', 'caption'; expected the columns file and"),
    "csv not UTF-8": (b"file,caption\na.mp4,\xff\n", r"cannot be read \(.*\); expected jsonl or csv in UTF-8"),
}


@pytest.mark.parametrize("how", CAPTIONS)
def test_captions_that_do_not_fit_are_one_line(tmp_path, how):
    text, message = CAPTIONS[how]
    path = tmp_path / ("captions.csv" if "csv" in how.split() else "captions.jsonl")
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(message):
        read_captions(path)


def test_captions_from_a_csv(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('\ufefffile,score,caption\na.mp4,1,"red, and\nblue"\nb.mp4,2,green\n', encoding="utf-8")
    assert read_captions(path) == [Clip("a.mp4", "red, and\nblue"), Clip("b.mp4", "green")]
    assert read_captions(path, limit=1) == [Clip("a.mp4", "red, and\nblue")]


REFUSED = {  # the last word names a folder that it is asked for
    "frames": (["--frames=16"], r"frames=16; expected 4 n \+ 1, like 17 or 81"),
    "height": (["--height=100"], r"height=100; expected a multiple of 16"),
    "fps": (["--fps=0"], r"fps=0\.0; expected more than 0"),
    "limit": (["--limit=0"], r"limit=0; expected at least 1"),
    "skip": (["--skip=10"], r"skip=10\.0; expected a share of the clips, from 0 to 1"),
    "videos": (["--videos=nowhere"], r"no folder nowhere; expected the folder of the videos"),
    "base": (["--base=./nowhere"], r"no folder \./nowhere; expected a pipeline folder"),
    "no pipeline": (["--base={here}/videos"], r"videos/vae/config\.json .*; expected a pipeline folder"),
    "another family": (["--base={here}/stranger"], r"the vae of .*stranger has no z_dim; expected a pipeline of Wan's"),
    "dtype": (["--dtype=fp16"], r"invalid choice: 'fp16'"),
    "other frames": (["--frames=13", "whole"], r"was made with frames=9; asked for frames=13: name another output"),
    "other null": (["--null=", "whole"], r"was made with null='.*'; asked for null='': name another"),
    "other clips": (["--limit=2", "whole"], r"was made with captions='13 clips, .*'; asked for captions='2 clips, "),
    "other model": (["--base={here}/other", "whole"], r"was made with vae='weights .*'; asked for vae='weights .*:"),
    "not prepared": (["wan/latents"], r"was made with captions=None; asked for .*: name another output folder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(here, tmp_path, how):
    changes, message = REFUSED[how]
    *changes, name = changes if not changes[-1].startswith("--") else [*changes, None]
    output = here / name if name else tmp_path / "out"
    before = contents(output) if name else {}
    with refused(message):
        run(here, output, *(change.format(here=here) for change in changes))
    assert (contents(output) == before) if name else not output.exists()


@pytest.mark.slow
def test_nothing_readable_is_an_error(here, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"file": "junk.mp4", "caption": "a"}\n{"file": "gone.mp4", "caption": "b"}\n')
    with refused(r"none of 2 clips could be read; .*skipped\.jsonl says why"):
        run(here, tmp_path / "out", f"--captions={path}")
    assert len((tmp_path / "out/skipped.jsonl").read_text().splitlines()) == 2


def test_the_command_says_what_is_missing_and_has_the_defaults_of_the_library(tmp_path, monkeypatch):
    with refused(r"--videos is missing; expected --videos FOLDER --captions FILE, or --parquet, or --verify"):
        prepare_latents([f"--output={tmp_path}"])
    with refused("no latents in .*; expected a folder that prepare-latents"):
        prepare_latents([f"--output={tmp_path}", "--verify"])
    monkeypatch.setattr(commands, "_prepare", lambda arguments: arguments)
    given = prepare_latents(["--videos=a", "--captions=b", "--output=c"])
    assert given.null is given.fps is None  # Wan's, of the base
    assert all(getattr(given, name) == getattr(Options(), name) for name in (*TINY, "dtype"))
    assert given.skip == prepare.SKIP
    assert len(WAN_NULL.split("，")) == 28
