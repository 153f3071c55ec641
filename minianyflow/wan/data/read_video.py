"""Videos and pictures as frames: where a clip is read, by ffmpeg."""

import logging
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minianyflow.support.errors import InputError
from minianyflow.wan.data.options import FPS

logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of every clip that is resized, as all are


def read_video(path: str | Path, frames: int, height: int, width: int) -> Tensor:
    """The first `frames` frames of a video at 16 fps, or a picture as one frame: (1, T, 3, height, width) in [0, 1].

    The frames are cut in the centre, then resized. Raises InputError for a file that cannot be read or is too short.
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
    return to_float(video)


def read_frames(path: str | Path, frames: int, height: int, width: int, fps: float = FPS) -> Tensor:
    """The first frames of a video, bytes (T, H, W, 3): cut in the centre and resized by ffmpeg.

    They are the frames shown at 0, 1 / fps, 2 / fps, ... seconds. Raises InputError as `read_video`.
    """
    size = f"{width}:{height}"
    filters = f"fps={fps}:round=up,scale={size}:force_original_aspect_ratio=increase:flags=lanczos,crop={size}"
    options = ["-vf", filters, "-frames:v", str(frames), "-an"]
    video, count = torch.empty(frames, height, width, 3, dtype=torch.uint8), 0
    try:
        pictures = imageio_ffmpeg.read_frames(str(path), output_params=options)
        next(pictures)  # the first value describes the file
        for picture in pictures:
            video[count] = torch.frombuffer(bytearray(picture), dtype=torch.uint8).view(video[0].shape)
            count += 1
    except (OSError, RuntimeError, IndexError, KeyError, ValueError, StopIteration) as problem:
        why = next((line.strip() for line in reversed(str(problem).splitlines()) if line.strip()), "no video in it")
        raise InputError(f"{path} cannot be read ({why}); expected a picture, or a video as ffmpeg reads it") from None
    if count < frames:
        raise InputError(f"{path} has {count} frames at {fps:g} per second; expected at least {frames}")
    return video


def to_float(video: Tensor) -> Tensor:
    """Bytes (T, H, W, 3) to a video (1, T, 3, H, W) in [0, 1], as the codec takes it."""
    return video.permute(0, 3, 1, 2)[None].float() / 255


def _read_picture(path):
    """The picture, or None where the file is none. An animation is a video."""
    try:
        with Image.open(path) as picture:
            return None if getattr(picture, "is_animated", False) else ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        return None
    except (OSError, ValueError, Image.DecompressionBombError) as problem:
        raise InputError(f"{path} cannot be read ({problem}); expected a whole picture or video") from None
