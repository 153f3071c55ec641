"""Bouncing balls from the committed video students. Importing this takes seconds, since it needs diffusers."""

import time
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from minianyflow.live.controls import Scene, dropdown, slider
from minianyflow.live.player import time_axis
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.times import generator, time_grid
from minianyflow.video.measures import physics
from minianyflow.video.motion import flights
from minianyflow.video.report import how_sampled, sample
from minianyflow.video.stages import WEIGHTS, path_of
from minianyflow.wan.data.options import FPS
from minianyflow.wan.stream import stream_frames
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


NOTE = "Chunks of eight frames, half a second; each sees what came just before, never more, so it can go on for ever."
RECORDED = " Here recorded, ten seconds of each choice; in a notebook (7b) it does."


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
        return {"whole": dropdown("whole clips (above)", WHOLE), "chunks": dropdown("chunk by chunk (below)", CHUNKS)}

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


class Stream(Scene):
    """Balls without end. While one chunk plays, the page asks for the next: it takes the steps and the prompt of now.

    `state["chunk"]` counts what was asked for. `offline_page` holds a recording of each choice in place of that.
    """

    title = "A stream: change steps and prompt while it plays"
    offline: ClassVar = {"steps": (1, 4), "prompt": blobs.PROMPTS}
    run, least = None, 8  # (network, seed) of the stream; frames that are made at once

    def make_controls(self):
        """Steps per chunk, prompt, network."""
        students = {label: name for label, name in CHUNKS.items() if name != "causal_teacher"}
        prompt, network = dropdown("prompt", blobs.PROMPTS), dropdown("network", students)
        return {"steps": slider("steps a chunk", STEPS, 4), "prompt": prompt, "network": network}

    def redraw(self):
        """The next chunk, if the page asks for one: a control that is moved while it plays waits for that."""
        if self.state.get("chunk", 0) != self.shown.get("chunk"):
            super().redraw()

    def offline_page(self):
        """Ten seconds of each choice, from the same noise."""
        self.least = 10 * FPS
        return super().offline_page()

    def draw(self, pack, steps, prompt, network, seed, chunk=0):
        """The frames of the next chunk, by the `job` of now: times and prompt."""
        recorded, start, clip = self.least > 8, time.perf_counter(), []
        self.job, balls = (time_grid(steps), TextEncoder()([prompt])), 1 + blobs.PROMPTS.index(prompt)
        if recorded or self.run != (network, seed):
            self.run, self.count, self.first, self.seconds, u = (network, seed), 0, None, 0.0, load(network)
            chunks, jobs = (5, u.first, u.rest), iter(lambda: self.job, None)
            self.frames = stream_frames(u, load("codec").vae, (4, 4, 4), jobs, seed, *chunks)
        while sum(map(len, clip)) < self.least:
            clip.append(next(self.frames).mean(1).clamp(0, 1))
            self.first = self.first or time.perf_counter() - start
        clip, self.seconds = torch.cat(clip), self.seconds + time.perf_counter() - start
        before, self.count = self.count, self.count + len(clip)
        right = physics(clip[None], torch.tensor([balls]))["count"] == balls
        made = {"first frame after": f"{self.first:.2f} s", "made, frames a second": f"{self.count / self.seconds:.0f}"}
        measures = {"balls as asked": f"{float(right.float().mean()):.0%}"} | ({} if recorded else made)
        panel = {"kind": "video", "title": f"{prompt}, {steps} step{'s' * (steps > 1)} a chunk", "measures": measures}
        panel |= {"clips": pack.add_video(clip[None]), "first": before}
        more = {"loop": True, "note": NOTE + RECORDED} if recorded else {"chunk": chunk, "stream": True, "note": NOTE}
        axis = time_axis(range(before, self.count + 1 - recorded), "frame", 0)  # a stream shows its last frame as long
        return pack.scene(self.title, [panel], axis, columns=2, duration=1000 * len(clip) / FPS, **more)
