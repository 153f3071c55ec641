"""Videos to files: H.264 clips, and a picture of stills.

Videos are (B, T, 3, H, W) in [0, 1], as the codec decodes them; values outside are clipped.
"""

import re
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor

from minianyflow.support.errors import InputError
from minianyflow.support.figures import contact_sheet
from minianyflow.support.files import staging_folder
from minianyflow.wan.data.options import FPS

STILL, LARGEST = 2.4, 60_000  # inches: its longer side; pixels: of a sheet, for matplotlib draws no more than 2^16


def write_clips(
    folder: str | Path,
    clips: dict[str, Tensor],
    prompts: list[str],
    fps: float = FPS,
    latents: dict[str, Tensor] | None = None,
    png: bool = False,
) -> None:
    """Write {label: video (B, T, 3, H, W)}, one clip per prompt, and a sheet of stills; all files or none.

    Clip k of the label "4 steps" is `4_steps-k.mp4`; `sheet.png` has a block per prompt and in it a row per label.
    latents: {label: (B, F, C, h, w)} to write beside, `4_steps-k.safetensors`. png: also `4_steps-k/00000.png`, ...
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
                if latents:
                    state = {"latents": latents[label][number].float().cpu().contiguous()}
                    save_file(state, inside / f"{names[label]}-{number}.safetensors")
                if png:
                    (inside / f"{names[label]}-{number}").mkdir()
                    for index, frame in enumerate(clip):
                        imageio.imwrite(inside / f"{names[label]}-{number}/{index:05}.png", frame)
        sheet = clip_sheet(clips, prompts, stills=5, columns=1)
        sheet.savefig(inside / "sheet.png", dpi=min(100, LARGEST / max(sheet.get_size_inches())))


def write_clip(path: str | Path, clip: Tensor, fps: float = FPS) -> None:
    """Write one clip (T, 3, H, W) as an mp4."""
    _write(Path(path), _to_bytes(Path(path).name, clip[None], 1)[0], fps)


def as_gif(clip: Tensor, fps: float = FPS) -> bytes:
    """One clip (T, 3, H, W) as a GIF, which trackers show."""
    return imageio.mimwrite(
        "<bytes>", [*_to_bytes("clip", clip[None], 1)[0]], format="GIF", duration=1000 / fps, loop=0
    )


def clip_sheet(clips: dict[str, Tensor], prompts: list[str], stills: int = 3, columns: int | None = None) -> Figure:
    """A picture of {label: video (B, T, 3, H, W)}: a block per prompt and in it a row per label."""
    rows = {label: _to_bytes(label, video, len(prompts)) / 255 for label, video in clips.items()}
    return contact_sheet(rows, [prompt.strip() or "(no prompt)" for prompt in prompts], stills, columns, STILL)


def _to_bytes(label, video, count):
    """Bytes (B, T, H, W, 3) of a video."""
    if video.ndim != 5 or video.shape[2] != 3 or len(video) != count:
        raise InputError(
            f"{label!r} is {tuple(video.shape)}; expected (B, T, 3, H, W) with one clip per prompt, {count}"
        )
    if not video.isfinite().all():
        raise InputError(f"{label!r} holds numbers that are not finite; sample with precision fp32, or train longer")
    return (video.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()


class GrowingClip:
    """An mp4 that grows by frames (T, 3, H, W) in [0, 1] and can be played meanwhile; a context, closed at its end."""

    def __init__(self, path: str | Path, fps: float = FPS):
        playable = [
            "-g",
            "16",
            "-tune",
            "zerolatency",
            "-flush_packets",
            "1",
            "-movflags",
            "frag_every_frame+empty_moov",
        ]
        options = _mp4(fps)
        options["output_params"] += playable
        self.name, self.writer = Path(path).name, imageio.get_writer(path, format="FFMPEG", **options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.writer.close()

    def add(self, frames: Tensor) -> np.ndarray:
        """Write frames; returns them as bytes (T, H, W, 3)."""
        made = _to_bytes(self.name, frames[None], 1)[0]
        for frame in _even(made):
            self.writer.append_data(frame)
        return made


def _mp4(fps):
    options = {"fps": fps, "codec": "libx264", "quality": 8, "macro_block_size": 2, "ffmpeg_log_level": "error"}
    tags = [text for name in ("colorspace", "color_primaries", "color_trc") for text in (f"-{name}", "bt709")]
    convert = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int"
    return options | {"output_params": ["-vf", convert, *tags, "-color_range", "tv"]}


def _even(clip):
    """Bytes (T, H, W, 3). H.264 shares colours between 2 x 2 pixels: an odd side grows by its edge."""
    return np.pad(clip, [(0, 0), *((0, side % 2) for side in clip.shape[1:3]), (0, 0)], mode="edge")


def _write(path, clip, fps):
    """An mp4 of bytes (T, H, W, 3)."""
    imageio.mimwrite(path, _even(clip), format="FFMPEG", **_mp4(fps))
