"""A thousand hostile inputs, the same in every run: each is read, or refused in one line; none ends in a traceback."""

import copy
import json
import random
import shutil
import traceback
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from minianyflow.support.errors import InputError
from minianyflow.wan.config import OPTIONS, as_yaml, load_config
from minianyflow.wan.data.captions import read_captions
from minianyflow.wan.data.latents import LatentSet, verify
from minianyflow.wan.evaluate import labelled
from minianyflow.wan.folders import load_parts, load_transformer
from minianyflow.wan.run import read_run
from minianyflow.wan.sources import identify, read_prompts
from tests.wan.test_odd_inputs import EXPORTED, RUN

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
    path = folder / draw.choice(["c.csv", "c.jsonl"])
    path.write_bytes(spoiled_bytes(draw, rows))
    draw.choice([read_captions, lambda file: read_prompts(None, file)])(path)


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


@pytest.mark.long
def test_a_thousand_hostile_inputs(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kinds = [(captions, 200), (configuration, 250), (shard, 120), (manifest, 120), (run_folder, 90), (exported, 60)]
    kinds += [(pipeline, 90), (path, 70)]
    faults, done = [], 0
    for kind, count in kinds:
        for seed in range(count):
            more = (tiny,) if kind in (shard, manifest, pipeline) else ()
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
    assert done == 1000
    assert not faults, "\n".join([f"{len(faults)} of {done}:", *faults])
