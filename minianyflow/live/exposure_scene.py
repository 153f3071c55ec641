"""Exposure bias on the circle: the committed students' clips, frame by frame, after true frames or their own."""

from functools import cache
from typing import ClassVar

from torch import Tensor

from minianyflow.live.controls import Scene, dropdown, slider
from minianyflow.live.player import time_axis
from minianyflow.measures import sobol_noise
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.plane import exposure
from minianyflow.times import generator
from toy_data.circle import CircleProcess

COLOURS = dict(zip(exposure.ARMS, exposure.COLOURS, strict=True))
TYPICAL = 1  # of the three training seeds the nearest to their mean in docs/video/exposure.json; errors differ twofold
OWN, TRUE = "its own frames", "true frames"
PROCESS = CircleProcess()


@cache
def true_clips(count: int, seed: int) -> Tensor:
    """Clips of the process itself, (count, 16, 2): the true context."""
    return PROCESS.clips.sample(count, generator(seed, 1))


@cache
def student_clips(arm: str, copy: int, steps: int, context: str, count: int, seed: int) -> tuple[Tensor, int]:
    """Clips (count, 16, 2) of a student at `steps` evaluations per frame, and the number of evaluations per clip."""
    u, z = EvaluationCounter(exposure.load_student(arm, copy)), sobol_noise(count, (PROCESS.frames, 2), seed)
    clips = exposure.sample_clips(u, z, steps, true_clips(count, seed) if context == TRUE else None)
    return clips, u.rows // count


class Exposure(Scene):
    """A point on a circle, frame by frame: two students, after their own frames or after true ones."""

    title = "Exposure bias: living on one's own frames"
    particles = 256  # clips
    offline: ClassVar = {"context": (OWN, TRUE), "steps": (1, 2, 4), "right": ("on-policy", "on-policy, detached")}
    offline_particles = 120

    def make_controls(self):
        """Which frames are the context, the number of steps per frame, the students."""
        return {
            "context": dropdown("each frame after", [OWN, TRUE]),
            "steps": slider("steps a frame", [1, 2, 4, 16], 1),
            "left": dropdown("left", exposure.KEPT),
            "right": dropdown("right", exposure.KEPT, "on-policy"),
            "copy": slider("training seed", [0, 1, 2], TYPICAL),
        }

    def draw(self, pack, particles, context, steps, left, right, copy, seed):
        """Two rings of clips, and the radius error by frame."""
        truth, frames = true_clips(particles, seed), range(PROCESS.frames)
        given = truth.transpose(0, 1) if context == TRUE else None
        panels, lines = [], []

        def add_line(errors, colour, dash, label):
            points = pack.add_points(errors.mean(0), 1.0)
            lines.append({"points": points, "times": [*frames], "colour": colour, "dash": dash, "label": label})

        for arm in (left, right):
            sampled = {mode: student_clips(arm, copy, steps, mode, particles, seed) for mode in (OWN, TRUE)}
            errors = {mode: exposure.radius_error(clips) for mode, (clips, _) in sampled.items()}
            (clips, evaluations), last = sampled[context], errors[context][:, -1]
            measures = {
                "radius error, last frame": f"{last.mean():.3f}",
                "over that after true frames": f"{last.mean() / errors[TRUE][:, -1].mean():.2f}",
                "clips lost": f"{(last > exposure.LOST).float().mean():.0%}",
                "evaluations a clip": str(evaluations),
            }
            style = {"limit": 1.6, "trails": 0, "ring": 1, "followed": [0, 1, 2], "measures": measures}
            panels.append(pack.plane(arm, COLOURS[arm], clips.transpose(0, 1), frames, given, **style))
            add_line(errors[OWN], COLOURS[arm], [], f"{arm}, own")
            add_line(errors[TRUE], COLOURS[arm], [7, 5], f"{arm}, true")
        add_line(exposure.radius_error(truth), "#000000", [2, 4], "data")
        chart = {"kind": "chart", "title": "radius error", "xlabel": "frame", "times": [0, 5, 10, 15], "log": True}
        chart |= {"limits": [0.025, 0.8], "ticks": [0.03, 0.1, 0.3], "lines": lines, "aspect": 1}
        note = f"Every frame is made after {context}. Black dots: three clips, the same noise left and right."
        note += " Thick grey: the true clips." if context == TRUE else ""
        return pack.scene(self.title, [*panels, chart], time_axis(frames, "frame", 0), note=note, duration=6000)
