"""Videos to shards: the numbers that Wan's own parts make, whoever makes them and however often they are stopped."""

import contextlib
import dataclasses
import gc
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import imageio_ffmpeg
import pytest
import torch
from safetensors import safe_open

from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from minianyflow.times import generator
from minianyflow.wan.data import prepare
from minianyflow.wan.data.clips import WAN_NULL, Clip, Options, read_captions, read_clip
from minianyflow.wan.data.prepare import Preparation
from minianyflow.wan.data.shards import LatentShards, verify
from minianyflow.wan.data.videos import read_video, write_clips
from minianyflow.wan.folders import encode_prompts, encode_video, load_parts, make_tiny_wan, moving_shapes

COUNT, SIZE, LENGTH = 9, 2, 32
TINY = {"frames": 9, "height": 32, "width": 48, "length": LENGTH, "shard_size": SIZE}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()] + ["--device=cpu"]
BAD = {"junk.mp4": "cannot be read (", "short.mp4": "has 7 frames at 16 a second; expected at least 9"}
BAD |= {"gone.mp4": "no such file", "silent.mp4": "empty caption"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder of a tiny Wan, videos good and bad, captions.jsonl, and `whole`: what one run makes of them."""
    folder = tmp_path_factory.mktemp("prepare")
    make_tiny_wan(folder / "wan")
    captions, video = moving_shapes(COUNT, generator(5))
    write_clips(folder / "videos", {"clip": video}, captions)
    (folder / "videos/junk.mp4").write_text("no video")
    write_clips(folder / "short", {"x": video[:1, :7]}, captions[:1])
    shutil.copy(folder / "short/x-0.mp4", folder / "videos/short.mp4")
    rows = [{"file": f"clip-{k}.mp4", "caption": captions[k]} for k in range(COUNT)]
    rows[2]["caption"] = rows[1]["caption"]  # twice in one shard
    bad = [{"file": name, "caption": " " if name == "silent.mp4" else f"of {name}"} for name in BAD]
    rows[1:1], rows[4:4] = bad[:1], bad[1:]  # a shard with one bad clip, then one of bad ones only
    lines = [json.dumps(row) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    assert run(folder, folder / "whole") == 0
    return folder


@pytest.fixture(scope="module")
def script():
    return _script()


def _script():
    spec = importlib.util.spec_from_file_location("prepare_latents", ROOT / "scripts/prepare_latents.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(here, output, *changes):
    given = [f"--videos={here}/videos", f"--captions={here}/captions.jsonl", f"--base={here}/wan", *FLAGS]
    return [*given, f"--output={output}", *changes]


def run(here, output, *changes):
    return _script().main(flags(here, output, *changes))


def command(here, output, *changes):
    return [str(ROOT / "scripts/prepare_latents.py"), *flags(here, output, *changes)]


def made(folder):
    """{name: bytes} of all files, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def work(here, output, part=(0, 1), skip=0.1, **changes):
    clips = read_captions(here / "captions.jsonl")
    return Preparation(here / "wan", clips, here / "videos", output, Options(**TINY | changes), part=part, skip=skip)


def shown(here, name):
    """A video as the codec takes it."""
    return read_clip(here / "videos" / name, Options(**TINY)).permute(0, 3, 1, 2)[None].float() / 255


def finish(here, output, part=(0, 1), skip=0.1, retry=False):
    """What the script does, on one process that may stand for one of several."""
    job = work(here, output, part, skip)
    try:
        if not job.begin(retry=retry):
            if job.pending():
                _script().announce(job, job.pending(), "NO")
            job.encode(job.pending())
            job.finish()
    finally:
        if job.held:
            job.held.close()  # as the end of a process does
    return job


# What is written


def test_shards_hold_what_wans_parts_make(here):
    data, clips = LatentShards(here / "whole"), read_captions(here / "captions.jsonl")
    good = [clip for clip in clips if clip.file not in BAD]
    assert (len(data), data.shape) == (COUNT, (3, 16, 4, 6))
    assert data.captions(range(COUNT)) == [clip.caption for clip in good]
    (vae,) = load_parts(here / "wan", "vae")
    tokenizer, text_encoder = load_parts(here / "wan", "tokenizer", "text_encoder", dtype=torch.bfloat16)
    latents, prompts = data.rows(range(COUNT))
    for number, clip in enumerate(good):
        expected = encode_video(vae, shown(here, clip.file))[0]
        torch.testing.assert_close(latents[number], expected, atol=1e-3, rtol=1 / 128)  # bfloat16 on disk
        expected = encode_prompts(tokenizer, text_encoder, [clip.caption], LENGTH)[0]
        torch.testing.assert_close(prompts[number], expected.float(), atol=2e-2, rtol=2e-2)
    expected = encode_prompts(tokenizer, text_encoder, [WAN_NULL], LENGTH)
    assert torch.equal(data.null, expected.float())


def test_a_shard_says_what_it_is_kept_in(here):
    """bfloat16, and no more tokens than its longest prompt has."""
    manifest = json.loads((here / "whole/manifest.json").read_text())
    file = safe_open(here / "whole/00000.safetensors", "pt")
    kept = file.get_tensor("prompts")
    assert kept.dtype == file.get_tensor("latents").dtype == torch.bfloat16
    assert [*kept.shape] == manifest["shards"]["00000"]["prompts"]
    assert 1 < kept.shape[1] < LENGTH
    assert bool(kept[:, -1].any())
    assert safe_open(here / "whole/null.safetensors", "pt").metadata() == {"text": WAN_NULL}
    assert len(WAN_NULL.split("，")) == 28  # noqa: RUF001


def test_single_precision_and_another_null_prompt(here, tmp_path):
    assert run(here, tmp_path / "out", "--dtype=fp32", "--null=a blur", "--limit=1") == 0
    file = safe_open(tmp_path / "out/00000.safetensors", "pt")
    assert file.get_tensor("latents").dtype == file.get_tensor("prompts").dtype == torch.float32
    (vae,) = load_parts(here / "wan", "vae")
    expected = encode_video(vae, shown(here, "clip-0.mp4"))
    assert torch.equal(LatentShards(tmp_path / "out").rows([0])[0], expected)
    assert safe_open(tmp_path / "out/null.safetensors", "pt").metadata() == {"text": "a blur"}
    null = encode_prompts(*load_parts(here / "wan", "tokenizer", "text_encoder"), ["a blur"], LENGTH)
    assert torch.equal(LatentShards(tmp_path / "out").null, null)


def test_what_is_skipped_is_listed_with_its_reason(here, tmp_path, capsys):
    assert run(here, tmp_path / "out") == 0
    assert "skipped: 4 of 13 clips" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == list(BAD)
    for line in lines:
        assert line["reason"].startswith(BAD[line["file"]])
        assert "\n" not in line["reason"]
    names = [f"{number:05d}.safetensors" for number in (0, 1, 3, 4, 5, 6)]  # shard 2 would hold bad ones alone
    assert sorted(path.name for path in (tmp_path / "out").glob("0*.safetensors")) == names
    assert sorted(LatentShards(tmp_path / "out").captions(range(COUNT))) == sorted(
        clip.caption for clip in read_captions(here / "captions.jsonl") if clip.file not in BAD
    )


def test_nothing_is_encoded_twice(here, tmp_path):
    """Not even what is timed beforehand; two shards have no caption in common here, one has the same one twice."""
    job = work(here, tmp_path / "out")
    job.begin()
    assert job.time_of(job.pending()) > 0
    job.encode(job.pending())
    texts = {(k // SIZE, clip.caption) for k, clip in enumerate(job.clips) if clip.caption}
    assert job.encoded == {"texts": len(texts) + 1, "videos": COUNT}
    assert job.text_parts is None  # UMT5 does not lie in memory beside the codec
    job.finish()
    assert made(tmp_path / "out") == made(here / "whole")


def test_disk_is_computed_and_a_dry_run_leaves_nothing(here, tmp_path, capsys):
    assert run(here, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert "13 clips, 9 frames of 48 x 32: 7 shards to make, 0 are there" in out
    assert "s a clip on one process" in out
    clips = [Clip(f"clip-{k}.mp4", f"a red square moves left {k}") for k in range(COUNT)]
    job = Preparation(here / "wan", clips, here / "videos", tmp_path / "good", Options(**TINY))
    job.begin()
    size = job.bytes_of(job.pending())
    job.encode(job.pending())
    job.finish()
    actual = sum(path.stat().st_size for path in (tmp_path / "good").glob("0*"))
    assert abs(size / actual - 1) < 0.03


# Whoever makes them, however often they are stopped


def test_the_number_of_processes_changes_nothing(here, tmp_path):
    """One after the other, each as one of three."""
    jobs = [work(here, tmp_path / "out", (index, 3)) for index in range(3)]
    jobs[0].begin()
    pending = jobs[0].pending()
    for job in reversed(jobs):
        job.encode(pending)
    assert [job.encoded["videos"] for job in jobs] == [3, 4, 2]
    jobs[0].finish()
    assert made(tmp_path / "out") == made(here / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(here, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, *command(here, tmp_path / "out")], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "7 shards to make, 0 are there; 2 processes (MULTI_CPU)" in done.stdout
    assert "skipped: 4 of 13 clips" in done.stdout
    assert made(tmp_path / "out") == made(here / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "after"), [(signal.SIGKILL, 1), (signal.SIGKILL, 3), (signal.SIGTERM, 2)])
def test_a_killed_process_goes_on(here, tmp_path, how, after):
    """Finished shards are kept as they are; all is as if nothing had happened."""
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, *command(here, output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    while process.poll() is None and len(list(output.glob("0*.safetensors"))) < after:
        time.sleep(0.002)
    process.send_signal(how)
    _, complaint = process.communicate()
    assert process.returncode == (130 if how == signal.SIGTERM else -how)
    assert how == signal.SIGKILL or "interrupted" in complaint.decode()
    before = {path: path.stat().st_mtime_ns for path in output.glob("0*.safetensors")}
    whole = {path for path in before if (output / prepare.WORK / f"{path.stem}.json").exists()}
    assert after - 1 <= len(whole) < 6
    with pytest.raises(InputError, match="is unfinished; expected all its shards: run prepare_latents"):
        LatentShards(output)
    assert run(here, output) == 0
    assert all(path.stat().st_mtime_ns == before[path] for path in whole)
    assert made(output) == made(here / "whole")


@pytest.mark.parametrize("after", [0, 1, 4, 11, 18, 33])
def test_stopped_at_any_write_it_goes_on(here, tmp_path, monkeypatch, after):
    """A file has been written in full or half, and not yet taken its place."""
    replace, count = os.replace, []

    def stop(source, target):
        count.append(target)
        if len(count) > after:
            with open(source, "r+b") as file:
                file.truncate(len(file.read()) // (1 + after % 2))
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(prepare.os, "replace", stop)
    stops = (
        after < 30
    )  # the manifest twice, the null prompt, what is skipped, 7 prompts and 7 records, 6 shards of 2 files
    with pytest.raises(KeyboardInterrupt) if stops else contextlib.nullcontext():
        finish(here, tmp_path / "out")
    assert len(count) == min(after + 1, 30)
    monkeypatch.setattr(prepare.os, "replace", replace)
    finish(here, tmp_path / "out")
    assert made(tmp_path / "out") == made(here / "whole")


def test_a_finished_folder_is_left_alone(here, tmp_path, capsys):
    shutil.copytree(here / "whole", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(here, tmp_path / "out") == 0
    assert "is finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_keeps_what_was_saved(here, tmp_path, monkeypatch):
    """The system refuses files larger than so much: first every shard, then all that are to come."""
    job = work(here, tmp_path / "out")
    job.begin()
    job.encode(job.pending()[:2])
    job.held.close()
    saved = {name: data for name, data in made(tmp_path / "out").items() if name.endswith(".safetensors")}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(map(len, saved.values())) - 1000
    assert largest > 3000
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        with pytest.raises(
            InputError, match=r"cannot write .*safetensors \(.*\); make room .* run the same"
        ) as problem:
            finish(here, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(problem.value)
    after = made(tmp_path / "out")
    assert {name: after[name] for name in saved} == saved
    assert not [name for name in after if ".part" in name]
    finish(here, tmp_path / "out")
    assert made(tmp_path / "out") == made(here / "whole")


def test_a_disk_that_is_too_small_is_said_beforehand(here, tmp_path, monkeypatch, script):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda place: SimpleNamespace(free=20000))
    with pytest.raises(InputError, match=r"GB are needed and 2e-05 GB free in .*make room, name another"):
        script.main(flags(here, tmp_path / "out"))


# Verifying


def flip(path):
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["00001.safetensors", "00003.jsonl", "null.safetensors", "skipped.jsonl"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_verify_names_what_is_wrong(here, tmp_path, capsys, script, name, how):
    output = tmp_path / "out"
    shutil.copytree(here / "whole", output)
    assert script.main(["--verify", f"--output={output}"]) == 0
    assert f"{output}: {COUNT} clips in 6 shards, whole" in capsys.readouterr().out
    path = output / name
    if how == "gone":
        path.unlink()
    else:
        flip(path) if how == "flip" else path.write_bytes(path.read_bytes()[:-7])
    assert script.main(["--verify", f"--output={output}"]) == 1
    message = {"flip": "has sha256", "cut": "bytes; expected", "gone": "cannot be read (No such file"}[how]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path} ")
    assert message in line


def test_verify_compares_shapes_counts_and_the_model(here, tmp_path, capsys, script):
    output = tmp_path / "out"
    shutil.copytree(here / "whole", output)
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["rows"] += 1
    manifest["options"]["dtype"] = "fp32"
    manifest["shards"]["00001"]["latents"][1] = 6
    (output / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(output / "00001.safetensors", output / "00009.safetensors")
    make_tiny_wan(tmp_path / "other", seed=1)
    assert script.main(["--verify", f"--output={output}", f"--base={tmp_path}/other"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6 + 1 + 1 + 3
    for expected in ("holds latents [2, 3, 16, 4, 6]; expected [2, 6, 16", "is kept in BF16; expected F32"):
        assert any(expected in line for line in lines), expected
    assert f"{output}/00009.safetensors is not in manifest.json" in lines
    assert f"{output}/manifest.json lists shards of 9 rows; expected 10, as it says" in lines
    assert f"{output} was made with another vae than that of {tmp_path}/other" in lines


def test_the_model_is_its_configuration_and_weights(here, tmp_path):
    """Not the files that they are in, nor the version that wrote them."""
    shutil.copytree(here / "wan", tmp_path / "wan")
    expected = prepare.identity(here / "wan", "a")
    vae = load_parts(tmp_path / "wan", "vae")[0]
    shutil.rmtree(tmp_path / "wan/vae")
    vae.register_to_config(_diffusers_version="0")
    vae.save_pretrained(tmp_path / "wan/vae", max_shard_size="200KB")
    assert len(list((tmp_path / "wan/vae").glob("*.safetensors"))) > 1
    assert prepare.identity(tmp_path / "wan", "a") == expected
    with torch.no_grad():
        next(vae.parameters()).flatten()[0] += 1
    vae.save_pretrained(tmp_path / "wan/vae", max_shard_size="200KB")
    changed = prepare.identity(tmp_path / "wan", "a")
    assert {name for name in expected if changed[name] != expected[name]} == {"vae"}


# Reading videos


@pytest.mark.parametrize("fps", [8, 16, 24, 32])
def test_clips_are_read_as_movies_reads_them(tmp_path, fps):
    """ffmpeg's choice of frames is ours, bit for bit where nothing is resized."""
    captions, video = moving_shapes(1, generator(1))
    write_clips(tmp_path, {"x": video}, captions, fps=fps)
    count = {8: 33, 16: 17, 24: 9, 32: 9}[fps]
    clip = read_clip(tmp_path / "x-0.mp4", Options(frames=count, height=64, width=64))
    expected = read_video(tmp_path / "x-0.mp4", count, 64, 64)[0]
    assert torch.equal(clip.permute(0, 3, 1, 2).float() / 255, expected)
    smaller = Options(frames=count, height=32, width=48)
    clip = read_clip(tmp_path / "x-0.mp4", smaller).permute(0, 3, 1, 2).float() / 255
    assert float((clip - read_video(tmp_path / "x-0.mp4", count, 32, 48)[0]).abs().mean()) < 0.01


def test_another_speed_takes_other_frames(here):
    path = here / "videos/clip-0.mp4"
    every = read_clip(path, Options(**TINY))
    half = read_clip(path, Options(**TINY | {"frames": 5, "fps": 8.0}))
    assert torch.equal(half, every[::2])


def test_a_video_on_its_side_is_read_upright(here, tmp_path):
    """As a telephone films it: the file says how it is to be turned."""
    turned = tmp_path / "turned.mp4"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90"]
    write_clips(tmp_path, {"x": moving_shapes(1, generator(1))[1][..., :48]}, ["x"])
    subprocess.run([*ffmpeg, "-i", str(tmp_path / "x-0.mp4"), "-c", "copy", str(turned)], check=True)
    clip = read_clip(turned, Options(frames=17, height=48, width=64))
    upright = read_clip(tmp_path / "x-0.mp4", Options(frames=17, height=64, width=48))
    assert torch.equal(clip, upright.rot90(1, (1, 2)))


# Bad input

GOOD = '{"file": "a.mp4", "caption": "a"}\n'
CAPTIONS = {
    "no file": (None, r"captions .* cannot be read \(No such file or directory\); expected jsonl or csv"),
    "other keys": ('{"path": "a.mp4", "text": "a"}\n', r"line 1 of .* has path, text; expected texts file and caption"),
    "no json": (GOOD + "a.mp4,a\n", r"line 2 of .* is not a JSON object; expected .*for a csv name the file \.csv"),
    "twice": (GOOD + GOOD, r"a\.mp4 is in lines 1 and 2 of .*; expected each file once"),
    "empty": ("\n", r"no clips in .*; expected a line for each"),
    "half an emoji": (
        '{"file": "a.mp4", "caption": "\\ud83d"}\n',
        r"line 1 of .* has half a character \('.ud83d'\); expec",
    ),
    "number": ('{"file": "a.mp4", "caption": 3}\n', r"line 1 of .* has file, caption; expected texts"),
}


@pytest.mark.parametrize("how", CAPTIONS)
def test_captions_that_do_not_fit_are_one_line(tmp_path, how):
    text, message = CAPTIONS[how]
    if text is not None:
        (tmp_path / "captions.jsonl").write_text(text)
    with pytest.raises(InputError, match=message) as problem:
        read_captions(tmp_path / "captions.jsonl")
    assert "\n" not in str(problem.value)


def test_captions_from_a_csv(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('\ufefffile,score,caption\na.mp4,1,"red, and\nblue"\nb.mp4,2,green\n')
    assert read_captions(path) == [Clip("a.mp4", "red, and\nblue"), Clip("b.mp4", "green")]
    assert read_captions(path, limit=1) == [Clip("a.mp4", "red, and\nblue")]
    path.write_text("video,caption\na.mp4,red\n")
    with pytest.raises(InputError, match=r"has columns video, caption; expected file and caption: rename file"):
        read_captions(path)
    path.write_bytes(b"file,caption\na.mp4,\xff\n")
    with pytest.raises(InputError, match=r"cannot be read \(.*\); expected jsonl or csv in UTF-8"):
        read_captions(path)


REFUSED = {
    "frames": (["--frames=16"], r"frames=16; expected 4 n \+ 1, as the codec takes them: 13 or 17"),
    "height": (["--height=100"], r"height=100; expected a multiple of 16: 96"),
    "fps": (["--fps=0"], r"fps=0\.0; expected more than 0"),
    "limit": (["--limit=0"], r"limit=0; expected at least 1"),
    "skip": (["--skip=10"], r"skip=10\.0; expected a share of the clips, from 0 to 1"),
    "dry retry": (["--retry", "--dry-run"], r"--retry changes what is there; expected it without --dry-run"),
    "shard size": (["--shard-size=0"], r"shard_size=0; expected more than 0"),
    "videos": (["--videos=nowhere"], r"no folder nowhere; expected the one that the videos are in"),
    "base": (["--base=./nowhere"], r"no folder \./nowhere; expected a pipeline folder"),
    "no pipeline": (["--base=docs"], r"no config\.json in docs/vae; expected a pipeline folder, with vae in it"),
    "another family": (["--base=stranger"], r"the vae of .*stranger has no z_dim; expected a pipeline of Wan's family"),
    "dtype": (["--dtype=fp16"], r"invalid choice: 'fp16'"),
    "other frames": (["--frames=13", "whole"], r"was made with frames=9; asked for frames=13: name another --output"),
    "other null": (["--null=", "whole"], r"was made with null='.*'; asked for null='': name another"),
    "other clips": (["--limit=2", "whole"], r"was made with other clips \(13\); asked for 2 of --captions: name"),
    "other model": (["--base=other", "whole"], r"was made with another vae; asked for that of .*: name another"),
    "no manifest": (["wan/latents"], r"holds shards without a manifest\.json; expected a new folder: name another"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(here, tmp_path, script, monkeypatch, how):
    monkeypatch.chdir(ROOT)
    changes, message = REFUSED[how]
    names = [each for each in changes if not each.startswith("--")]
    output = here / names[0] if names else tmp_path / "out"
    if how == "other model":
        make_tiny_wan(tmp_path / "other", seed=1)
        changes = [f"--base={tmp_path}/other"]
    if how == "another family":
        (tmp_path / "stranger/vae").mkdir(parents=True)
        (tmp_path / "stranger/vae/config.json").write_text('{"latent_channels": 4}')
        changes = [f"--base={tmp_path}/stranger"]
    before = made(output) if names else {}
    with pytest.raises(InputError, match=message) as problem:
        script.main(flags(here, output, *(each for each in changes if each.startswith("--"))))
    assert "\n" not in str(problem.value)
    assert not names or made(output) == before
    assert names or not list(tmp_path.glob("out/0*"))


def test_nothing_readable_is_an_error(here, tmp_path, script):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"file": "junk.mp4", "caption": "a"}\n{"file": "gone.mp4", "caption": "b"}\n')
    with pytest.raises(InputError, match=r"none of 2 clips could be read; .*skipped\.jsonl says why"):
        script.main(flags(here, tmp_path / "out", f"--captions={path}"))
    assert len((tmp_path / "out/skipped.jsonl").read_text().splitlines()) == 2


def test_videos_that_go_away_are_not_skipped(here, tmp_path, monkeypatch):
    """Finished shards stay, and the rest are made once the folder is back."""
    output, make = tmp_path / "out", prepare.Preparation._make_shard
    videos = here / "videos"
    away = videos.with_name("away")

    def gone(self, number, bar):
        if number == 2:
            videos.rename(away)
        make(self, number, bar)

    monkeypatch.setattr(prepare.Preparation, "_make_shard", gone)
    try:
        with pytest.raises(InputError, match=r"the folder of videos .* is gone; put it back and run the same"):
            run(here, output)
    finally:
        away.rename(videos)
    monkeypatch.undo()
    gc.collect()  # what failed lets go of the folder
    assert not (output / "skipped.jsonl").exists()
    assert run(here, output) == 0
    assert made(output) == made(here / "whole")


# Too much skipped, and tried again


@pytest.fixture(scope="module")
def mended(here, tmp_path_factory):
    """As `here`, with all videos good: still a caption is empty. `whole` is what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("mended")
    for name in ("wan", "captions.jsonl"):
        (folder / name).symlink_to(here / name)
    shutil.copytree(here / "videos", folder / "videos")
    for number, name in enumerate(BAD):
        shutil.copy(here / f"videos/clip-{number}.mp4", folder / "videos" / name)
    assert run(folder, folder / "whole") == 0
    return folder


def test_more_skipped_than_is_allowed_stops_and_is_no_finished_set(here, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "FEW", 3)
    expected = r"4 of 7 clips had to be skipped, the last was silent\.mp4 \(empty caption\); .* 3 \(--skip 0\.1\): "
    with pytest.raises(InputError, match=expected + ".* the same with --retry, or allow more; .* kept$") as problem:
        finish(here, tmp_path / "out")
    assert "\n" not in str(problem.value)
    saved = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*.safetensors")}
    assert len(saved) == 2
    with pytest.raises(InputError, match=r"4 of 13 clips had to be skipped"):  # piece by piece does not get round it
        finish(here, tmp_path / "out")
    with pytest.raises(InputError, match="is unfinished"):
        LatentShards(tmp_path / "out")
    finish(here, tmp_path / "out", skip=0.4)
    assert made(tmp_path / "out") == made(here / "whole")
    assert {path: path.stat().st_mtime_ns for path in saved} == saved


def test_a_few_are_no_share_and_none_is_none(here, tmp_path):
    finish(here, tmp_path / "few", skip=0.001)
    assert made(tmp_path / "few") == made(here / "whole")
    with pytest.raises(InputError, match=r"1 of 2 clips .* junk\.mp4 \(cannot be read .* at most 0 \(--skip 0\)"):
        finish(here, tmp_path / "none", skip=0)


@pytest.mark.parametrize(("recent", "stops"), [(4, True), (13, False)])
def test_the_last_clips_count(here, tmp_path, monkeypatch, recent, stops):
    """Or videos that go away after a million good ones would be noticed after a hundred thousand."""
    monkeypatch.setattr(prepare, "FEW", 1)
    monkeypatch.setattr(prepare, "RECENT", recent)
    with pytest.raises(InputError, match="3 of 4 clips") if stops else contextlib.nullcontext():
        finish(here, tmp_path / "out", skip=0.6)


def test_videos_that_leave_an_empty_folder_behind(here, mended, tmp_path, monkeypatch, script):
    """As a network disk does: the run stops, and with --retry all is as if nothing had happened."""
    monkeypatch.setattr(prepare, "FEW", 4)
    output, make, videos, away = tmp_path / "out", prepare.Preparation._make_shard, mended / "videos", mended / "away"

    def gone(self, number, bar):
        if number == 2:
            videos.rename(away)
            videos.mkdir()
        make(self, number, bar)

    monkeypatch.setattr(prepare.Preparation, "_make_shard", gone)
    try:
        with pytest.raises(InputError, match=r"5 of 9 clips .*, the last was clip-4\.mp4 \(no such file\)"):
            finish(mended, output)
    finally:
        videos.rmdir()
        away.rename(videos)
    monkeypatch.undo()
    job = finish(mended, output, retry=True)
    assert job.encoded["videos"] == 12 - 4  # two shards were whole
    assert made(output) == made(mended / "whole")


def test_what_was_skipped_is_tried_again_and_nothing_else(here, mended, tmp_path):
    """In a finished folder, that is unfinished meanwhile."""
    output = tmp_path / "out"
    shutil.copytree(here / "whole", output)
    before = {path: path.stat().st_mtime_ns for path in output.glob("0*.safetensors")}
    job = work(mended, output)
    assert not job.begin(retry=True)
    with pytest.raises(InputError, match="another run is at work"):
        work(mended, output).begin(retry=True)
    with pytest.raises(InputError, match="is unfinished"):
        LatentShards(output)
    assert job.pending() == [0, 2, 3]
    assert [clip.file for clip in job.clips_to_encode(job.pending())] == list(BAD)
    assert job.bytes_of([0]) < 0.6 * work(mended, tmp_path / "new").bytes_of([0])
    job.encode(job.pending())
    job.finish()
    job.held.close()
    assert job.encoded["videos"] == 3
    assert made(output) == made(mended / "whole")
    again = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert again == {"00000", "00003"}


def test_nothing_new_changes_nothing(here, tmp_path, capsys):
    shutil.copytree(here / "whole", tmp_path / "out")
    assert run(here, tmp_path / "out", "--retry") == 0
    assert "skipped: 4 of 13 clips" in capsys.readouterr().out
    assert made(tmp_path / "out") == made(here / "whole")
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join((here / "captions.jsonl").read_text().splitlines()[:1]))
    assert run(here, tmp_path / "good", f"--captions={captions}") == 0
    before = made(tmp_path / "good")
    assert run(here, tmp_path / "good", f"--captions={captions}", "--retry") == 0
    assert "is finished already" in capsys.readouterr().out
    assert made(tmp_path / "good") == before


@pytest.mark.parametrize("after", [0, 4, 7, 8, 10, 13, 14, 16, 17])
def test_stopped_while_it_tries_again_it_goes_on(here, mended, tmp_path, monkeypatch, after):
    """The 7 records, the manifest, 3 prompts, 2 shards of 3 files, one record, what is skipped, the manifest."""
    shutil.copytree(here / "whole", tmp_path / "out")
    replace, count = os.replace, []

    def stop(source, target):
        count.append(target)
        if len(count) > after:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(prepare.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        finish(mended, tmp_path / "out", retry=True)
    monkeypatch.setattr(prepare.os, "replace", replace)
    assert after > 7 or LatentShards(tmp_path / "out")  # still finished, as it was
    finish(mended, tmp_path / "out", retry=after < 8)
    assert made(tmp_path / "out") == made(mended / "whole")


@pytest.mark.parametrize("after", range(11, 22))
def test_clips_whose_videos_are_gone_stay_wherever_it_is_stopped(here, mended, tmp_path, monkeypatch, after):
    """Somebody has removed what was encoded, and kept what was skipped; it is stopped, and soon again."""
    (tmp_path / "videos").mkdir()
    for name in ("wan", "captions.jsonl"):
        (tmp_path / name).symlink_to(here / name)
    for name in BAD:
        shutil.copy(mended / "videos" / name, tmp_path / "videos" / name)
    shutil.copytree(here / "whole", tmp_path / "out")
    replace, left = os.replace, []

    def stop(source, target):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        replace(source, target)

    for writes in (after, 2):
        monkeypatch.setattr(prepare.os, "replace", stop)
        left[:] = range(writes)
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path, tmp_path / "out", retry=writes == after)
    monkeypatch.setattr(prepare.os, "replace", replace)
    finish(tmp_path, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert shards_in(tmp_path / "out") == shards_in(mended / "whole")


def shards_in(folder):
    """What is in a prepared folder, but for the manifest: it has the name of the model."""
    return {name: data for name, data in made(folder).items() if name != "manifest.json"}


def test_a_disk_that_fails_while_it_tries_again_costs_no_clip(here, mended, tmp_path, monkeypatch):
    shutil.copytree(here / "whole", tmp_path / "out")

    def fail(path):
        raise OSError(5, "Input/output error")

    job = work(mended, tmp_path / "out")
    job._note(0, {"rows": 1, "skipped": [], "again": True})
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Path, "read_bytes", fail)
        with pytest.raises(
            InputError, match=r"00000\.safetensors cannot be read \(Input/output error\); mend the disk"
        ):
            job._made_before(0)
    assert made(here / "whole").items() <= made(tmp_path / "out").items()


def test_a_shard_that_is_broken_is_encoded_anew_when_it_is_made_again(here, mended, tmp_path):
    shutil.copytree(here / "whole", tmp_path / "out")
    flip(tmp_path / "out/00000.safetensors")
    (tmp_path / "out/00003.safetensors").unlink()
    assert finish(mended, tmp_path / "out", retry=True).encoded["videos"] == 3 + 2
    assert made(tmp_path / "out") == made(mended / "whole")


@pytest.mark.parametrize("how", ["gone", "cut", "captions"])
def test_a_shard_that_was_lost_is_made_again_where_nothing_was_skipped(here, tmp_path, how):
    lines = (here / "captions.jsonl").read_text().splitlines()
    (tmp_path / "captions.jsonl").write_text("\n".join(line for line in lines if not any(bad in line for bad in BAD)))
    for name in ("wan", "videos"):
        (tmp_path / name).symlink_to(here / name)
    finish(tmp_path, tmp_path / "out")
    whole = made(tmp_path / "out")
    path = tmp_path / "out" / ("00001.jsonl" if how == "captions" else "00001.safetensors")
    path.unlink() if how == "gone" else os.truncate(path, 9)
    assert finish(tmp_path, tmp_path / "out").encoded["videos"] == 0  # only when asked
    if how == "captions":  # which hold nothing that is not known: the videos may be gone
        (tmp_path / "videos").unlink()
        (tmp_path / "videos").mkdir()
    assert finish(tmp_path, tmp_path / "out", retry=True).encoded["videos"] == (0 if how == "captions" else SIZE)
    assert made(tmp_path / "out") == whole
    assert finish(tmp_path, tmp_path / "out", retry=True).encoded == {"texts": 0, "videos": 0}


def test_a_list_of_what_was_skipped_that_is_not_the_one_written_is_refused(here, mended, tmp_path):
    shutil.copytree(here / "whole", tmp_path / "out")
    flip(tmp_path / "out/skipped.jsonl")
    before = made(tmp_path / "out")
    with pytest.raises(InputError, match=r"skipped\.jsonl is not what manifest\.json lists; .*: put it back"):
        finish(mended, tmp_path / "out", retry=True)
    assert {name: made(tmp_path / "out")[name] for name in before} == before


def test_what_is_missing_on_the_command_line_is_said(tmp_path, script):
    with pytest.raises(InputError, match=r"--videos is missing; expected --videos FOLDER --captions FILE, or --verify"):
        script.main([f"--output={tmp_path}"])
    with pytest.raises(InputError, match=r"no manifest\.json in .*; expected a folder that prepare_latents\.py made"):
        script.main([f"--output={tmp_path}", "--verify"])


def test_options_of_the_script_are_those_of_the_library(script, monkeypatch):
    """Every default is Wan's."""
    monkeypatch.setattr(script, "prepare", lambda arguments: arguments)
    given = script.main(["--videos=a", "--captions=b", "--output=c"])
    assert {name: getattr(given, name) for name in TINY} | {} == {name: getattr(Options(), name) for name in TINY}
    assert dataclasses.asdict(Options()) == {name: getattr(given, name) for name in dataclasses.asdict(Options())}
    assert (given.skip, given.retry) == (prepare.SKIP, False)
    assert given.base == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_digests_are_those_of_the_files(here):
    manifest = json.loads((here / "whole/manifest.json").read_text())
    for name, entry in manifest["shards"].items():
        data = (here / f"whole/{name}.safetensors").read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
