"""Captioned videos, as Wan's codec and text encoder take them: which clips there are, and their frames."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minianyflow.support.errors import InputError
from minianyflow.wan.data.videos import FPS, WAN_CLIP, read_frames

# The negative prompt in Wan2.1's configuration (sample_neg_prompt), which its guidance and AnyFlow's is against.
WAN_NULL = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"  # noqa: RUF001
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Clip:
    """A line of the captions file."""

    file: str
    caption: str


@dataclass(frozen=True)
class Options:
    """What decides the numbers in the shards, beside clips and weights. Raises InputError for what Wan cannot take."""

    frames: int = WAN_CLIP["frames"]
    height: int = WAN_CLIP["height"]
    width: int = WAN_CLIP["width"]
    fps: float = float(FPS)
    length: int = WAN_CLIP["length"]
    shard_size: int = 64
    dtype: str = "bf16"
    null: str = WAN_NULL

    def __post_init__(self):
        if self.frames < 1 or self.frames % 4 != 1:
            near = max(1, 4 * ((self.frames - 1) // 4) + 1)
            raise InputError(f"frames={self.frames}; expected 4 n + 1, as the codec takes them: {near} or {near + 4}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                raise InputError(f"{name}={value}; expected a multiple of 16: {max(16, 16 * round(value / 16))}")
        for name in ("fps", "length", "shard_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}; expected more than 0")


def read_captions(file, limit=None):
    """The clips that a captions file names, a list of `Clip`; at most `limit` of them.

    file: jsonl of {"file": ..., "caption": ...}, or csv with the columns file and caption; others are passed over.
    Raises InputError, with the line, for what is not of that form and for a file named twice.
    """
    path = Path(file)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}; expected at least 1")
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(_csv_rows(path, lines) if path.suffix.lower() == ".csv" else _jsonl_rows(path, lines))
    except OSError as problem:
        raise InputError(f"captions {path} cannot be read ({problem.strerror}); expected jsonl or csv") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        raise InputError(f"captions {path} cannot be read ({problem}); expected jsonl or csv in UTF-8") from None
    seen, clips = {}, []
    for number, row in rows:
        name, caption = (row.get(column) for column in ("file", "caption"))
        if not isinstance(name, str) or not isinstance(caption, str) or not name:
            has = ", ".join(map(str, row)) or "nothing"
            raise InputError(f"line {number} of {path} has {has}; expected texts file and caption")
        try:
            f"{name}{caption}".encode()
        except UnicodeEncodeError as problem:  # what was cut to a length may end in half an emoji
            half = f"half a character ({problem.object[problem.start]!r})"
            raise InputError(f"line {number} of {path} has {half}; expected whole ones: take it out") from None
        if name in seen:
            raise InputError(f"{name} is in lines {seen[name]} and {number} of {path}; expected each file once")
        seen[name] = number
        clips.append(Clip(name, caption.strip()))
    if not clips:
        raise InputError(f"no clips in {path}; expected a line for each, with file and caption")
    return clips[:limit]


def _csv_rows(path, lines):
    reader = csv.DictReader(lines)
    missing = [name for name in ("file", "caption") if name not in (reader.fieldnames or [])]
    if missing:
        has = ", ".join(reader.fieldnames or []) or "none"
        raise InputError(f"{path} has columns {has}; expected file and caption: rename {' and '.join(missing)}")
    for row in reader:
        yield reader.line_num, row


def _jsonl_rows(path, lines):
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            expected = '{"file": ..., "caption": ...}; for a csv name the file .csv'
            raise InputError(f"line {number} of {path} is not a JSON object; expected {expected}")
        yield number, row


def read_clip(path, options):
    """The first frames of a video, bytes (T, H, W, 3), as `movies.read_frames`."""
    if not Path(path).is_file():
        raise InputError("no such file")
    return read_frames(path, options.frames, options.height, options.width, options.fps)
