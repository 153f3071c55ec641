"""Bouncing balls from the committed video students. Importing this takes seconds, since it needs diffusers."""

import json
import time
from functools import cache
from typing import ClassVar

import torch

from minianyflow.live.controls import Scene, dropdown, slider
from minianyflow.live.player import STATIC, Pack, time_axis
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec, load_network, read_weights
from minianyflow.times import generator, time_grid
from minianyflow.video.measures import physics
from minianyflow.video.report import how_sampled
from minianyflow.video.stages import WEIGHTS, path_of
from minianyflow.wan.data.options import FPS
from minianyflow.wan.stream import stream_frames
from toy_data import blobs

STEPS = (1, 2, 4, 8, 16)
WHOLE = {
    "flow map, on-policy": "on_policy",
    "flow map, Eulerian": "eulerian",
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


def packed(pack: Pack, name: str) -> dict:
    """The committed weights of a network, 16 bits each, one after another; and the graphs that take them."""
    state, config, _ = read_weights(path_of(WEIGHTS, name), "codec", "wan", "causal", "dense")
    graphs = ("dense",) if "inner" in config else ("chunk0", "chunk1", "chunk2") if "first" in config else ("whole",)
    state = {key: weight for key, weight in state.items() if not key.startswith("vae.encoder")}
    order = [(key.removeprefix("transformer."), [*weight.shape]) for key, weight in state.items()]
    flat = torch.cat([weight.flatten() for weight in state.values()])
    return {"graphs": graphs, "order": order, "flat": pack.add_exact(flat.half())}


class Video(Scene):
    """Bouncing balls from the same noise: steps as columns, whole clips at once above, chunk by chunk below."""

    title, kind = "Video: steps as columns, both architectures", "video"

    def make_controls(self):
        """The student above, the student below."""
        return {"whole": dropdown("whole clips (above)", WHOLE), "chunks": dropdown("chunk by chunk (below)", CHUNKS)}

    def data(self, pack):
        """The graphs, the weights of all students, and the seeds of noise and of fresh noise."""
        names = [*WHOLE.values(), *CHUNKS.values()]
        return {
            "graphs": json.loads((STATIC / "graphs.json").read_text("utf-8")),
            "networks": {name: packed(pack, name) | {"how": how_sampled(name)} for name in names},
            "codec": packed(pack, "codec"),
            "noises": [generator(seed).initial_seed() for seed in range(10)],
            "fresh": {steps: generator(steps, 0).initial_seed() for steps in STEPS},
            "steps": STEPS,
        }


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
        return pack.scene(self.title, [panel], axis, columns=3, duration=1000 * len(clip) / FPS, **more)
