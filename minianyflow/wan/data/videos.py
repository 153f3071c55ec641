"""Videos as files: H.264 clips with a contact sheet beside them, and clips or pictures to begin a video with.

Videos are (B, T, 3, H, W) in [0, 1], as the codec decodes them; what is outside is clipped.
"""

import logging
import re
import textwrap
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder

logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of every clip that is resized, as all are
FPS = 16  # of Wan's videos
WAN_CLIP = {"frames": 81, "height": 480, "width": 832, "length": 512}  # in pixels; tokens of a prompt
COLUMNS = 5  # stills of a clip on a sheet
STILL, GAP, FONT, LARGE = 240, 6, 18, 30  # the longer side of a still, between two, text on both sheets; in pixels


def write_clips(folder, clips, prompts, fps=FPS):
    """Write clips {label: video (B, T, 3, H, W)}, one for each prompt, and a sheet of stills; whole or not at all.

    Clip k of the label "4 steps" is `4_steps-k.mp4`; `sheet.png` has a block for every prompt, a row for every label.
    Raises InputError for videos that do not fit the prompts, and for a folder that cannot be written.
    """
    videos = {label: _frames(label, video, len(prompts)) for label, video in clips.items()}
    if not videos or not prompts:
        raise InputError(f"{len(videos)} labels and {len(prompts)} prompts; expected at least one of each")
    names = {label: re.sub(r"[^\w.-]+", "_", str(label)) for label in videos}
    if len(set(names.values())) != len(names):
        raise InputError(f"labels {', '.join(names)} make the same file names; expected other letters in each")
    with staging_folder(folder) as inside:
        for label, video in videos.items():
            for number, clip in enumerate(video):
                _write(inside / f"{names[label]}-{number}.mp4", clip, fps)
        _sheet(videos, prompts).save(inside / "sheet.png")


def write_clip(path, clip, fps=FPS):
    """Write one clip (T, 3, H, W) as an mp4."""
    _write(Path(path), _frames(Path(path).name, clip[None], 1)[0], fps)


def stills(clips, prompts, group=1):
    """A picture of stills of {label: video (B, T, 3, H, W)}: a row for every label, prompts side by side.

    Three stills of each clip: its start, middle and end. group: rows that stand together.
    """
    font, pen = ImageFont.load_default(LARGE), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    rows = {label: [_stills(clip, 3) for clip in _frames(label, video, len(prompts))] for label, video in clips.items()}
    wide, tall = next(iter(rows.values()))[0][0].size
    block = len(next(iter(rows.values()))[0]) * (wide + GAP)
    titles = [_wrapped(prompt, block / pen.textlength("n", font)) for prompt in prompts]
    head = max(round(pen.multiline_textbbox((0, 0), title, font)[3]) for title in titles) + 3 * GAP
    left = max(round(pen.multiline_textbbox((0, 0), label, font)[2]) for label in rows) + 3 * GAP
    bottom = head + len(rows) * (tall + GAP) + (len(rows) - 1) // group * 3 * GAP
    sheet = Image.new("RGB", (left + len(prompts) * (block + 3 * GAP), bottom), "white")
    pen = ImageDraw.Draw(sheet)
    for number, title in enumerate(titles):
        pen.multiline_text((left + number * (block + 3 * GAP), GAP), title, "black", font)
    for row, (label, videos) in enumerate(rows.items()):
        top = head + row * (tall + GAP) + row // group * 3 * GAP
        pen.multiline_text((left - 2 * GAP, top + tall // 2), label, "black", font, anchor="rm", align="right")
        for number, pictures in enumerate(videos):
            for column, still in enumerate(pictures):
                sheet.paste(still, (left + number * (block + 3 * GAP) + column * (wide + GAP), top))
    return sheet


def read_video(path, frames, height, width):
    """The first `frames` frames of a video at 16 fps, or a picture as one frame: (1, T, 3, height, width) in [0, 1].

    Cut in the centre, then resized. Raises InputError for a file that cannot be read or is too short.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}; expected a video or a picture")
    picture = _read_picture(path)
    if picture is None:
        video = read_frames(path, frames, height, width)
    elif frames > 1:
        raise InputError(f"{path} has 1 frame; expected at least {frames}")
    else:
        video = torch.from_numpy(np.array(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)))[None]
    return video.permute(0, 3, 1, 2)[None].float() / 255


def read_frames(path, frames, height, width, fps=FPS):
    """The first frames of a video, bytes (T, H, W, 3): cut in the centre and resized by ffmpeg.

    What is shown at 0, 1 / fps, 2 / fps, ... seconds. Raises InputError for one that cannot be read or is too short.
    """
    size = f"{width}:{height}"
    filters = f"fps={fps}:round=up,scale={size}:force_original_aspect_ratio=increase:flags=lanczos,crop={size}"
    video, count = torch.empty(frames, height, width, 3, dtype=torch.uint8), 0
    try:
        pictures = imageio_ffmpeg.read_frames(
            str(path), output_params=["-vf", filters, "-frames:v", str(frames), "-an"]
        )
        next(pictures)  # what ffmpeg says of the file
        for picture in pictures:
            video[count] = torch.frombuffer(bytearray(picture), dtype=torch.uint8).view(video[0].shape)
            count += 1
    except (OSError, RuntimeError, IndexError, KeyError, ValueError, StopIteration) as problem:
        why = next((line.strip() for line in reversed(str(problem).splitlines()) if line.strip()), "no video in it")
        raise InputError(f"{path} cannot be read ({why}); expected a picture, or a video as ffmpeg reads it") from None
    if count < frames:
        raise InputError(f"{path} has {count} frames at {fps:g} a second; expected at least {frames}")
    return video


def _frames(label, video, count):
    """Bytes (B, T, H, W, 3) of a video."""
    if video.ndim != 5 or video.shape[2] != 3 or len(video) != count:
        raise InputError(f"{label!r} is {tuple(video.shape)}; expected (B, T, 3, H, W) with a clip for each of {count}")
    if not torch.isfinite(video).all():
        raise InputError(f"{label!r} holds numbers that are not finite; sample with precision fp32, or train longer")
    return (video.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def _write(path, clip, fps):
    """An mp4 of bytes (T, H, W, 3). H.264 shares colours between 2 x 2 pixels: an odd side is made even by its edge."""
    odd = [(0, side % 2) for side in clip.shape[1:3]]
    options = {"fps": fps, "codec": "libx264", "quality": 8, "macro_block_size": 2, "ffmpeg_log_level": "error"}
    with imageio.get_writer(path, format="FFMPEG", **options) as writer:
        for frame in np.pad(clip, [(0, 0), *odd, (0, 0)], mode="edge"):
            writer.append_data(frame)


def _read_picture(path):
    """The picture, or None where the file is none. An animation is a video."""
    try:
        with Image.open(path) as picture:
            return None if getattr(picture, "is_animated", False) else ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as problem:
        if isinstance(problem, Image.UnidentifiedImageError):
            return None
        raise InputError(f"{path} cannot be read ({problem}); expected a whole picture or video") from None


def _sheet(videos, prompts):
    """Stills (rows: labels, columns: times), a block under each prompt."""
    font, pen = ImageFont.load_default(FONT), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    stills = {label: [_stills(clip) for clip in video] for label, video in videos.items()}
    left = max(round(pen.textlength(str(label), font)) for label in stills) + 2 * GAP
    tall = {label: rows[0][0].height for label, rows in stills.items()}
    wide = max(sum(each.width + GAP for each in rows[0]) for rows in stills.values())
    letters = int((left + wide) / pen.textlength("n", font))
    titles = [_wrapped(prompt, letters) for prompt in prompts]
    heads = [round(pen.multiline_textbbox((0, 0), title, font)[3]) + 2 * GAP for title in titles]
    block = sum(tall.values()) + len(tall) * GAP
    right = max(round(pen.multiline_textbbox((0, 0), title, font)[2]) for title in titles)
    size = (max(left + wide, right + 2 * GAP), sum(heads) + len(heads) * (block + 2 * GAP))
    sheet, top = Image.new("RGB", size, "white"), 0
    pen = ImageDraw.Draw(sheet)
    for number, (title, head) in enumerate(zip(titles, heads, strict=True)):
        pen.multiline_text((GAP, top + GAP), title, "black", font)
        top += head
        for label, rows in stills.items():
            pen.text((left - GAP, top + tall[label] // 2), str(label), "black", font, anchor="rm")
            for column, still in enumerate(rows[number]):
                sheet.paste(still, (left + column * (still.width + GAP), top))
            top += tall[label] + GAP
        top += 2 * GAP
    return sheet


def _wrapped(prompt, letters):
    return textwrap.fill(" ".join(str(prompt).split()) or "(no prompt)", max(int(letters), 20))


def _stills(clip, count=COLUMNS):
    """`count` pictures of bytes (T, H, W, 3), evenly in time, both ends among them."""
    height, width = clip.shape[1:3]
    scale = STILL / max(height, width)
    scale = max(1, int(scale)) if scale >= 1 else scale  # small ones grow by whole pixels
    size, how = (round(width * scale), round(height * scale)), Image.Resampling.NEAREST
    how = Image.Resampling.LANCZOS if scale < 1 else how
    times = np.unique(np.linspace(0, len(clip) - 1, count).round().astype(int))
    return [Image.fromarray(clip[time]).resize(size, how) for time in times]
