"""The five scenes of the course, one line per scene: `from minianyflow.live import scenes`, then `scenes.race()`.

    race                  the same noise by the exact flow, Euler, a flow map and a consistency map, 1 to 128 steps
    triangle              jumps (t, r) dragged through the triangle of times, learned against exact
    backward_simulation   three jumps for a rollout of N steps; where the gradient goes
    exposure              a point on a circle, frame by frame, after true frames or a student's own
    video                 bouncing balls at 1 to 16 steps, whole clips at once or chunk by chunk

Arguments set the controls at the start: `scenes.race(steps=16, dataset="ring8")`. Only the module of the scene that is
opened is imported.
"""

from functools import partial
from importlib import import_module

from minianyflow.live.controls import Scene
from minianyflow.support.errors import choose

SCENES = {  # name: (module, class, title in the app)
    "race": ("plane_scenes", "Race", "The race"),
    "triangle": ("plane_scenes", "Triangle", "The triangle"),
    "backward_simulation": ("plane_scenes", "BackwardSimulation", "Backward simulation"),
    "exposure": ("exposure_scene", "Exposure", "Exposure bias"),
    "video": ("video_scene", "Video", "Video"),
}


def open_scene(name: str, **start) -> Scene:
    """The scene of that name; start: {control: value}."""
    module, kind, _ = choose("scene", name, SCENES)
    return getattr(import_module(f"minianyflow.live.{module}"), kind)(**start)


race = partial(open_scene, "race")
triangle = partial(open_scene, "triangle")
backward_simulation = partial(open_scene, "backward_simulation")
exposure = partial(open_scene, "exposure")
video = partial(open_scene, "video")
