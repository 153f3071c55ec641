"""Exposure bias on the circle: the committed students' clips, frame by frame, after true frames or their own."""

import torch

from minianyflow.live.controls import Scene, dropdown, slider
from minianyflow.live.plane_scenes import SEEDS, flat_weights, sobol_states
from minianyflow.plane import exposure
from minianyflow.plane.circle_measures import lawful_distance
from minianyflow.plane.circle_student import WINDOW
from minianyflow.times import generator
from toy_data.circle import SPEEDS, CircleProcess

STUDENTS, LONG = (*exposure.KEPT, exposure.TURNED), 160  # frames of the longest clips
COLOURS = dict(zip(exposure.ARMS, exposure.COLOURS, strict=True)) | {exposure.TURNED: "#0072B2"}
TYPICAL = 1  # of the three training seeds the nearest to their mean in docs/video/exposure.json; errors differ twofold
COPIES = (0, 1, 2)


class Exposure(Scene):
    """A point on a circle, frame by frame: two students, after their own frames or after true ones."""

    title, kind = "Exposure bias: living on one's own frames", "exposure"
    particles = 256  # clips

    def make_controls(self):
        """Which frames are the context, the number of steps per frame, the students."""
        return {
            "context": dropdown(
                "each frame after", {"its own frames": "own", "true frames": "true", "its own, 160 frames": "long"}
            ),
            "steps": slider("steps a frame", [1, 2, 4, 16], 1),
            "left": dropdown("left", STUDENTS),
            "right": dropdown("right", STUDENTS, "on-policy"),
            "copy": slider("training seed", COPIES, TYPICAL),
        }

    def data(self, pack):
        """Weights of all students and training seeds, noises, true clips."""
        process = CircleProcess()
        students = {arm: [exposure.load_student(arm, copy).mlp for copy in COPIES] for arm in STUDENTS}
        mlp = students[STUDENTS[0]][0]
        directions, shift = sobol_states(2 * process.frames)
        truth = torch.stack([process.clips.sample(self.particles, generator(seed, 1)) for seed in SEEDS])
        return {
            "sobol": {"directions": pack.add_exact(directions), "shift": pack.add_exact(shift)},
            "students": {arm: [pack.add_exact(flat_weights(each)) for each in of] for arm, of in students.items()},
            "sizes": [mlp.weight0.shape[1], *(getattr(mlp, f"bias{k}").shape[-1] for k in range(mlp.layers))],
            "truth": pack.add_exact(truth),
            "frames": process.frames,
            "window": WINDOW,
            "lost": exposure.LOST,
            "long": LONG,
            "speeds": SPEEDS,
            "lawful": lawful_distance(process),
            "turned": exposure.TURNED,
            "fresh": [generator(seed, 2).initial_seed() for seed in SEEDS],
        }

    def described(self, *names, **more):
        """With the colours of the students."""
        return super().described(*names, **more) | {"labels": {}, "colours": COLOURS}
