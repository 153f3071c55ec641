"""The clips of Wan2.1, and the options that decide what a clip is encoded to."""

from dataclasses import dataclass

import torch

from minianyflow.support.errors import InputError

FPS = 16  # frames per second of Wan's videos
WAN_CLIP = {"frames": 81, "height": 480, "width": 832, "length": 512}  # height, width: pixels; length: prompt tokens
WAN22_CLIP = WAN_CLIP | {"frames": 121, "height": 704, "width": 1280}  # of Wan2.2-TI2V-5B, at 24 per second
CODECS = {16: (8, FPS), 48: (16, 24)}  # latent channels: pixels per side of a latent, frames per second
# The negative prompt in Wan2.1's configuration (sample_neg_prompt), which Wan's and AnyFlow's guidance is against.
WAN_NULL = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"  # noqa: RUF001
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def fps_of(channels: int) -> int:
    """Frames per second of the videos of a codec with so many latent channels."""
    return CODECS.get(channels, CODECS[16])[1]


@dataclass(frozen=True)
class Options:
    """Size and speed of the videos, length and null prompt of the texts, and the dtype that both are stored in.

    Raises InputError for what Wan cannot take.
    """

    frames: int = WAN_CLIP["frames"]
    height: int = WAN_CLIP["height"]
    width: int = WAN_CLIP["width"]
    fps: float = float(FPS)
    length: int = WAN_CLIP["length"]
    dtype: str = "bf16"
    null: str = WAN_NULL

    def __post_init__(self):
        if self.frames < 1 or self.frames % 4 != 1:
            raise InputError(f"frames={self.frames}; expected 4 n + 1, like 17 or 81: the codec takes four together")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                raise InputError(f"{name}={value}; expected a multiple of 16")
        for name, most in (("fps", 1000), *((name, 10**5) for name in ("length", "frames", "height", "width"))):
            if not 0 < getattr(self, name) <= most:
                raise InputError(f"{name}={getattr(self, name)}; expected more than 0, at most {most}")
