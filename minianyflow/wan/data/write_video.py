"""Videos to files: H.264 clips, and a picture of stills.

Videos are (B, T, 3, H, W) in [0, 1], as the codec decodes them; values outside are clipped.
"""

import re
import textwrap
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.wan.data.options import FPS

STILLS = 5  # per clip, on the sheet beside written clips
STILL, GAP, FONT = 240, 6, 30  # the longer side of a still, the gap between two, the size of text; in pixels


def write_clips(folder: str | Path, clips: dict[str, Tensor], prompts: list[str], fps: float = FPS) -> None:
    """Write {label: video (B, T, 3, H, W)}, one clip per prompt, and a sheet of stills; all files or none.

    Clip k of the label "4 steps" is `4_steps-k.mp4`; `sheet.png` has a block per prompt and in it a row per label.
    Raises InputError for videos that do not fit the prompts, and for a folder that cannot be written.
    """
    if not clips or not prompts:
        raise InputError(f"{len(clips)} labels and {len(prompts)} prompts; expected at least one of each")
    videos = {label: _to_bytes(label, video, len(prompts)) for label, video in clips.items()}
    names = {label: re.sub(r"[^\w.-]+", "_", str(label)) for label in videos}
    if len(set(names.values())) != len(names):
        raise InputError(f"labels {', '.join(names)} make the same file names; expected other letters in each")
    with staging_folder(folder) as inside:
        for label, video in videos.items():
            for number, clip in enumerate(video):
                _write(inside / f"{names[label]}-{number}.mp4", clip, fps)
        _draw_sheet(videos, prompts, STILLS, columns=1).save(inside / "sheet.png")


def write_clip(path: str | Path, clip: Tensor, fps: float = FPS) -> None:
    """Write one clip (T, 3, H, W) as an mp4."""
    _write(Path(path), _to_bytes(Path(path).name, clip[None], 1)[0], fps)


def clip_sheet(clips: dict[str, Tensor], prompts: list[str], group: int = 1) -> Image.Image:
    """A picture of {label: video (B, T, 3, H, W)}: a row per label, prompts side by side.

    Three stills per clip: its start, middle and end. group: number of rows that stand together.
    """
    videos = {label: _to_bytes(label, video, len(prompts)) for label, video in clips.items()}
    return _draw_sheet(videos, prompts, 3, len(prompts), group)


def _draw_sheet(videos, prompts, count, columns, group=1):
    """`count` stills per clip: a block per prompt, `columns` blocks side by side, in each a row per label."""
    font, pen = ImageFont.load_default(FONT), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    rows = {label: [_stills(clip, count) for clip in video] for label, video in videos.items()}
    clips = [stills for clips in rows.values() for stills in clips]
    wide, tall = (max(side) for side in zip(*(still.size for stills in clips for still in stills), strict=True))
    block = max(map(len, clips)) * (wide + GAP)
    letters = max(int(block / pen.textlength("n", font)), 20)
    titles = [textwrap.fill(" ".join(str(prompt).split()) or "(no prompt)", letters) for prompt in prompts]
    boxes = [[pen.multiline_textbbox((0, 0), str(text), font) for text in texts] for texts in (titles, rows)]
    head, left = round(max(box[3] for box in boxes[0])) + 3 * GAP, round(max(box[2] for box in boxes[1])) + 3 * GAP
    high = head + len(rows) * (tall + GAP) + (len(rows) - 1) // group * 3 * GAP
    across, down = block + 3 * GAP, high + 3 * GAP  # from one block to the next
    width = max(left + columns * across, left + round(max(box[2] for box in boxes[0])) + 2 * GAP)
    sheet = Image.new("RGB", (width, -(-len(prompts) // columns) * down - 3 * GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, title in enumerate(titles):
        x, y = left + number % columns * across, number // columns * down
        pen.multiline_text((x, y + GAP), title, "black", font)
        for row, (label, clips) in enumerate(rows.items()):
            top = y + head + row * (tall + GAP) + row // group * 3 * GAP
            if number % columns == 0:
                pen.multiline_text((x - 2 * GAP, top + tall // 2), str(label), "black", font, "rm", align="right")
            for column, still in enumerate(clips[number]):
                sheet.paste(still, (x + column * (wide + GAP), top))
    return sheet


def _stills(clip, count):
    """`count` pictures of bytes (T, H, W, 3), evenly in time, both ends among them."""
    height, width = clip.shape[1:3]
    scale = STILL / max(height, width)
    scale = max(1, int(scale)) if scale >= 1 else scale  # small ones grow by whole pixels
    size, how = (round(width * scale), round(height * scale)), Image.Resampling.NEAREST
    how = Image.Resampling.LANCZOS if scale < 1 else how
    times = np.unique(np.linspace(0, len(clip) - 1, count).round().astype(int))
    return [Image.fromarray(clip[time]).resize(size, how) for time in times]


def _to_bytes(label, video, count):
    """Bytes (B, T, H, W, 3) of a video."""
    if video.ndim != 5 or video.shape[2] != 3 or len(video) != count:
        raise InputError(
            f"{label!r} is {tuple(video.shape)}; expected (B, T, 3, H, W) with one clip per prompt, {count}"
        )
    if not video.isfinite().all():
        raise InputError(f"{label!r} holds numbers that are not finite; sample with precision fp32, or train longer")
    return (video.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def _write(path, clip, fps):
    """An mp4 of bytes (T, H, W, 3). H.264 shares colours between 2 x 2 pixels: an odd side grows by its edge."""
    odd = [(0, side % 2) for side in clip.shape[1:3]]
    options = {"fps": fps, "codec": "libx264", "quality": 8, "macro_block_size": 2, "ffmpeg_log_level": "error"}
    frames = np.pad(clip, [(0, 0), *odd, (0, 0)], mode="edge")
    imageio.mimwrite(path, frames, format="FFMPEG", **options)
