"""Odd files that people have: each is read as it is meant, or refused in one line; nothing is wrong in silence."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minianyflow.networks.pipelines import load_lora
from minianyflow.networks.weights import fingerprint, load_codec, read_weights
from minianyflow.planner.plan import shape_of
from minianyflow.video.stages import WEIGHTS, path_of
from minianyflow.wan.config import as_yaml, find_device, load_config
from minianyflow.wan.data.captions import Clip, read_captions
from minianyflow.wan.data.latents import read_file, read_manifest, verify, write_latents
from minianyflow.wan.data.options import Options
from minianyflow.wan.data.parquet import convert_parquet
from minianyflow.wan.data.prepare import Preparation, model_identity
from minianyflow.wan.data.read_video import measure_clip, read_clip, read_frames, read_video
from minianyflow.wan.data.write_video import write_clip
from minianyflow.wan.folders import decode_latents, encode_prompts, load_parts, load_transformer
from minianyflow.wan.run import read_run
from minianyflow.wan.samples import Samples
from minianyflow.wan.sources import identify, read_prompts
from minianyflow.wan.stages import distil
from tests.refused import refused
from toy_data import plane

GREY = "nullsrc=size=64x64:rate={}:duration={},geq=lum='20+N*3':cb=128:cr=128,format=yuv420p"
LOSSLESS, VP8 = ("-c:v", "libx264", "-qp", "0"), ("-c:v", "libvpx", "-b:v", "8M")
BARS = "testsrc2=size=128x96:rate=16:duration=0.5,format=yuv420p"
CLEAR = (
    "color=red@0.0:size=64x64:rate=16:duration=0.5,format=rgba,drawbox=x=20:y=20:w=24:h=24:c=lime@1:t=fill:replace=1"
)


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def make(path, source, *options):
    ffmpeg("-f", "lavfi", "-i", source, *options, path)
    return path


def numbers(path, frames=13):
    """Which frames of GREY were read."""
    light = read_frames(path, frames, 64, 64).float().mean((1, 2, 3))
    return ((light * 219 / 255 - 4) / 3).round().int().tolist()


@pytest.mark.parametrize(("rate", "step"), [(16, 1), (32, 2), (48, 3)])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "remuxed.mp4"])
def test_frames_are_those_shown_whatever_the_container_rounds_times_to(tmp_path, rate, step, kind):
    path = make(
        tmp_path / f"a.{kind.replace('remuxed.mp4', 'mkv')}",
        GREY.format(rate, 1),
        *(VP8 if kind == "webm" else LOSSLESS),
    )
    if kind == "remuxed.mp4":
        ffmpeg("-i", path, "-c", "copy", tmp_path / kind)
        path = tmp_path / kind
    assert numbers(path) == [step * k for k in range(13)]
    assert read_clip(path, 13, 64, 64)[1] == {}


def test_a_gif_at_16_frames_a_second_is_read_frame_by_frame(tmp_path):
    shades = [Image.fromarray(np.full((64, 64), 20 + 12 * k, np.uint8)) for k in range(13)]
    times = [10 * (round(6.25 * (k + 1)) - round(6.25 * k)) for k in range(13)]  # of hundredths of a second
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:], duration=times)
    light = read_frames(tmp_path / "a.gif", 13, 64, 64).float().mean((1, 2, 3))
    assert ((light - 20) / 12).round().int().tolist() == list(range(13))


def test_a_late_start_an_edit_list_and_a_variable_rate(tmp_path):
    path = make(tmp_path / "a.mp4", GREY.format(16, 1), *LOSSLESS)
    ffmpeg("-itsoffset", 2, "-i", path, "-f", "lavfi", "-i", "sine=duration=3", "-c:v", "copy", tmp_path / "late.mp4")
    assert numbers(tmp_path / "late.mp4") == list(range(13))
    ffmpeg("-ss", 0.125, "-i", path, "-c", "copy", tmp_path / "edited.mp4")  # an edit list hides two frames
    assert numbers(tmp_path / "edited.mp4") == list(range(2, 15))
    ffmpeg("-i", path, "-vf", "select='not(between(n,3,5))'", "-fps_mode", "vfr", *LOSSLESS, tmp_path / "gap.mkv")
    assert numbers(tmp_path / "gap.mkv") == [0, 1, 2, 2, 2, 2, *range(6, 13)]
    assert read_clip(tmp_path / "gap.mkv", 13, 64, 64)[1] == {"repeated": 3}


def test_what_ffmpeg_would_read_wrong_in_silence_is_skipped_with_the_reason(tmp_path):
    parts = [make(tmp_path / f"{side}.ts", f"testsrc2=size={side}x{side}:rate=16:duration=0.5") for side in (64, 96)]
    (tmp_path / "sizes.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    make(tmp_path / "raw.h264", GREY.format(16, 1))
    make(tmp_path / "raw.mjpeg", GREY.format(16, 1))
    for k in range(9):
        Image.new("L", (64, 64), 9 * k).save(tmp_path / f"a{k}.png")
    Image.new("L", (64, 64)).save(tmp_path / "a%d.png")
    spoiled = bytearray(make(tmp_path / "damaged.mp4", "testsrc2=size=128x96:rate=16", "-frames:v", 20).read_bytes())
    place = spoiled.index(b"mdat") + 2000
    spoiled[place : place + 200] = random.Random(0).randbytes(200)
    (tmp_path / "damaged.mp4").write_bytes(spoiled)
    reasons = {"sizes.ts": "changes its size", "raw.h264": "no times", "raw.mjpeg": "no times"}
    (tmp_path / "notes.txt").write_text("hello\n" * 500)
    make(tmp_path / "a.mp4", GREY.format(16, 1))
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\na.mp4\n#EXT-X-ENDLIST\n")
    reasons |= {"notes.txt": "is a text", "a.m3u8": "a list of files"}
    reasons |= {"a%d.png": "rename it without %", "damaged.mp4": "is damaged"}
    for name, reason in reasons.items():
        with refused(reason):
            read_clip(tmp_path / name, 5 if name == "a%d.png" else 13, 64, 64)


@pytest.mark.parametrize(("transfer", "name"), [("arib-std-b67", "HLG"), ("smpte2084", "PQ"), ("bt709", "BT.2020")])
def test_hdr_and_wide_colours_become_bt709(tmp_path, transfer, name, monkeypatch):
    monkeypatch.setenv("AV_LOG_FORCE_COLOR", "1")  # of ffmpeg's words, from which colours are read
    tagged = BARS + ",setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
    wide = f"zscale=t=linear:npl=203,format=gbrpf32le,zscale=t={transfer}:p=bt2020:m=bt2020nc:r=tv:npl=203"
    wide += ",format=yuv444p10le"
    x265 = f"log-level=error:lossless=1:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    expected = read_frames(make(tmp_path / "sdr.mp4", tagged, *LOSSLESS), 1, 96, 128)
    found, changes = read_clip(
        make(tmp_path / "hdr.mp4", f"{tagged},{wide}", "-c:v", "libx265", "-x265-params", x265), 1, 96, 128
    )
    assert changes == {"colours": name}
    assert float((found.float() - expected.float()).abs().mean()) < 12  # what is brightest is compressed


@pytest.mark.parametrize("tagged", [True, False], ids=["", "without a matrix"])
@pytest.mark.parametrize(
    ("primaries", "colour"), [("smpte432", "903020"), ("smpte432", "ffffff"), ("smpte431", "903020")]
)
def test_p3_becomes_bt709(tmp_path, primaries, tagged, colour):
    source = (
        f"color=0x{colour}:size=64x64:rate=16:duration=0.2,format=gbrp,setparams=color_primaries=bt709:color_trc=bt709"
    )
    source += f":colorspace=gbr:range=pc,zscale=p={primaries}:t=bt709:m=bt709:r=tv,format=yuv444p"
    tags = ("-color_primaries", primaries, "-color_trc", "bt709", *("-colorspace", "bt709") * tagged)
    source += ",setparams=colorspace=unknown" * (not tagged)
    frames, changes = read_clip(make(tmp_path / "a.mp4", source, *LOSSLESS, *tags), 1, 64, 64)
    assert changes == {"colours": "P3"}
    assert (frames[0, 5, 5].int() - torch.tensor([*bytes.fromhex(colour)])).abs().max() <= 4


P3 = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]  # as PCS XYZ


def colour_profile(colorants, gamma=2.2):
    """The bytes of an ICC profile."""
    fixed = lambda *values: struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))  # noqa: E731
    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(256 * gamma))
    tags = {"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x" + bytes(75), "cprt": b"text\0\0\0\0x\0\0\0"}
    tags |= {name: b"XYZ " + bytes(4) + fixed(*xyz) for name, xyz in zip(("rXYZ", "gXYZ", "bXYZ"), colorants, strict=1)}
    tags |= {"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249), "rTRC": curve, "gTRC": curve, "bTRC": curve}
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name.encode() + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + data


PROFILED = ["RGB png", "RGBA png", "P png", "L png", "RGB jpg", "L jpg", "RGB webp", "RGBA webp"]


@pytest.mark.parametrize("kind", PROFILED)
def test_a_picture_with_a_colour_profile_becomes_srgb(tmp_path, kind):
    mode, end = kind.split()
    picture, expected = Image.new("RGB", (16, 16), (144, 48, 32)), [158.0, 32, 12]  # by lcms: P3's red is redder
    if mode == "L":
        expected = [float(picture.convert("L").getpixel((0, 0)))] * 3
    picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
    path, profile = tmp_path / f"a.{end}", colour_profile(P3)
    picture.save(path, icc_profile=profile, quality=100, **({"lossless": True} if end == "webp" else {}))
    found = (255 * read_video(path, 1, 16, 16)[0, 0, :, 8, 8]).round()
    assert (found - torch.tensor(expected)).abs().max() <= 3
    frames, changes = read_clip(path, 1, 16, 16)
    assert torch.equal(frames[0, 8, 8].float(), found)
    assert changes == {"colours": "x"}  # the profile's name
    picture.save(path, icc_profile=profile[:-200], quality=100)
    for read in (read_video, read_clip):
        with refused("cannot be read .its colour profile: .*; save it as sRGB"):
            read(path, 1, 16, 16)


@pytest.mark.parametrize(
    ("tags", "size", "matrix"), [("", "64x64", "bt601"), ("", "1280x720", "bt709"), ("pc", "64x64", "bt601")]
)
def test_untagged_and_full_range_colours(tmp_path, tags, size, matrix):
    source = f"color=0xD02040:size={size}:rate=16:duration=0.2,format=gbrp"
    source += f",scale=out_color_matrix={matrix}:out_range={tags or 'tv'}"
    path = make(
        tmp_path / "a.mp4", source + ",format=yuv444p", "-bsf:v", "h264_metadata=matrix_coefficients=2", *LOSSLESS
    )
    pixel = read_frames(path, 1, 32, 32)[0, 16, 16].int().tolist()
    assert max(abs(a - b) for a, b in zip(pixel, (0xD0, 0x20, 0x40), strict=True)) <= 4


@pytest.mark.parametrize("size", [(480, 832), (720, 1280)])
def test_what_we_write_keeps_its_colours(tmp_path, size):
    colour = torch.tensor([208, 32, 64])
    write_clip(tmp_path / "a.mp4", colour.view(1, 3, 1, 1).expand(2, 3, *size) / 255)
    assert (read_frames(tmp_path / "a.mp4", 1, *size)[0, 100, 100].int() - colour).abs().max() <= 4


def test_pixels_become_square_and_odd_sizes_fit(tmp_path):
    disc = "color=black:size=64x96:rate=16:duration=0.2,format=gray"
    disc += ",geq=lum='255*lt(hypot(2*(X-31.5),Y-47.5),40)',setsar=2/1"
    frame = read_frames(make(tmp_path / "wide.mkv", disc, *LOSSLESS), 1, 96, 128)[0, ..., 0] > 128  # shown as 128 x 96
    assert abs(int(frame[48].sum()) - int(frame[:, 64].sum())) <= 2
    odd = make(tmp_path / "odd.mkv", "testsrc2=size=67x51:rate=16:duration=0.2,format=yuv444p", *LOSSLESS)
    assert read_frames(odd, 1, 48, 48).shape == (1, 48, 48, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mov", ("-c:v", "png")),
        ("b.mov", ("-c:v", "prores_ks", "-profile:v", 4444, "-pix_fmt", "yuva444p10le")),
        ("a.webm", ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p")),
        ("b.webm", ("-c:v", "libvpx", "-auto-alt-ref", 0, "-pix_fmt", "yuva420p")),
    ],
)
def test_transparency_lies_over_black(tmp_path, name, options):
    frames, changes = read_clip(make(tmp_path / name, CLEAR, *options), 1, 64, 64)
    assert "transparent" in changes
    assert int(frames[0, 2, 2].max()) < 6
    assert (frames[0, 32, 32].int() - torch.tensor([0, 255, 0])).abs().max() < 6
    Image.fromarray(np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)).save(tmp_path / "clear.png")
    assert float(read_video(tmp_path / "clear.png", 1, 16, 16).max()) == 0


# Captions and prompts

ROWS = {
    "comma": ("a.mp4,a ball, moving\n", "line 2 of .*c.csv has more fields than columns"),
    "comma at the end": ("a.mp4,a ball,\n", "line 2 of .*c.csv has more fields than columns"),
    "comma, half in quotes": ('b.mp4,y\na.mp4,a "ball, red"\n', "line 3 of .*c.csv has more fields than columns"),
    "no comma": ("a.mp4 a ball\n", "line 2 of .* has 'file', 'caption'; expected texts"),
    "open quote in a name": ('"a.mp4,x\nb.mp4,y\n', "the row that starts in line 2 of .* is broken"),
    "open quote at the end": ('a.mp4,x\nb.mp4,"y', "the row that starts in line 3 of .* is broken"),
    "inches in quotes": ('a.mp4,"a 5" ball"\n', "the row that starts in line 2 of .* is broken"),
    "open quote": ('a.mp4,"a ball\nb.mp4,a disc\n', "the row that starts in line 2 of .* is broken"),
    "quote closed later": (
        'a.mp4,x\nb.mp4,"a ball\nc.mp4,a "big" disc\n',
        "the row that starts in line 3 of .* is broken",
    ),
    "above": ("../a.mp4,x\n", "outside --videos"),
    "above, inside": ("a/../../b.mp4,x\n", "outside --videos"),
    "absolute": ("/a.mp4,x\n", "outside --videos"),
    "the folder": (".,x\n", "outside --videos"),
    "no name of a file": ("a\0.mp4,x\n", "outside --videos"),
    "twice": ("a.mp4,x\n./a.mp4,y\n", "a.mp4 is in lines 2 and 3"),
    "twice, deeper": ("b//a.mp4,x\nb/./a.mp4,y\n", "b/a.mp4 is in lines 2 and 3"),
}


@pytest.mark.parametrize("how", ROWS)
def test_captions_that_would_be_misread_are_named(tmp_path, how):
    rows, message = ROWS[how]
    (tmp_path / "c.csv").write_text("file,caption\n" + rows)
    with refused(message):
        read_captions(tmp_path / "c.csv")


LINES = {
    "a name twice": (
        '{"file": "a.mp4", "caption": "x", "caption": "y"}',
        "line 1 of .* comes twice among file, caption",
    ),
    "a list of pairs": ('[["file", "a.mp4"], ["caption", "x"]]', r"not a JSON object \(a list\)"),
    "half an emoji": ('{"file": "a.mp4", "caption": "\\ud83d"}', "not a JSON object"),
    "a column twice": ("file,caption,caption\na.mp4,x,y", "the column 'caption' more than once"),
    "a blank before a name": ("file, caption\na.mp4,x", "has 'file', ' caption'; expected"),
    "semicolons": ("file;caption\na.mp4;x, y", "line 1 of .* has 'file;caption'; expected the columns"),
    "no names": ("filea.mp4,x", "line 1 of .* has 'filea.mp4', 'x'; expected the columns"),
    "a list": ('[{"file": "a.mp4", "caption": "x"}]', "not a JSON object"),
    "no text": ('{"file": "a.mp4", "caption": null}', "expected texts"),
    "two in a line": ('{"file": "a.mp4", "caption": "x"}{"file": "b.mp4", "caption": "x"}', "not a JSON object"),
}


@pytest.mark.parametrize("how", LINES)
def test_captions_of_which_one_would_win_in_silence_are_refused(tmp_path, how):
    text, message = LINES[how]
    path = tmp_path / ("c.csv" if text.startswith("file") else "c.jsonl")
    path.write_text(text)
    with refused(message):
        read_captions(path)


def test_a_name_is_a_file_and_never_an_address_or_a_list_of_files(tmp_path, monkeypatch):
    make(tmp_path / "a.mp4", BARS)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'http://127.0.0.1:9/a.mp4'\n")
    monkeypatch.chdir(tmp_path)
    assert len(read_frames("a.mp4", 2, 32, 32)) == 2
    for name in ("concat:a.mp4|a.mp4", "data:a", "subfile,,start,0,end,0,,:a.mp4", "list.mp4"):
        with refused("cannot be read"):
            read_frames(name, 2, 32, 32)
        with refused("cannot be read"):
            measure_clip(name, 2)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_captions_and_prompts_are_read_as_they_were_meant(tmp_path, encoding, end):
    text = "a “red”, ball\u2028rolls \x85 on"
    lines = ["file,caption", f'a.mp4,"{text}"', "", '..b.mp4,"say ""x""\nand y"']
    (tmp_path / "c.csv").write_bytes(end.join(lines).encode(encoding))
    assert read_captions(tmp_path / "c.csv") == [("a.mp4", text), ("..b.mp4", 'say "x"\nand y')]
    (tmp_path / "p.txt").write_bytes(f"{text}{end}{end}two".encode(encoding))
    assert read_prompts(None, tmp_path / "p.txt") == [text, "two"]


@pytest.mark.parametrize("before", ["", "\ufeff"])
def test_files_that_were_put_one_behind_the_other_have_marks_inside(tmp_path, before):
    (tmp_path / "p.txt").write_text(f"{before}one\n\ufefftwo\n\u200b\n\ufeff\n", "utf-8")
    assert read_prompts(None, tmp_path / "p.txt") == ["one", "two"]
    rows = "".join(f'{mark}{{"file": "{n}.mp4", "caption": "x"}}\n' for n, mark in ((1, before), (2, "\ufeff")))
    (tmp_path / "c.jsonl").write_text(rows, "utf-8")
    (tmp_path / "c.csv").write_text(f"{before}file,caption\n1.mp4,x\n\ufeff2.mp4,x\n", "utf-8")
    for name in ("c.jsonl", "c.csv"):
        assert read_captions(tmp_path / name) == [("1.mp4", "x"), ("2.mp4", "x")]


@pytest.mark.parametrize("kind", ["csv", "TSV", "json", "jsonl"])
def test_captions_are_no_prompts(tmp_path, kind):
    (tmp_path / f"c.{kind}").write_text('{"file": "a.mp4", "caption": "x"}\n')
    with refused("is a table by its name; expected a text file"):
        read_prompts(None, tmp_path / f"c.{kind}")


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "latin-1"])
def test_other_encodings_are_one_line(tmp_path, encoding):
    for name, read in (("c.csv", read_captions), ("p.txt", lambda file: read_prompts(None, file))):
        (tmp_path / name).write_bytes("file,caption\na.mp4,café\n".encode(encoding))
        with refused("UTF-8"):
            read(tmp_path / name)


WRITTEN = {  # as captions are written; as Wan's own code cleans them
    "typographic": ("a woman’s “red” ball", 'a woman\'s "red" ball'),
    "single, turned round": ("‚red‘ ball", "'red' ball"),
    "an entity": ("red &amp; blue", "red & blue"),
    "an entity of an entity": ("&amp;quot;red&amp;quot; ball", '"red" ball'),
    "read as cp1252 once": ("a womanâ€™s ball", "a woman's ball"),
    "wide letters": ("ｒｅｄ ball", "red ball"),
    "a ligature": ("ﬁre", "fire"),
    "blanks": ("a\u00a0red \t\r\n ball ", "a red ball"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_captions_are_cleaned_as_wans_own_code_does(tiny, how):
    written, cleaned = WRITTEN[how]
    embedded = encode_prompts(*load_parts(tiny, "tokenizer", "text_encoder"), [written, cleaned], 32)
    assert torch.equal(*embedded)


# Model folders


def test_hidden_files_change_nothing(tmp_path):
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    before = model_identity(tmp_path), fingerprint(tmp_path / "vae")
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name / ".ipynb_checkpoints").mkdir()
        for hidden in ("._model.safetensors", ".DS_Store"):
            (tmp_path / name / hidden).write_bytes(b"\0\5\x16\7Mac OS X")
    assert (model_identity(tmp_path), fingerprint(tmp_path / "vae")) == before


HIDDEN = [".ipynb_checkpoints/{}", ".{}.swp", "._{}", ".DS_Store", ".nfs0000{}", ".~lock.{}#", ".git/{}"]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_files_are_never_read(tiny, tmp_path, hidden):
    folder = shutil.copytree(tiny, tmp_path / "wan")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        other = path.parent / hidden.format(path.name)
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"\0\5\x16\7Mac OS X")
    load_parts(folder, "tokenizer", "text_encoder", "vae", "scheduler")
    load_transformer(folder, "causal")
    assert identify(str(folder))[0].stage == "teacher"
    assert verify(folder / "latents") == []


@pytest.mark.parametrize("mean", [None, [0.0] * 48, 0.0, ["0"] * 16, [[0.0]] * 16, [0.0] * 15 + [float("nan")]])
def test_a_codec_without_its_mean_is_one_line(mean):
    config = {"z_dim": 16, "latents_mean": mean, "latents_std": [1.0] * 16}
    with refused("latents_mean in the codec's config.json (is|holds) .*; expected (16|numbers)"):
        decode_latents(SimpleNamespace(config=config), torch.zeros(1, 1, 16, 2, 2))


# What is no file: one would wait for it for ever

WAITING = {
    "captions": read_captions,
    "prompts": lambda path: read_prompts(None, path),
    "points": plane.target,
    "a video": lambda path: read_frames(path, 1, 16, 16),
    "a video, measured": lambda path: measure_clip(path, 1),
    "a picture": lambda path: plane.target(path.rename(path.with_suffix(".png"))),
    "weights": fingerprint,
    "latents": read_file,
    "a configuration": lambda path: load_config([path.rename(path.with_suffix(".yaml"))]),
    "a manifest": lambda path: read_manifest(path.rename(path.with_name("manifest.json")).parent),
    "parquet": lambda path: convert_parquet(
        path.rename(path.with_suffix(".parquet")).parent, path.parent, path.with_name("out"), Options()
    ),
}


@pytest.mark.parametrize("kind", WAITING)
def test_a_pipe_and_a_device_are_one_line(tmp_path, monkeypatch, kind):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text("{}")
    os.mkfifo(tmp_path / "a")

    def waited(*_):
        raise TimeoutError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    try:
        with refused("a pipe, a socket or a device; expected a file|no file"):
            WAITING[kind](tmp_path / "a")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if kind in ("captions", "prompts"):
        with refused("a device; expected a file"):
            WAITING[kind]("/dev/zero")


# Files of ours that others changed


def weights_beside(folder):
    return read_weights(shutil.copy(path_of(WEIGHTS, "codec"), folder / "x.safetensors"), "codec")


RUN = {"stage": "forward", "architecture": "causal", "steps": 6, "history": []}
RUN |= {"clip": {"frames": 9, "height": 32, "width": 48, "length": 32}}
MANIFEST = {"format": 2, "finished": True, "clips": 3, "skipped": [], "shape": [3, 16, 4, 6]}
EXPORTED = {"stage": "forward", "clip": RUN["clip"], "lora_of": "x/y", "architecture": "causal", "causal": {"rest": 2}}
EXPORTED |= {"shift": 5.0}
SETTINGS = {"source": "x", "prompts": ["a"], "videos": 2, "clip": RUN["clip"], "seed": 0}
PROVENANCE = {"seeds": [0], "cost": {"steps": 6}, "figures": {}}
SHAPE = {"num_layers": 2, "eps": 1e-6, "patch_size": [1, 2, 2]}
CHANGED = [  # file, its content, its reader; a field and its value: None removes it; what is named
    *(
        ("run.json", RUN, read_run, *change)
        for change in (("steps", "6"), ("clip", {}), ("history", {}), ("stage", None))
    ),
    ("run.json", RUN, read_run, "clip", RUN["clip"] | {"frames": -81}),
    *(("manifest.json", MANIFEST, read_manifest, "clips", value) for value in (None, "3", -3, 10**18)),
    ("manifest.json", MANIFEST, read_manifest, "shape", [3, 16]),
    ("manifest.json", MANIFEST, read_manifest, "skipped", ["a"]),
    ("manifest.json", MANIFEST, read_manifest, "finished", 1),
    *(
        ("minianyflow.json", EXPORTED, identify, *change)
        for change in (("stage", "fast"), ("clip", 81), ("shift", "5"))
    ),
    ("minianyflow.json", EXPORTED, identify, "causal", {"rest": "2"}),
    ("minianyflow.json", EXPORTED, identify, "architecture", None),
    *(
        ("settings.json", SETTINGS, lambda folder: Samples(folder, SETTINGS), *change)
        for change in (("prompts", "a"), ("videos", None), ("clip", {}))
    ),
    *(("x.json", PROVENANCE, weights_beside, *change) for change in (("seeds", 0), ("cost", None), ("figures", []))),
    *(
        ("config.json", SHAPE, shape_of, *change)
        for change in (("num_layers", "2"), ("eps", [0]), ("patch_size", [0.5]))
    ),
]


@pytest.mark.parametrize(("name", "content", "reader", "field", "value"), CHANGED)
def test_a_changed_file_is_one_line_that_names_it_and_the_field(tmp_path, name, content, reader, field, value):
    (tmp_path / "config.yaml").write_text(as_yaml(load_config())) if name == "run.json" else None
    (tmp_path / name).write_text(json.dumps(content))
    reader(tmp_path)
    (tmp_path / name).write_text(json.dumps({k: v for k, v in (content | {field: value}).items() if v is not None}))
    with refused(field):
        reader(tmp_path)
    for other in ([content], None, 3, "text"):
        (tmp_path / name).write_text(json.dumps(other))
        with refused(f"{name}: its content: it should be a valid dictionary"):
            reader(tmp_path)


# Models and videos from elsewhere

NAMED = {
    "a hub kernel": ("text_encoder/config.json", "_attn_implementation", "kernels-community/flash-attn"),
    "a local kernel": ("text_encoder/config.json", "attn_implementation", "flash_attention_2"),
    "code of its own": ("text_encoder/config.json", "auto_map", {"AutoModel": "evil.Model"}),
    "a tokenizer's code": ("tokenizer/tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.T", None]}),
    "another class": ("scheduler/scheduler_config.json", "_class_name", "StableDiffusionPipeline"),
    "another scheduler": ("scheduler/scheduler_config.json", "_class_name", "RePaintScheduler"),
    "a class of another library": ("model_index.json", "text_encoder", ["os", "system"]),
}


@pytest.mark.parametrize("what", NAMED)
def test_a_pipeline_that_names_code_is_refused_and_runs_none(tiny, tmp_path, what):
    file, key, value = NAMED[what]
    folder = shutil.copytree(tiny, tmp_path / "wan", ignore=shutil.ignore_patterns("latents"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    shutil.copy(folder / "evil.py", folder / "tokenizer/evil.py")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {key: value}))
    with nullcontext() if "tokenizer" in file else refused("names|does not load|is a "):  # ours needs no code
        load_parts(folder, {"model_index.json": "text_encoder"}.get(file, file.partition("/")[0]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_pickled_weights_are_never_read(tiny, tmp_path, part):
    folder = shutil.copytree(tiny, tmp_path / "wan", ignore=shutil.ignore_patterns("latents"))
    for file in (folder / part).glob("*.safetensors"):
        torch.save(
            load_file(file), file.with_name("pytorch_model.bin" if part == "text_encoder" else f"{file.stem}.bin")
        )
        file.unlink()
    with refused("does not load"):
        load_transformer(folder, "bidirectional") if part == "transformer" else load_parts(folder, part)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer", "codec", "adapter"])
def test_weights_that_are_no_floats_are_never_made_floats_in_silence(tiny, tmp_path, part, kind):
    folder = shutil.copytree(tiny, tmp_path / "wan", ignore=shutil.ignore_patterns("latents"))
    transformer = load_transformer(tiny, "bidirectional")
    if part == "codec":
        file = Path(shutil.copy(path_of(WEIGHTS, "codec"), tmp_path / "codec.safetensors"))
    elif part == "adapter":
        file = tmp_path / "pytorch_lora_weights.safetensors"
        width = transformer.blocks[0].attn1.to_q.in_features
        names = {f"transformer.blocks.0.attn1.to_q.lora_{side}.weight" for side in "AB"}
        save_file({name: torch.ones((2, width) if "_A" in name else (width, 2)) for name in names}, file)
    else:
        (file,) = (folder / part).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = max(tensors)
    save_file(tensors | {name: tensors[name].to(kind)}, file, metadata)
    words = {"codec": "expected torch.float32", "adapter": "expected F64, F32, F16, BF16|does not load"}
    with refused(words.get(part, "expected F64, F32, F16, BF16")):
        if part == "codec":
            load_codec(file)
        elif part == "adapter":
            load_lora(transformer, tmp_path)
        else:
            load_transformer(folder, "bidirectional") if part == "transformer" else load_parts(folder, part)


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
VARIABLES = {
    "ACCELERATE_TORCH_DEVICE='x'; expected cpu": {"ACCELERATE_TORCH_DEVICE": "x"},
    "RANK=2 of WORLD_SIZE=2": LAUNCHED | {"RANK": "2"},
    "LOCAL_RANK=2 of WORLD_SIZE=2": LAUNCHED | {"LOCAL_RANK": "2"},
    "LOCAL_RANK=1 of LOCAL_WORLD_SIZE=1": LAUNCHED | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
    **{f"and no {name} in it": LAUNCHED | {name: None} for name in LAUNCHED if name != "WORLD_SIZE"},
    **{f"{name}='a'": LAUNCHED | {name: "a"} for name in LAUNCHED if name != "MASTER_ADDR"},
}


@pytest.mark.parametrize("words", VARIABLES)
def test_an_environment_that_starts_no_processes_is_one_line(words, monkeypatch):
    for name, value in VARIABLES[words].items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with refused(words):
        find_device("cpu")


@pytest.mark.parametrize("given", [LAUNCHED, {"RANK": "0"}, {"LOCAL_RANK": "-1"}, {"ACCELERATE_TORCH_DEVICE": "cpu"}])
def test_an_environment_that_starts_processes_is_taken(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert find_device("cpu").type == "cpu"


def test_an_adapter_in_a_pickle_is_never_read(tiny, tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    with refused("does not load"):
        load_lora(load_transformer(tiny, "bidirectional"), tmp_path)


UNREADABLE = ("b.mp4/c.mp4", "gone/c.mp4", "folder", "-i.mp4")


def test_links_out_of_the_videos_are_skipped_unless_asked_for(tiny, tmp_path):
    videos, away = tmp_path / "videos", tmp_path / "away"
    videos.mkdir()
    away.mkdir()
    make(away / "a.mp4", BARS)
    make(videos / "b.mp4", BARS)
    (videos / "a.mp4").symlink_to(away / "a.mp4")
    (videos / "inside.mp4").symlink_to("b.mp4")
    (videos / "more").symlink_to(away)
    (videos / "folder").mkdir()
    clips, options = (
        [Clip(name, "x") for name in (*("a.mp4", "more/a.mp4", "inside.mp4", "b.mp4", "c" * 300), *UNREADABLE)],
        Options(5, 32, 48),
    )
    for links, left_out in ((False, [0, 1, 4, 5, 6, 7, 8]), (True, [4, 5, 6, 7, 8])):
        work = Preparation(tiny, clips, videos, tmp_path / "out", options, links=links)
        read = [work._read(clip)[0] for clip in clips]
        assert [number for number, frames in enumerate(read) if isinstance(frames, str)] == left_out
        assert "too long" in read[4]
        assert links or read[0].startswith("is a link out of --videos")


@pytest.mark.parametrize(("channels", "width"), [(16, 48), (4, 32), (48, 32), (4, 48)])
def test_latents_of_another_base_are_one_line(tiny, tmp_path, channels, width):
    write_latents(
        tmp_path / "data",
        torch.zeros(4, 3, channels, 4, 6),
        torch.ones(4, 8, width),
        torch.ones(1, 8, width),
        ["a"] * 4,
    )
    options = [f"base={tiny}", f"data={tmp_path}/data", f"runs={tmp_path}", "samples.every=0", "log.tracker=none"]
    with refused(rf"have {channels} channels and prompts {width} wide; expected 16 and 32, as .* takes: prepare"):
        distil(load_config(["bidirectional", "forward", "tiny"], options))
