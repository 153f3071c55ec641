"""Bouncing balls from the committed video students. Importing this takes seconds, since it needs diffusers."""

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from minianyflow.live.controls import Scene, dropdown
from minianyflow.live.player import time_axis
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.times import generator
from minianyflow.video.measures import physics
from minianyflow.video.motion import flights
from minianyflow.video.report import how_sampled, sample
from minianyflow.video.stages import WEIGHTS, path_of
from toy_data import blobs

STEPS = (1, 2, 4, 8, 16)
WHOLE = {
    "flow map, on-policy": "on_policy",
    "flow map, Eulerian": "eulerian",
    "flow map, mixed": "mixed",
    "flow map, dense: velocity kept": "inertia",
    "consistency, re-noised": "consistency",
    "teacher, Euler": "teacher",
}
CHUNKS = {
    "flow map, on-policy": "causal_on_policy",
    "flow map, teacher forcing": "causal",
    "teacher, Euler": "causal_teacher",
}


@cache
def load(name: str) -> torch.nn.Module:
    """The codec, or the committed network of a stage."""
    return (load_codec if name == "codec" else load_network)(path_of(WEIGHTS, name))


@cache
def clips_of(name: str, steps: int, seed: int) -> tuple[Tensor, int, float, float]:
    """One clip per prompt, (2, 17, 16, 16); evaluations per clip; the share of frames with as many balls as asked for;
    how far, in pixels, the balls are off straight flights."""
    network, prompts = load(name), TextEncoder()(blobs.PROMPTS)
    u = EvaluationCounter(network)
    u.first, u.rest = getattr(network, "first", None), getattr(network, "rest", None)  # how it cuts a clip into chunks
    z, balls = torch.randn(2, 5, 4, 4, 4, generator=generator(seed)), torch.tensor([1, 2])
    clips = load("codec").decode(sample(how_sampled(name), u, z, prompts, steps))
    right = physics(clips, balls)["count"] == balls[:, None]
    off = sum(float(flights(clip[None], ball).residual) for ball, clip in enumerate(clips, 1)) / len(clips)
    return clips, u.rows // 2, float(right.float().mean()), off


class Video(Scene):
    """Bouncing balls from the same noise: steps as columns, whole clips at once above, chunk by chunk below."""

    title = "Video: steps as columns, both architectures"
    offline: ClassVar = {"whole": ("on_policy", "inertia", "consistency", "teacher"), "chunks": tuple(CHUNKS.values())}

    def make_controls(self):
        """The student above, the student below."""
        return {
            "whole": dropdown("whole clips (above)", WHOLE),
            "chunks": dropdown("chunk by chunk (below)", CHUNKS),
        }

    def draw(self, pack, whole, chunks, seed):
        """Two rows of clips."""
        panels = []
        for name, unit in ((whole, ""), (chunks, " a chunk")):
            for steps in STEPS:
                clips, evaluations, right, off = clips_of(name, steps, seed)
                measures = {"balls as asked": f"{right:.0%}", "evaluations": str(evaluations)}
                measures["off straight flight"] = f"{off:.2f} px"
                title = f"{steps} step{'s' * (steps > 1)}{unit}"
                panels.append({"kind": "video", "title": title, "clips": pack.add_video(clips), "measures": measures})
        note = "Above whole clips at once, below chunk by chunk, from the same noise. Asked for: one ball, two balls."
        note += " Balls as asked: the share of frames in which that many are found. Off straight flight: data read .1."
        axis, more = time_axis(range(17), "frame", 0), {"columns": len(STEPS), "position": 0.5, "loop": True}
        return pack.scene(self.title, panels, axis, note=note, duration=2200, **more)
