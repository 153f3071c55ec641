"""The seven scenes of the course, one line per scene: `from minianyflow.live import scenes`, then `scenes.race()`.

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
    "draw": ("plane_scenes", "Draw", "Draw and learn"),
    "video": ("video_scene", "Video", "Video"),
    "stream": ("video_scene", "Stream", "A stream"),
}


def open_scene(name: str, **start) -> Scene:
    """The scene of that name; start: {control: value}."""
    module, kind, _ = choose("scene", name, SCENES)
    return getattr(import_module(f"minianyflow.live.{module}"), kind)(**start)


race = partial(open_scene, "race")
triangle = partial(open_scene, "triangle")
backward_simulation = partial(open_scene, "backward_simulation")
exposure = partial(open_scene, "exposure")
draw = partial(open_scene, "draw")
video = partial(open_scene, "video")
stream = partial(open_scene, "stream")
