"""Scenes on the plane, computed in the page: race, triangle of times, backward simulation, a target that one draws."""

from functools import cache

import torch
from torch import Tensor

from minianyflow.live.controls import Scene, dropdown, slider
from minianyflow.live.player import Pack
from minianyflow.measures import sliced_w2
from minianyflow.objectives import FLOW_MAPS
from minianyflow.on_policy import STEPS
from minianyflow.plane.students import METHODS, STUDENTS, load_student
from minianyflow.support.figures import COLOURS, LABELS
from minianyflow.times import generator
from toy_data import plane

FINE = 64  # the times of the triangle lie on this grid
SEEDS, DRAWS = range(10), 16  # of the noise; of each floor
DATASETS = ("spiral", "ring8")  # those with committed students
RACE = (1, 2, 4, 8, 16, 32, 64, 128)
LABELS = {method: label.replace("\n", " ") for method, label in LABELS.items()}
LEARNERS = ("eulerian", "semigroup", "mixed", "consistency")  # of what is drawn
MAPS = {LABELS[method]: method for method in ("teacher_step", *FLOW_MAPS)}  # the students that are flow maps


def flat_weights(network: torch.nn.Module, copy: int = 0) -> Tensor:
    """The weights of one copy of an MLP as the page reads them: W (in, out), then b, layer by layer."""
    layers = [
        getattr(network, f"{kind}{k}")[copy].flatten() for k in range(network.layers) for kind in ("weight", "bias")
    ]
    return torch.cat(layers)


def sobol_states(dimensions: int) -> tuple[Tensor, Tensor]:
    """torch's scrambled Sobol generators of all SEEDS: directions (seeds, D, 30) and shifts (seeds, D)."""
    engines = [torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed) for seed in SEEDS]
    return torch.stack([each.sobolstate for each in engines]), torch.stack([each.shift for each in engines])


@cache
def floors(dataset: str, particles: int) -> dict[str, tuple[float, float]]:
    """What sliced W2 reads of true samples, as (mean, deviation): fresh ones, and even ones as the reference is."""
    mixture = plane.load(dataset)
    reference = mixture.sample_stratified(particles, generator(0))
    laws = {"fresh": mixture.sample, "data": mixture.sample_stratified}
    read = {
        name: torch.tensor([sliced_w2(draw(particles, generator(seed)), reference) for seed in range(1, 1 + DRAWS)])
        for name, draw in laws.items()
    }
    return {name: (float(values.mean()), float(values.std())) for name, values in read.items()}


class PlaneScene(Scene):
    """What the three share: targets, weights, noises, and the seeds of fresh noise."""

    def data(self, pack: Pack) -> dict:
        """Arrays of all targets and students."""
        directions, shift = sobol_states(2)
        targets, students, methods = {}, {}, [method for method in METHODS if method != "euler"]
        for dataset in DATASETS:
            mixture, folder = plane.load(dataset), STUDENTS if dataset == "spiral" else STUDENTS / dataset
            reference = mixture.sample_stratified(self.particles, generator(0))
            targets[dataset] = {"means": pack.add_exact(mixture.means), "sigma": float(mixture.sigma)}
            targets[dataset] |= {"reference": pack.add_exact(reference), "floors": floors(dataset, self.particles)}
            loaded = {method: load_student(method, folder=folder) for method in methods}
            students[dataset] = {method: pack.add_exact(flat_weights(network)) for method, network in loaded.items()}
        sizes = [
            loaded[methods[0]].weight0.shape[1],
            *(getattr(loaded[methods[0]], f"bias{k}").shape[-1] for k in range(5)),
        ]
        return {
            "sobol": {"directions": pack.add_exact(directions), "shift": pack.add_exact(shift)},
            "targets": targets,
            "students": students,
            "sizes": sizes,
            "fresh": {steps: [generator(steps, seed).initial_seed() for seed in SEEDS] for steps in RACE},
            "gradient": [generator(seed, 1).initial_seed() for seed in SEEDS],
        }

    def described(self, *names, **more):
        """With the names and colours of all methods."""
        return super().described(*names, **more) | {"labels": LABELS, "colours": COLOURS}


class Race(PlaneScene):
    """The same noise by the exact flow, Euler, a flow map and a consistency map; 1 to 128 steps."""

    title, kind = "The race: same noise, four ways to data", "race"

    def make_controls(self):
        """Number of steps, data, students."""
        return {
            "steps": slider("steps", RACE, 4),
            "dataset": dropdown("data", DATASETS),
            "flow_map": dropdown("flow map", MAPS),
        }


class Triangle(PlaneScene):
    """Jumps (t, r), dragged through the triangle of times: learned against exact, both from the same exact states."""

    title, kind = "The triangle of times: every jump from t down to r", "triangle"

    def make_controls(self):
        """The first and the last time, the number of jumps between them, the map, data."""
        times = [k / FINE for k in range(FINE + 1)]
        return {
            "jumps": slider("jumps", [1, 2, 3, 4, 6, 8], 1),
            "start": slider("from t", times[1:], 1.0),
            "target": slider("to r", times[:-1], 0.0, below="start"),
            "method": dropdown("map", MAPS | {"Euler, exact velocity": "euler"}),
            "dataset": dropdown("data", DATASETS),
        }


class BackwardSimulation(PlaneScene):
    """A rollout of N steps as three jumps, and the gradient that reaches the weights through each evaluation."""

    title, kind = "Backward simulation: a rollout of N steps as three jumps", "backward_simulation"

    def make_controls(self):
        """N and g, as on-policy training draws them; the map, data."""
        return {
            "steps": slider("N, steps of the rollout", STEPS, 16),
            "g": slider("g, the step kept", range(max(STEPS)), 3, below="steps"),
            "method": dropdown("map", MAPS),
            "dataset": dropdown("data", DATASETS),
        }


class Draw(PlaneScene):
    """A target drawn by hand, and four networks that learn it in the page."""

    title, kind, particles = "Draw your own target, and watch it learn", "draw", 400

    def data(self, pack):
        """Noises, and the seed of the networks' start."""
        directions, shift = sobol_states(2)
        sobol = {"directions": pack.add_exact(directions), "shift": pack.add_exact(shift)}
        return {"sobol": sobol, "start": generator(0).initial_seed(), "learners": LEARNERS}

    def make_controls(self):
        """What is drawn, who learns, and the steps that are shown."""
        learners = {"all four": "all"} | {LABELS[method]: method for method in LEARNERS}
        return {
            "target": dropdown("target", ("heart", "two rings", "figure eight", "your own")),
            "learners": dropdown("learn", learners),
            "steps": slider("steps shown", (1, 2, 4, 8, 16), 1),
        }
