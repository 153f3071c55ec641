"""Scenes of frames that follow each other: exposure bias on the circle, and bouncing balls.

Both come from the committed students, by the samplers of the library; what was sampled once is kept.
"""

from functools import cache

import torch

from minianyflow.live.player import time_axis
from minianyflow.live.scene import Scene, dropdown, slider
from minianyflow.measures import sobol_noise
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.plane import exposure
from minianyflow.times import generator
from toy_data.circle import CircleProcess

SEEDS = list(range(10))
ARM_COLOURS = dict(zip(exposure.ARMS, exposure.COLOURS, strict=True))
TRAINED = [0, 1, 2]  # seeds of the committed students
TYPICAL = 1  # in docs/video/exposure.json the nearest to the mean of the three: they differ by up to two times
OWN, TRUE = "its own frames", "true frames"


@cache
def process():
    """The circle process."""
    return CircleProcess()


@cache
def true_clips(count, seed):
    """Clips of the process itself, (count, 16, 2): the true context."""
    return process().clips.sample(count, generator(seed, 1))


@cache
def circle_student(arm, copy):
    """The committed student of one arm and training seed."""
    return exposure.load_student(arm, copy)


@cache
def made_clips(arm, copy, steps, context, count, seed):
    """Clips (count, 16, 2) of a student, `steps` evaluations a frame, and how many evaluations a clip took."""
    u, z = EvaluationCounter(circle_student(arm, copy)), sobol_noise(count, (process().frames, 2), seed)
    clips = exposure.sample_clips(u, z, steps, true_clips(count, seed) if context == TRUE else None)
    return clips, u.rows // count


class Exposure(Scene):
    """A point on a circle, frame by frame: two students, after their own frames or after true ones."""

    title = "Exposure bias: living on one's own frames"
    offline = (("context", (OWN, TRUE)), ("steps", (1, 2, 4)), ("right", ("on-policy", "on-policy, detached")))
    offline_particles = 120

    @property
    def particles(self):
        """Clips drawn."""
        return 256

    def make_controls(self):
        """Whose frames come before, how many steps a frame takes, which students."""
        arms = list(exposure.KEPT)
        return {
            "context": dropdown("each frame after", [OWN, TRUE]),
            "steps": slider("steps a frame", [1, 2, 4, 16], 1),
            "left": dropdown("left", arms),
            "right": dropdown("right", arms, "on-policy"),
            "copy": slider("training seed", TRAINED, TYPICAL),
            "seed": slider("noise, seed", SEEDS, 0),
        }

    def draw(self, pack, particles, context, steps, left, right, copy, seed):
        """Two rings of clips, and the radius error by frame."""
        truth, frames = true_clips(particles, seed), list(range(process().frames))
        panels, lines = [], []
        for arm in (left, right):
            clips, evaluations = made_clips(arm, copy, steps, context, particles, seed)
            error = exposure.radius_error(clips)
            last, lost = float(error[:, -1].mean()), float((error[:, -1] > exposure.LOST).float().mean())
            panel = {"kind": "plane", "title": arm, "colour": ARM_COLOURS[arm], "limit": 1.6, "trails": 0, "ring": 1}
            panel |= {"points": pack.add_points(clips.transpose(0, 1)), "times": frames, "followed": [0, 1, 2]}
            panel |= {"exact": pack.add_points(truth.transpose(0, 1))} if context == TRUE else {}
            after_true = made_clips(arm, copy, steps, TRUE, particles, seed)[0]
            bias = last / float(exposure.radius_error(after_true)[:, -1].mean())
            panel["measures"] = [
                ["radius error, last frame", f"{last:.3f}"],
                ["over that after true frames", f"{bias:.2f}"],
            ]
            panel["measures"] += [["clips lost", f"{lost:.0%}"]]
            panel["measures"] += [["evaluations a clip", str(evaluations)]]
            panels.append(panel)
            for way, dash in ((OWN, []), (TRUE, [7, 5])):
                by_frame = exposure.radius_error(made_clips(arm, copy, steps, way, particles, seed)[0]).mean(0)
                line = {"points": pack.add_points(by_frame, 1.0), "times": frames, "colour": ARM_COLOURS[arm]}
                lines.append(line | {"dash": dash, "label": f"{arm}, {'own' if way == OWN else 'true'}"})
        floor = pack.add_points(exposure.radius_error(truth).mean(0), 1.0)
        lines.append({"points": floor, "times": frames, "colour": "#000000", "dash": [2, 4], "label": "data"})
        chart = {"kind": "chart", "title": "radius error", "xlabel": "frame", "times": [0, 5, 10, 15], "log": True}
        chart |= {"limits": [0.025, 0.8], "ticks": [0.03, 0.1, 0.3], "lines": lines, "aspect": 1}
        note = f"Every frame is made after {context}. Black dots: three clips, the same noise left and right."
        note += " Thick grey: the true clips." if context == TRUE else ""
        axis = time_axis(frames, "frame", 0)
        return pack.scene(self.title, [*panels, chart], axis, note=note, duration=6000)


# ---- video: what follows needs diffusers, which takes seconds to load, so it is loaded when such a scene is opened

STEPS = (1, 2, 4, 8, 16)
WHOLE = {
    "flow map, on-policy": "on_policy",
    "flow map, Eulerian": "eulerian",
    "flow map, mixed": "mixed",
    "consistency, re-noised": "consistency",
    "teacher, Euler": "teacher",
}
CHUNKS = {
    "flow map, on-policy": "causal_on_policy",
    "flow map, teacher forcing": "causal",
    "teacher, Euler": "causal_teacher",
}


@cache
def video_parts():
    """The codec and the embeddings of both prompts."""
    from minianyflow.networks.wan import TextEncoder
    from minianyflow.networks.weights import load_codec
    from minianyflow.video.stages import WEIGHTS, path_of
    from toy_data import blobs

    return load_codec(path_of(WEIGHTS, "codec")), TextEncoder()(blobs.PROMPTS)


@cache
def video_student(name):
    """The committed network of one stage."""
    from minianyflow.networks.weights import load_network
    from minianyflow.video.stages import WEIGHTS, path_of

    return load_network(path_of(WEIGHTS, name))


@cache
def made_videos(name, steps, seed):
    """One clip for each prompt, (2, 17, 16, 16), evaluations a clip, share of frames with the balls asked for."""
    from minianyflow.video.measures import physics
    from minianyflow.video.report import how_sampled, sample

    codec, prompts = video_parts()
    network = video_student(name)
    u = Counted(network)
    z = torch.randn(2, 5, 4, 4, 4, generator=generator(seed))
    clips = codec.decode(sample(how_sampled(name), u, z, prompts, steps))
    asked = torch.tensor([1, 2])  # balls, by the order of the prompts
    right = physics(clips, asked)["count"] == asked[:, None]
    return clips, u.rows // 2, float(right.float().mean())


class Counted(EvaluationCounter):
    """A counter that still says how its network cuts a clip into chunks."""

    def __init__(self, network):
        super().__init__(network)
        self.first, self.rest = getattr(network, "first", None), getattr(network, "rest", None)


class Video(Scene):
    """Bouncing balls from the same noise: steps as columns, whole clips at once above, chunk by chunk below."""

    title = "Video: steps as columns, both architectures"
    offline = (("whole", ("on_policy", "consistency", "teacher")), ("chunks", tuple(CHUNKS.values())))

    def make_controls(self):
        """Which student above, which below, and the noise."""
        return {
            "whole": dropdown("whole clips (above)", WHOLE),
            "chunks": dropdown("chunk by chunk (below)", CHUNKS),
            "seed": slider("noise, seed", SEEDS, 0),
        }

    def draw(self, pack, particles, whole, chunks, seed):
        """Two rows of clips."""
        panels = []
        for name in (whole, chunks):
            for steps in STEPS:
                clips, evaluations, right = made_videos(name, steps, seed)
                unit = " a chunk" if name == chunks else ""
                title = f"{steps} step{'s' if steps > 1 else ''}{unit}"
                panel = {"kind": "video", "title": title, "clips": pack.add_video(clips)}
                measures = [["balls as asked", f"{right:.0%}"], ["evaluations", str(evaluations)]]
                panels.append(panel | {"measures": measures})
        note = "Above whole clips at once, below chunk by chunk, from the same noise. Asked for: one ball, two balls."
        note += " Balls as asked: the share of frames in which that many are found."
        axis = time_axis(range(17), "frame", 0)
        return pack.scene(
            self.title, panels, axis, note=note, columns=len(STEPS), duration=2200, loop=True, position=0.5
        )
