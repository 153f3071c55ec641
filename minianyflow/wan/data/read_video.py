"""Videos and pictures as frames: where a clip is read, by ffmpeg."""

import os
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minianyflow.support.errors import InputError
from minianyflow.support.files import open_picture, profile_of, regular
from minianyflow.wan.data.options import FPS

HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}  # ffmpeg's names of the transfer functions
PRIMARIES = {"bt2020": "BT.2020", "smpte432": "P3", "smpte431": "P3"}
# BT.2408: 203 cd/m2 is the white of ordinary video. Up to 0.8 of it light is kept, what is brighter is compressed.
TONE_MAP = "tonemap=mobius:param=0.8:desat=0"
LINEAR, BT709 = "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709", "zscale=t=bt709:m=gbr:r=pc,format=gbrp"
ALPHA = re.compile(r"yuva|rgba|bgra|argb|abgr|gbrap|ya\d+|pal8|ayuv|vuya")
FLAGS = "lanczos+accurate_rnd+full_chroma_int"  # without these two colours are up to two levels too dark
OVER_BLACK = "format=gbrap,premultiply=inplace=1,format=gbrp"
ONLY_FILES = ["-protocol_whitelist", "file"]  # a playlist in a video's clothes fetches nothing
RAW = ("h264", "hevc", "vvc", "mjpeg", "m4v", "obu")  # ffmpeg would assume a rate
UNFIT = dict.fromkeys(RAW, "a raw stream, which has no times") | {"tty": "a text", "svg_pipe": "a drawing"}
UNFIT |= dict.fromkeys(("hls", "dash", "concat"), "a list of files")
FAULTS = {"corrupt decoded frame": "is damaged", "Reconfiguring filter graph": "changes its size or colours midway"}
LATE = 0.1  # of an output frame's time: a frame that begins so little after its instant counts, as containers round
SHOWN = "settb=AVTB,setpts=(PTS-STARTPTS)-{late}/TB,fps={fps}:round=up"  # the frames shown every 1 / fps seconds


def read_video(path: str | Path, frames: int, height: int, width: int, fps: float = FPS) -> Tensor:
    """The first `frames` frames of a video at `fps`, or a picture as one frame: (1, T, 3, height, width) in [0, 1].

    The frames are cut in the centre, then resized. Raises InputError for a file that cannot be read or is too short.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}; expected a video or a picture")
    picture = _read_picture(path)
    if picture is None:
        video = read_frames(path, frames, height, width, fps)
    elif frames > 1:
        raise InputError(f"{path} has 1 frame; expected at least {frames}")
    else:
        video = _as_frame(picture, height, width)
    return to_float(video)


def read_frames(path: str | Path, frames: int, height: int, width: int, fps: float = FPS) -> Tensor:
    """The frames of `read_clip` alone."""
    return read_clip(path, frames, height, width, fps)[0]


def read_clip(
    path: str | Path, frames: int, height: int, width: int, fps: float = FPS
) -> tuple[Tensor, dict[str, int | str]]:
    """The first frames of a video, bytes (T, H, W, 3), cut in the centre and resized by ffmpeg; and what was changed.

    They are the frames shown 0, 1 / fps, 2 / fps, ... seconds after the first, upright, in square pixels and in BT.709
    (untagged: BT.601 up to 576 lines): BT.2020 and P3 are converted, HDR is tone-mapped, transparency lies over black,
    interlaced frames are deinterlaced. The changes: {"repeated": frames that equal the one before, "colours",
    "transparent", "interlaced": why}, as far as they happened. A fault that ffmpeg meets up to a few frames after the
    last one counts. Raises InputError as `read_video`.
    """
    expected = "expected a picture, or a video as ffmpeg reads it"
    about, decoder = _describe(path, frames / fps)
    if frames == 1 and (profile := profile_of(path)):  # which ffmpeg would not read
        return _as_frame(_read_picture(path), height, width), {"colours": profile}
    filters = [SHOWN.format(late=LATE / fps, fps=fps)]
    changes = _changes(about)
    if "interlaced" in changes:
        filters.insert(0, "bwdif=deint=interlaced:mode=send_frame")
    scale = f"scale=w=max({width}\\,round({height}*dar)):h=max({height}\\,round({width}/dar)):flags={FLAGS}"
    untagged = about.get("color_space") in ("unknown", None)
    matrix = ":in_color_matrix=" + ("bt709" if int(about.get("s", "0x0").split("x")[1]) > 576 else "bt601")
    alpha = [OVER_BLACK] if "transparent" in changes else []
    colours = _to_bt709(about) if "colours" in changes else []
    scale += matrix * (untagged and not colours and not alpha)
    filters += [*colours, *alpha, scale, "format=gbrp", f"crop={width}:{height}"]
    options = ["-frames:v", str(frames), "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-f", "rawvideo"]
    data, said = _ffmpeg(path, decoder, ",".join(filters), *options)
    count = len(data) // (height * width * 3)
    if not count:
        why = next(
            (line.strip() for line in reversed(said.splitlines()) if line.strip() and line[:6] != "frame="),
            "no video in it",
        )
        raise InputError(f"{path} cannot be read ({why}); {expected}")
    for words, what in FAULTS.items():
        if words in said:
            raise InputError(f"{path} {what} (ffmpeg: {words}); mend it, or leave it out")
    if count < frames:
        raise InputError(f"{path} is too short ({count} frames at {fps:g} per second); expected at least {frames}")
    video = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(frames, height, width, 3)
    repeated = sum(map(torch.equal, video[1:], video[:-1]))
    return video, ({"repeated": repeated} if repeated else {}) | changes


def _describe(path, seconds):
    """What ffmpeg says of a video's first frame, {name: value}, and the options that decode its transparency.

    `transparent` is there, the format, if any of the first `seconds` is.
    """
    _, text = _ffmpeg(path, [], "showinfo", "-frames:v", "1", "-f", "null")
    kind, decoder = re.search(r"Input #0, ([\w,]+), from", text), []
    if kind and kind[1] in UNFIT:
        raise InputError(f"{path} is {UNFIT[kind[1]]}; expected a video in a container, like mp4 or mkv")
    if kind and kind[1] == "image2" and "%" in str(path):
        raise InputError(f"{path} is a pattern of names for ffmpeg; rename it without %")
    about = dict(re.findall(r"(\w+):\s*(\S+)", " ".join(re.findall(r"showinfo.*\] (?:n:|color).*", text))))
    codec = re.search(r"Video: (vp[89])\b", text)
    if codec and re.search(r"alpha_mode\s*:\s*1", text):  # the usual decoders do not see it
        about["fmt"], decoder = "yuva420p", ["-c:v", {"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec[1]]]
    if ALPHA.match(about.get("fmt", "")):  # every GIF has an alpha channel; most are opaque
        _, alpha = _ffmpeg(path, decoder, "alphaextract,format=gray,showinfo", "-t", f"{seconds}", "-f", "null")
        if set(re.findall(r" mean:\[(.*?)\] stdev:\[(.*?)\]", alpha)) != {("255", "0.0")}:
            about["transparent"] = about["fmt"]
    return about, decoder


def _ffmpeg(path, decoder, filters, *options):
    """What ffmpeg makes of a video that passes `filters`, as bytes, and what it says."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", *ONLY_FILES, *decoder]
    command += ["-i", f"file:{regular(path)}", "-vf", filters, "-an", "-sn", "-dn", *options, "-"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("AV_LOG", "FFREPORT"))}
    try:
        done = subprocess.run(command, capture_output=True, check=False, env=plain)  # what it says is read above
    except (OSError, ValueError) as problem:
        raise InputError(f"{path} cannot be read ({problem}); expected a picture or a video") from None
    return done.stdout, done.stderr.decode(errors="replace")


def _to_bt709(about):
    """The filters that make BT.709 of HDR, BT.2020 or P3; what a video that is `about` so leaves out is set first."""
    hdr = about.get("color_trc") in HDR
    matrix = "bt2020nc" if hdr or about.get("color_primaries") == "bt2020" else "bt709"
    usual = {"color_primaries": "bt2020", "color_space": matrix, "color_trc": "bt709"}
    missing = [name for name in usual if about.get(name) in ("unknown", None)]
    given = ":".join(f"{name.replace('_space', 'space')}={usual[name]}" for name in missing)
    return [*[f"setparams={given}"] * bool(given), LINEAR, *[TONE_MAP] * hdr, BT709]


def _changes(about):
    """What must be done to a video that is `about` so: {what: why}."""
    transfer, primaries = about.get("color_trc"), about.get("color_primaries")
    changes = {}
    if transfer in HDR or primaries in PRIMARIES:
        changes["colours"] = HDR.get(transfer) or PRIMARIES[primaries]
    if "transparent" in about:
        changes["transparent"] = about["transparent"]
    if about.get("i") in ("T", "B"):
        changes["interlaced"] = about["i"]
    return changes


def measure_clip(path: str | Path, most: int, fps: float = FPS) -> tuple[int, float]:
    """Number of frames of a video at `fps`, counted to `most`, and its width over its height, upright, as shown.

    Raises InputError as `read_video`.
    """
    about, decoder = _describe(path, 0)
    if "s" not in about:
        raise InputError(f"{path} cannot be read; expected a video")
    _, said = _ffmpeg(
        path, decoder, SHOWN.format(late=LATE / fps, fps=fps) + ",showinfo", "-frames:v", str(most), "-f", "null"
    )
    (width, height), (wide, high) = (map(int, re.split("[x/]", about[name])) for name in ("s", "sar"))
    return min(most, len(re.findall(r"showinfo.*\] n:", said))), width / height * (wide / high if wide and high else 1)


def to_float(video: Tensor) -> Tensor:
    """Bytes (T, H, W, 3) to a video (1, T, 3, H, W) in [0, 1], as the codec takes it."""
    return video.permute(0, 3, 1, 2)[None].float() / 255


def _as_frame(picture, height, width):
    return torch.from_numpy(np.array(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)))[None]


def _read_picture(path):
    """The picture, transparency over black, or None where the file is none. An animation is a video."""
    try:
        picture = open_picture(path)
        black = Image.new("RGBA", picture.size, "black") if picture else None
        return picture and Image.alpha_composite(black, picture).convert("RGB")
    except UnidentifiedImageError:
        return None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise InputError(f"{path} cannot be read ({problem}); expected a whole picture or video") from None
