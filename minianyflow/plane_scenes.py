"""Scenes on the plane: the race, the triangle of times, backward simulation. All of it comes from the library's samplers.

Exact paths are computed once for a target, a seed and a number of particles, and kept.
"""

from functools import cache

import torch

from minianyflow.demo import STUDENTS, load_student, sample
from minianyflow.flow_map import rollout, velocity
from minianyflow.measures import path_error, sliced_w2, sobol_noise
from minianyflow.networks import EvaluationCounter
from minianyflow.objectives import FLOW_MAPS
from minianyflow.on_policy import STEPS, backward_simulation, backward_simulation_times, distribution_matching_loss
from minianyflow.pairs import generator
from minianyflow.pictures import COLOURS, LABELS
from minianyflow.player import time_axis
from minianyflow.samplers import sample_ode
from minianyflow.scene import Scene, dropdown, slider
from minianyflow.schedules import time_grid
from toy_data import plane

FINE = 64  # steps of the exact paths; the times of the triangle lie on this grid
LIMIT, TRAILS, FOLLOWED = 2.6, 90, 6
SEEDS = list(range(10))


@cache
def noise(count, seed):
    """Noise (count, 2) that all panels share."""
    return sobol_noise(count, (2,), seed)


@cache
def exact_paths(dataset, count, seed):
    """The exact flow of those noises at FINE + 1 times, (FINE + 1, count, 2)."""
    return sample_ode(plane.load(dataset).velocity, noise(count, seed), time_grid(FINE))


@cache
def reference(dataset, count):
    """Data to measure so many samples against."""
    return plane.load(dataset).sample_stratified(count, generator(0))


@cache
def student(method, dataset):
    """The committed student of a method."""
    return load_student(method, folder=STUDENTS if dataset == "spiral" else STUDENTS / dataset)


def seed_control():
    """Which noise."""
    return slider("noise, seed", SEEDS, 0)


def flow_maps():
    """{label: method} of the students that are flow maps."""
    return {LABELS[name].replace("\n", " "): name for name in ("mixed", *FLOW_MAPS)}


def plane_panel(pack, title, colour, path, times, exact_end, evaluations, data=None, exact=None):
    """A panel of particles, and its measures: path error, sliced W2 (if `data` is given), evaluations."""
    measures = [["path error", f"{path_error(path[-1], exact_end):.3f}"]]
    measures += [["sliced W2 to data", f"{sliced_w2(path[-1], data):.3f}"]] if data is not None else []
    measures += [["evaluations", str(evaluations)]]
    panel = {"kind": "plane", "title": title, "colour": colour, "limit": LIMIT, "trails": TRAILS}
    panel |= {"points": pack.add_points(path), "times": [float(time) for time in times]}
    panel |= {"ghosts": pack.add_points(exact_end), "measures": measures, "followed": list(range(FOLLOWED))}
    return panel | ({"exact": pack.add_points(exact)} if exact is not None else {})


class Race(Scene):
    """Same noise, exact flow, Euler, flow map, consistency; 1 to 128 steps."""

    title = "The race: same noise, four ways to data"
    offline = {"steps": [1, 2, 4, 8, 16, 32, 64]}

    def make_controls(self):
        """What to race on."""
        return {
            "steps": slider("steps", [1, 2, 4, 8, 16, 32, 64, 128], 4),
            "dataset": dropdown("data", list(plane.DATASETS)),
            "flow_map": dropdown("flow map", flow_maps()),
            "seed": seed_control(),
        }

    def draw(self, pack, particles, steps, dataset, flow_map, seed):
        """Four panels."""
        z, exact, data = noise(particles, seed), exact_paths(dataset, particles, seed), reference(dataset, particles)
        fine, times = time_grid(FINE), time_grid(steps)
        panels = [plane_panel(pack, "exact flow", COLOURS["exact"], exact, fine, exact[-1], "an ODE solver's", data)]
        for method in ("euler", flow_map, "consistency"):
            network = None if method == "euler" else EvaluationCounter(student(method, dataset))
            path = sample(method, network, dataset, z, steps, seed)
            count = network.rows // particles if network else steps
            title, colour = LABELS[method].replace("\n", " "), COLOURS[method]
            panels.append(plane_panel(pack, title, colour, path, times, exact[-1], count, data, exact))
        note = "Black dots: the same six noises everywhere. Thick grey: where the exact flow takes them. Grey dots: its ends."
        return pack.scene(self.title, panels, time_axis(times if steps > 8 else time_grid(32)), note=note)
