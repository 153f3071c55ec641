"""The five scenes of the course, one line each: `from minianyflow.live import scenes`, then `scenes.race()`.

    race                  same noise: exact flow, Euler, flow map, consistency, 1 to 128 steps
    triangle              jumps dragged through the triangle of times, learned against exact
    backward_simulation   three jumps over a rollout of N steps; where the gradient goes
    exposure              frames one after another, after true ones or its own
    video                 small latents decoded and playing, steps as columns
Options set the controls at the start: `scenes.race(steps=16, dataset="ring8")`. A scene loads what it needs, no more.
"""

from importlib import import_module

from minianyflow.support.errors import choose

SCENES = {
    "race": ("plane_scenes", "Race"),
    "triangle": ("plane_scenes", "Triangle"),
    "backward_simulation": ("plane_scenes", "BackwardSimulation"),
    "exposure": ("clip_scenes", "Exposure"),
    "video": ("clip_scenes", "Video"),
}


def open_scene(name, **start):
    """The scene of that name; start: {control: value}."""
    module, kind = choose("scene", name, SCENES)
    return getattr(import_module(f"minianyflow.live.{module}"), kind)(**start)


def race(**start):
    """The same noise by the exact flow, Euler, a flow map and a consistency map, in 1 to 128 steps."""
    return open_scene("race", **start)


def triangle(**start):
    """Jumps (t, r) in the triangle of times, to be dragged; learned against exact."""
    return open_scene("triangle", **start)


def backward_simulation(**start):
    """A rollout of N steps as three jumps at most, which step g is kept, and where the gradient goes."""
    return open_scene("backward_simulation", **start)


def exposure(**start):
    """A point on a circle, frame by frame, after true frames or a student's own."""
    return open_scene("exposure", **start)


def video(**start):
    """Bouncing balls at 1 to 16 steps, whole clips at once or chunk by chunk."""
    return open_scene("video", **start)
