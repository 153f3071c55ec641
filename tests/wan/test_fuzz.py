"""Hostile inputs and places, the same in every run: each is read, or refused in one line; none ends in a traceback."""

import codecs
import contextlib
import copy
import io
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import parquet

from minianyflow.support.cli import command, run
from minianyflow.support.errors import InputError
from minianyflow.wan.commands import distill, evaluate, export, make_tiny_wan, sample
from minianyflow.wan.config import OPTIONS, as_yaml, load_config
from minianyflow.wan.data.captions import read_captions
from minianyflow.wan.data.commands import prepare_latents
from minianyflow.wan.data.latents import LatentSet, verify
from minianyflow.wan.data.options import Options
from minianyflow.wan.data.parquet import convert_parquet
from minianyflow.wan.data.read_video import measure_clip, read_clip, read_video
from minianyflow.wan.evaluate import labelled
from minianyflow.wan.folders import load_parts, load_transformer
from minianyflow.wan.run import read_run
from minianyflow.wan.sources import identify, read_prompts
from tests.wan.test_odd_inputs import BARS, CLEAR, EXPORTED, RUN, VP8, make
from toy_data import plane

DEEP = 10**5 * "["
NASTY = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "é" * 300,
    "../..",
    "${a}",
    "a: b",
]
NASTY += [[], {}, [[]], {"": None}, [1, "2"], {"a": {"b": [0]}}, "\ud83d", "\u2028\r\n", "1e5", 2**63, [None] * 5]
TEXTS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"[",
    b'"',
    b"'",
    b",",
    b"\n",
    b"\r",
    b": ",
    b"- ",
    b"&a *a",
    b"!!x",
]
TEXTS += [
    b"{}",
    b"%",
    b"\xe2\x80\xa8",
    b"-",
    b"9" * 5000,
    b"@",
    b"`",
    b"|",
    b">",
    b"#",
    b"${",
    b"=",
    DEEP.encode(),
    b"NaN",
]


def spoiled_bytes(draw, data):
    """Cut, turned over, repeated, or with something nasty inside."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        place = draw.randint(0, len(data))
        match draw.randrange(5):
            case 0:
                del data[place:]
            case 1 if data:
                data[place - 1] = draw.randrange(256)
            case 2:
                del data[place : place + draw.randint(1, 40)]
            case 3:
                data[place:place] = data[:place][-draw.randint(1, 40) :]
            case _:
                data[place:place] = draw.choice(TEXTS)
    return bytes(data)


def spoiled_json(draw, data):
    """A value or a name is another, or missing; now and then the text itself is spoiled."""
    if draw.random() < 0.2:
        return spoiled_bytes(draw, data)
    content = json.loads(data)
    for _ in range(draw.randint(1, 2)):
        place = content
        while (
            place
            and (
                inner := [
                    v
                    for v in (place.values() if isinstance(place, dict) else place)
                    if isinstance(v, dict | list) and v
                ]
            )
            and draw.random() < 0.6
        ):
            place = draw.choice(inner)
        if not place:
            continue
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if draw.random() < 0.2:
            del place[key]
        else:
            place[key] = copy.deepcopy(draw.choice(NASTY))
    return json.dumps(draw.choice(NASTY) if draw.random() < 0.05 else content).encode()


def spoiled_safetensors(draw, data):
    """Bytes anywhere, or the header alone, with its length."""
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.4:
        return spoiled_bytes(draw, data)
    header = spoiled_json(draw, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def spoiled_pair(draw):
    """An option of the command line."""
    value = draw.choice(
        [json.dumps(draw.choice(NASTY)), spoiled_bytes(draw, b"[1, 'a b', {c: d}]").decode(errors="replace")]
    )
    return f"{draw.choice([*OPTIONS, 'guidance', 'x', '', 'a.b.c'])}={value}"


def captions(draw, folder):
    rows = (
        b'file,caption\na.mp4,"one, two"\nb/c.mp4,three\n'
        if draw.random() < 0.5
        else b'{"file": "a.mp4", "caption": "x"}\n' * 2
    )
    path = folder / draw.choice(["c.csv", "c.jsonl", "p.txt"])
    path.write_bytes(spoiled_bytes(draw, rows))
    read_prompts(None, path) if path.suffix == ".txt" else read_captions(path)


def configuration(draw, folder):
    if draw.random() < 0.5:
        return load_config(
            draw.choice([[], ["wan-1.3b", "causal", "forward"], [spoiled_pair(draw)]]), [spoiled_pair(draw)]
        )
    (folder / "c.yaml").write_bytes(spoiled_bytes(draw, as_yaml(load_config()).encode()))
    return load_config([folder / "c.yaml"])


def shard(draw, folder, tiny):
    data = folder / "latents"
    if not data.exists():
        shutil.copytree(tiny / "latents", data)
    number, null = draw.randrange(16), draw.random() < 0.3
    name = "null.safetensors" if null else f"00000/{number:08}.safetensors"
    (data / name).write_bytes(spoiled_safetensors(draw, (tiny / "latents" / name).read_bytes()))
    try:
        LatentSet(data).rows([number])
        verify(data)
    finally:
        shutil.copy(tiny / "latents" / name, data / name)


def manifest(draw, folder, tiny):
    data = folder / "manifest"
    if not data.exists():
        shutil.copytree(tiny / "latents", data)
    (data / "manifest.json").write_bytes(spoiled_json(draw, (tiny / "latents/manifest.json").read_bytes()))
    LatentSet(data).draw(3, 4)


def run_folder(draw, folder):
    (folder / "run.json").write_bytes(spoiled_json(draw, json.dumps(RUN).encode()))
    (folder / "config.yaml").write_text(as_yaml(load_config()), encoding="utf-8")
    if draw.random() < 0.3:
        given = yaml.safe_load(as_yaml(load_config()))
        (folder / "config.yaml").write_bytes(spoiled_json(draw, json.dumps(given).encode()))
    read_run(folder)
    identify(str(folder))


def exported(draw, folder):
    place = folder / "exported"
    place.mkdir(exist_ok=True)
    (place / "minianyflow.json").write_bytes(spoiled_json(draw, json.dumps(EXPORTED).encode()))
    identify(str(place))


def pipeline(draw, folder, tiny):
    place = folder / "wan"
    if not place.exists():
        shutil.copytree(tiny, place, ignore=shutil.ignore_patterns("latents"))
    files = ["model_index.json", "vae/config.json", "transformer/config.json", "scheduler/scheduler_config.json"]
    files += ["text_encoder/config.json", "tokenizer/tokenizer_config.json", "vae/diffusion_pytorch_model.safetensors"]
    name = draw.choice(files)
    spoil = spoiled_safetensors if name.endswith("s") else spoiled_json
    (place / name).write_bytes(spoil(draw, (tiny / name).read_bytes()))
    try:
        identify(str(place))
        part = name.partition("/")[0]
        load_parts(place, part) if part in ("vae", "scheduler", "text_encoder", "tokenizer") else load_transformer(
            place, "bidirectional"
        )
    finally:
        shutil.copy(tiny / name, place / name)


KINDS = {"a.mp4": (), "b.mkv": (), "c.webm": VP8, "d.avi": (), "e.gif": (), "f.ts": (), "g.mov": ("-c:v", "png")}
KINDS |= {"h.mp4": ("-movflags", "frag_keyframe"), "i.y4m": ("-pix_fmt", "yuv420p"), "j.png": ()}


def video(draw, folder):
    name = draw.choice([*KINDS])
    if not (whole := folder / f"whole-{name}").exists():
        source = CLEAR if name == "g.mov" else BARS
        if name == "j.png":
            Image.new("RGBA", (64, 48), (9, 200, 30, 90)).save(whole)
        else:
            make(whole, source, "-frames:v", 8, *KINDS[name])
    (path := folder / draw.choice([name, f"x{draw.choice([*KINDS])}"])).write_bytes(
        whole.read_bytes() if draw.random() < 0.1 else spoiled_bytes(draw, whole.read_bytes())
    )
    action = draw.choice([read_clip, read_video, lambda path, frames, *size: measure_clip(path, frames)])
    action(path, draw.choice([1, 5]), 16, 32)


def points(draw, folder):
    file = folder / draw.choice(["p.csv", "p.txt", "p.png"])
    if file.suffix == ".png":
        Image.new("RGBA", (9, 6), (9, 200, 30, 90)).save(file)
    else:
        table = "x,y\n" + "".join(f"{k % 7}.5,{k * k % 11}.25\n" for k in range(20))
        file.write_text(table.replace(",", draw.choice(",;\t ")))
    file.write_bytes(spoiled_bytes(draw, file.read_bytes()))
    plane.target(file)


def parquets(draw, folder, tiny):
    source, row = folder / f"parquet-{draw.random()}", {"caption": "x"}
    source.mkdir()
    for name, shape in (("vae_latent", [16, 1, 2, 2]), ("text_embedding", [3, 32])):
        row[f"{name}_bytes"], row[f"{name}_shape"] = bytes(4 * math.prod(shape)), shape
        row[f"{name}_dtype"] = "float32"
    if draw.random() < 0.5:
        row[draw.choice([*row])] = draw.choice([None, -1, 1.5, "x", "", b"x", [2], [-1] * 4, [2**40] * 4, [], "nn"])
    parquet.write_table(pyarrow.Table.from_pylist([row] * draw.choice([0, 1, 2])), source / "a.parquet")
    if draw.random() < 0.4:
        (source / "a.parquet").write_bytes(spoiled_bytes(draw, (source / "a.parquet").read_bytes()))
    convert_parquet(source, str(tiny), source / "out", Options(length=32))


NUMBERS = ["", "-1", "0", "nan", "inf", "1e400", "9" * 5000, "1e9", "0x10", "1_000", "a", "é" * 300, "../..", "\udcff"]
NUMBERS += [
    str(2**63),
    "--",
    "-",
    "1e-320",
    "1,2",
    "2.5",
    "17",
    "a\nb",
    "~/x",
    "/dev/null",
    "/proc/self/mem",
    "1 2",
    "*",
]
COMMANDS = {  # what follows each, of the folder of the tiny Wan; the options of which one is spoiled
    "plan": ("--config causal forward tiny data={0}/latents", "gpu gpus memory rate price share frames height"),
    "sample": ("{0} --prompt x --steps 1 --length 32", "prompts steps image context stream base seed length width"),
    "evaluate": ("{0} --prompts p.txt", "steps data videos batch guidance negative seed frames"),
    "export": ("{0} out", "role dtype layout push"),
    "prepare-latents": ("--videos {0} --captions c.csv --base {0} --output o", "parquet bucket fps length limit skip"),
    "distill": ("--config bidirectional forward tiny base={0} data={0} output=o", "minutes config"),
    "demo": ("--output o", "data dataset evaluations seeds workers"),
    "gpu-check": ("--sizes tiny --device cpu --output o", "steps batch set architectures frames height width"),
    "live-html": ("--scene race", "scene output"),
    "live": ("--no-browser", "scene output"),
    "site": ("--quiet", "output"),
    "course": ("--compare --figures f", "only figures"),
    "docs": ("--check", "check"),
    "video": ("--output o", "nfe workers weights"),
    "exposure": ("--output o", "seeds workers"),
    "weights": ("--output o", "workers"),
    "make-tiny-wan": ("tiny", "seed"),
}


def arguments(draw, folder, tiny):
    name = draw.choice([*COMMANDS])
    given, options = COMMANDS[name]
    argv = [*given.format(tiny).split(), f"--{draw.choice(options.split())}={draw.choice(NUMBERS)}"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command(name)(argv)


def path(draw, folder):
    text = draw.choice(
        [
            *NASTY[9:16],
            "\ud83d",
            "a/b/c",
            "~",
            "x" * 5000,
            "/",
            ".",
            "/dev/null",
            "/proc/self/mem",
            "//",
            "con:",
            "a\nb",
        ]
    )
    action = draw.choice(
        [identify, read_run, LatentSet, read_captions, lambda name: labelled([name, "."]), load_transformer_of]
    )
    action(text if draw.random() < 0.5 else f"{folder}/{text}")


def place(problem):
    """Where it was raised."""
    return " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(problem.__traceback__)[:-4:-1]
    )


def load_transformer_of(name):
    load_transformer(name, "causal")


def begun(*given, **options):
    raise InputError("the work began")


@pytest.mark.long
def test_a_thousand_hostile_inputs(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kinds = [(captions, 200), (configuration, 250), (shard, 120), (manifest, 120), (run_folder, 90), (exported, 60)]
    kinds += [(pipeline, 90), (path, 70), (video, 200), (points, 150), (parquets, 100), (arguments, 300)]
    embedded = torch.zeros(1, 32, 32)
    monkeypatch.setattr("minianyflow.wan.data.parquet.embed", lambda *given: embedded)
    works = ["wan.sample.embed", "wan.stream.embed", "wan.evaluate.Samples", "planner.gpu_check.measure"]
    works += ["plane.race.run_jobs", "plane.exposure.run_jobs", "video.report.run_jobs", "video.stages.run_jobs"]
    works += ["live.pages.page_text", "wan.folders.moving_shapes"]
    for work in (*(f"minianyflow.{work}" for work in works), "docs.site.write_pages", "docs.course.execute"):
        monkeypatch.setattr(work, begun)  # what is long, and begins where all was taken
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text("file,caption\na.mp4,x\n")
    Path("p.txt").write_text("a red square\n")
    faults, done = [], 0
    for kind, count in kinds:
        for seed in range(count):
            more = (tiny,) if kind in (shard, manifest, pipeline, parquets, arguments) else ()
            try:
                kind(random.Random(seed), tmp_path, *more)
            except InputError as problem:
                if "\n" in str(problem):
                    faults.append(f"{kind.__name__} {seed}: more than one line: {problem!r}")
            except OSError:
                pass  # which the command line says in a line
            except BaseException as problem:  # a panic of a library in Rust is no Exception
                faults.append(
                    f"{kind.__name__} {seed}: {type(problem).__name__}: {str(problem)[:150]!r} {place(problem)}"
                )
            done += 1
    assert done == 1750
    assert not faults, "\n".join([f"{len(faults)} of {done}:", *faults])


# Places: every command, where its output cannot be written, its input cannot be read, or nobody reads what it prints

SIZE = ["--frames=9", "--height=32", "--width=48", "--length=32", "--device=cpu"]
TINY = ["--config", "bidirectional", "forward", "tiny", "steps=2", "log.tracker=none", "samples.every=0"]
PARTS = {"base": "", "videos": "/videos", "captions": "/captions.jsonl"}
WORKS = {  # of the folder of inputs and of the output
    "make-tiny-wan": lambda here, out: make_tiny_wan([out]),
    "prepare": lambda here, out: prepare_latents(
        [*(f"--{name}={here}/wan{end}" for name, end in PARTS.items()), *SIZE, f"--output={out}"]
    ),
    "distill": lambda here, out: distill([*TINY, f"base={here}/wan", f"data={here}/wan/latents", f"output={out}"]),
    "sample": lambda here, out: sample([f"{here}/run", "--prompt", "x", "--steps", "1", f"--output={out}"]),
    "stream": lambda here, out: sample(
        [f"{here}/causal", "--prompt", "x", "--steps", "1", "--stream=1", f"--output={out}"]
    ),
    "export": lambda here, out: export([f"{here}/run", out]),
    "export --lora": lambda here, out: export([f"{here}/run", out, "--lora"]),
    "evaluate": lambda here, out: evaluate(
        [f"{here}/run", f"--prompts={here}/p.txt", "--steps", "1", "2", "--videos=1", f"--output={out}"]
    ),
}


def forked(action, before=lambda: None):
    """(exit status, what it wrote to stderr) of a command in a process of its own; before() is called in it first."""
    reading, writing = os.pipe()
    if not (number := os.fork()):
        status = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = map(partial(open, mode="w", closefd=False), (1, 2))  # not those of the tests
            before()
            status = run(action)
            sys.stderr.flush()
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), said


def full():
    """No file grows beyond a kilobyte: the system itself refuses more, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def nobody():
    """Another user, as far as this one may become one."""
    codecs.lookup("utf-8-sig")  # loaded while this Python itself may be read
    if os.geteuid() == 0:
        os.setuid(65534)


PLACES = {  # what happens in the process; whether it must be refused
    "a full disk": (full, True),
    "a file in the way": (lambda: None, True),
    "below a file": (lambda: None, True),
    "of another user": (nobody, True),
    "unreadable inputs": (nobody, True),
    "stdout is full": (lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1), False),
    "stdout is closed": (lambda: os.close(1), False),
    "stdout is a closed pipe": (lambda: os.dup2(closed_pipe(), 1), False),
}


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A tiny Wan, a run of each architecture and a file of prompts, in a folder that others may read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    made = [lambda: make_tiny_wan([f"{folder}/wan"]), lambda: WORKS["distill"](folder, f"{folder}/run")]
    causal = [*TINY, "causal.bidirectional=0.5", f"base={folder}/wan", f"data={folder}/wan/latents"]
    causal[1] = "causal"
    made += [lambda: distill([*causal, f"output={folder}/causal"])]
    for action in made:
        assert forked(action)[0] == 0
    (folder / "p.txt").write_text("a red square\n")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("work", WORKS)
def test_every_command_in_every_place(here, work, where):
    before, refused = PLACES[where]
    with tempfile.TemporaryDirectory(dir=here) as place:
        place, inputs = Path(place), here
        place.chmod(0o777 if where == "unreadable inputs" else 0o755)
        out = place / "out"
        if where in ("a file in the way", "below a file"):
            out.write_text("mine")
        if where == "unreadable inputs":
            (inputs := place / "inputs").mkdir(mode=0o700)
            for path in here.iterdir():
                (inputs / path.name).symlink_to(path) if path.name != place.name else None
        if work == "make-tiny-wan" and where == "unreadable inputs":
            return  # it has none
        target = out / "in" if where == "below a file" else out
        status, said = forked(lambda: WORKS[work](inputs, str(target)), before)
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert "Traceback" not in said
        assert "not foreseen" not in said
        assert status in ((2,) if refused else (0, 2, 141)), said
        assert len(errors) == (status == 2), said
        assert not list(place.rglob(".unfinished-*"))
        if where in ("a file in the way", "below a file"):
            assert out.read_text() == "mine"
