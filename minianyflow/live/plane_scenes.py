"""Scenes on the plane: the race, the triangle of times, backward simulation. The library's samplers make all paths."""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import ClassVar

import ipywidgets
import torch
from torch import Tensor
from torch.func import functional_call

from minianyflow.flow_map import rollout, velocity
from minianyflow.live.controls import LOOKS, Scene, dropdown, slider
from minianyflow.live.player import Pack, time_axis
from minianyflow.measures import path_error, sliced_w2, sobol_noise
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.objectives import FLOW_MAPS
from minianyflow.on_policy import STEPS, backward_simulation, backward_simulation_times, distribution_matching_loss
from minianyflow.plane.students import STUDENTS, load_student, sample
from minianyflow.samplers import sample_ode
from minianyflow.support.errors import InputError
from minianyflow.support.figures import COLOURS, LABELS
from minianyflow.times import generator, time_grid
from toy_data import plane

FINE = 64  # steps of the exact paths; the times of the triangle lie on this grid
TRIANGLE = {"kind": "triangle", "snap": FINE}
DATASETS = ("spiral", "ring8")  # those with committed students
LABELS = {method: label.replace("\n", " ") for method, label in LABELS.items()}
MAPS = {LABELS[method]: method for method in ("teacher_step", *FLOW_MAPS)}  # the students that are flow maps


@cache
def exact_paths(dataset: str, count: int, seed: int) -> tuple[Tensor, int]:
    """The exact flow of Sobol noise at FINE + 1 times, (FINE + 1, count, 2), and the solver's evaluations."""
    u = EvaluationCounter(tangent_of(dataset))
    paths = sample_ode(lambda z, t: u(z, t, t), sobol_noise(count, (2,), seed), time_grid(FINE))
    return paths, u.rows // count


@cache
def student(method: str, dataset: str) -> torch.nn.Module:
    """The committed student of a method."""
    return load_student(method, folder=STUDENTS if dataset == "spiral" else STUDENTS / dataset)


def tangent_of(dataset: str) -> Callable:
    """The exact velocity as if it were an average velocity: its jumps are Euler steps."""
    mixture = plane.load(dataset)
    return lambda z, t, r: mixture.velocity(z, t)


def particles_panel(
    pack: Pack, title: str, colour: str, path: Tensor, times, exact: Tensor, evaluations, data=None, trace: bool = True
) -> dict:
    """A panel of particles with their measures. exact: the exact paths; `trace` draws those of followed particles."""
    measures = {"path error": f"{path_error(path[-1], exact[-1]):.3f}"}
    measures |= {} if data is None else {"sliced W2 to data": f"{sliced_w2(path[-1], data):.3f}"}
    style = {"limit": 2.4, "trails": 90, "followed": list(range(6))}
    panel = pack.plane(title, colour, path, times, exact if trace else None, ghosts=exact[-1], **style)
    return panel | {"measures": measures | {"evaluations": str(evaluations)}}


class Race(Scene):
    """The same noise by the exact flow, Euler, a flow map and a consistency map; 1 to 128 steps."""

    title = "The race: same noise, four ways to data"
    offline: ClassVar = {"steps": (1, 2, 4, 8, 16, 32, 64), "dataset": DATASETS}

    def make_controls(self):
        """Number of steps, data, students."""
        return {
            "steps": slider("steps", [1, 2, 4, 8, 16, 32, 64, 128], 4),
            "dataset": dropdown("data", DATASETS),
            "flow_map": dropdown("flow map", MAPS),
        }

    def draw(self, pack, particles, steps, dataset, flow_map, seed):
        """Four panels."""
        z, data = sobol_noise(particles, (2,), seed), plane.load(dataset).sample_stratified(particles, generator(0))
        exact, evaluations = exact_paths(dataset, particles, seed)
        fine, times, colour = time_grid(FINE), time_grid(steps), COLOURS["exact"]
        panels = [particles_panel(pack, "exact flow", colour, exact, fine, exact, evaluations, data, trace=False)]
        for method in ("euler", flow_map, "consistency"):
            network = None if method == "euler" else EvaluationCounter(student(method, dataset))
            path = sample(method, network, dataset, z, steps, seed)
            evaluations = network.rows // particles if network else steps
            title, colour = LABELS[method], COLOURS[method]
            panels.append(particles_panel(pack, title, colour, path, times, exact, evaluations, data))
        note = "Black dots: the same six noises. Thick grey: where the exact flow takes them. Grey dots: its ends."
        return pack.scene(self.title, panels, time_axis(times if steps > 8 else time_grid(32)), note=note)


class Triangle(Scene):
    """Jumps (t, r), dragged through the triangle of times: learned against exact, both from the same exact states."""

    title = "The triangle of times: every jump from t down to r"
    offline: ClassVar = {"jumps": (1, 2, 4), "start": (1.0, 0.75, 0.5), "target": (0.0, 0.25)}
    chain = None  # the times where a user has placed the dots; else they are evenly spaced

    def make_controls(self):
        """The first and the last time, the number of jumps between them, the map, data."""
        times = [k / FINE for k in range(FINE + 1)]
        return {
            "jumps": slider("jumps", [1, 2, 3, 4, 6, 8], 1),
            "start": slider("from t", times[1:], 1.0),
            "target": slider("to r", times[:-1], 0.0),
            "method": dropdown("map", MAPS | {"Euler, exact velocity": "euler"}),
            "dataset": dropdown("data", DATASETS),
        }

    def on_change(self, change):
        """A control was moved; if it was a control of times, they are evenly spaced again."""
        if change["owner"] in (self.controls[name] for name in ("jumps", "start", "target")):
            self.chain = None
        super().on_change(change)

    def picked(self, chain):
        """A dot was moved: the controls of the first and the last time follow, without a drawing of their own."""
        if len(chain) != self.controls["jumps"].value + 1:  # the slider was moved in the meantime
            return
        for name, time in (("start", chain[0]), ("target", chain[-1])):
            control = self.controls[name]
            control.unobserve(self.on_change, "value")
            try:
                control.value = time
            finally:
                control.observe(self.on_change, "value")
        self.chain = chain
        self.redraw()

    def draw(self, pack, particles, jumps, start, target, method, dataset, seed):
        """The triangle, the learned jumps, the exact flow."""
        chain = check_chain(self.chain or spread(start, target, jumps))
        paths, solver = exact_paths(dataset, particles, seed)
        part = slice(round(FINE * (1 - chain[0])), round(FINE * (1 - chain[-1])) + 1)
        exact, between = paths[part], time_grid(FINE)[part]
        u = EvaluationCounter(tangent_of(dataset) if method == "euler" else student(method, dataset))
        with torch.no_grad():
            path = rollout(u, exact[0], torch.tensor(chain))
        colour, count = COLOURS[method], u.rows // particles
        short = len(chain) < 6  # all times fit below
        measures = {"times": " > ".join(f"{time:.2f}" for time in chain)} if short else {"jumps": str(count)}
        learned, solved = f"{LABELS[method]}: {count} jump{'s' * (count > 1)}", f"{solver} from 1 to 0"
        panels = [
            TRIANGLE | {"title": "drag the dots", "colour": colour, "chain": chain, "drag": True, "measures": measures},
            particles_panel(pack, learned, colour, path, chain, exact, count),
            particles_panel(pack, "exact flow", COLOURS["exact"], exact, between, exact, solved, trace=False),
        ]
        stops = between[:: max(1, len(between) // 32)].tolist()
        stops += [chain[-1]] if stops[-1] != chain[-1] else []
        note = "A dot is a jump. All start from exact states. Thick grey: the exact flow of six. Grey dots: its ends."
        return pack.scene(self.title, panels, time_axis(stops), note=note)


class BackwardSimulation(Scene):
    """A rollout of N steps and the three jumps that stand for it: where step g splits it, where the gradient goes."""

    title = "Backward simulation: a rollout of N steps as three jumps"
    offline: ClassVar = {"steps": (4, 8, 16, 50), "g": (0, 1, 3, 7)}  # with two steps g changes nothing

    def make_controls(self):
        """N and g, as on-policy training draws them; the map, data."""
        controls = {
            "steps": slider("N, steps of the rollout", STEPS, 16),
            "g": ipywidgets.IntSlider(3, 0, 15, description="g, the step kept", **LOOKS),
            "method": dropdown("flow map", MAPS),
            "dataset": dropdown("data", DATASETS),
        }
        controls["steps"].observe(lambda change: setattr(controls["g"], "max", change["new"] - 1), "value")
        return controls

    def possible(self, steps, g, **others):
        """A rollout of N steps has steps 0 to N - 1."""
        return g < steps

    def draw(self, pack, particles, steps, g, method, dataset, seed):
        """The jumps in the triangle, both rollouts, the gradient through every jump."""
        z, (exact, _) = sobol_noise(particles, (2,), seed), exact_paths(dataset, particles, seed)
        network, all_times = student(method, dataset), time_grid(steps)
        whole, few = EvaluationCounter(network), EvaluationCounter(network)
        number, step = torch.full((particles,), steps), torch.full((particles,), min(g, steps - 1))
        with torch.no_grad():
            path = rollout(whole, z, all_times)
            simulated = backward_simulation(few, z, number, step)
        times = backward_simulation_times(number[:1], step[:1])[:, 0]
        moving = [0, *(k + 1 for k in range(3) if times[k] > times[k + 1])]  # a jump of length zero is left out
        simulated, times = simulated[moving], times[moving]
        colour, jumps = COLOURS[method], f"{len(times) - 1} jumps"
        measures = {"grey": f"the {steps} steps", "coloured": f"the {jumps}"}
        dots = [list(pair) for pair in pairwise(all_times.tolist())]
        title, counts = f"N = {steps}, g = {int(step[0])}", [u.rows // particles for u in (whole, few)]
        panels = [
            TRIANGLE | {"title": title, "colour": colour, "chain": times.tolist(), "dots": dots, "measures": measures},
            particles_panel(pack, f"all {steps} steps", "#777777", path, all_times, exact, counts[0]),
            particles_panel(pack, jumps, colour, simulated, times, exact, counts[1]),
            gradient_panel(network, dataset, seed, {"#444444": all_times, colour + "55": times}),
        ]
        note = "Bars: the on-policy gradient (its norm) that reaches the weights through each evaluation; 128 samples."
        note += f" Dark: all {steps} steps. Coloured: the {jumps}. Thick grey: the exact flow."
        return pack.scene(self.title, panels, time_axis(time_grid(32)), note=note)


def spread(start: float, target: float, jumps: int) -> list[float]:
    """A falling chain of times on the grid, as even as possible; fewer jumps where there is no room for all."""
    first, last = round(FINE * start), round(FINE * target)
    count = min(jumps, max(1, first - last))
    return [round(first + (last - first) * k / count) / FINE for k in range(count + 1)]


def check_chain(chain: list[float]) -> list[float]:
    """The chain, if it falls along the grid inside [0, 1]; else raises InputError."""
    falling = sorted({round(FINE * time) / FINE for time in chain}, reverse=True)
    if falling != list(chain) or not 0 <= chain[-1] < chain[0] <= 1:
        raise InputError(f"times {chain}; expected falling ones, {FINE}ths in [0, 1]: choose `to r` below `from t`")
    return list(chain)


def gradients(network, mixture, z: Tensor, times: Tensor, seed: int = 0) -> list[float]:
    """The norm of the on-policy gradient through each jump. The real score is exact, the fake one the student's."""
    weights = dict(network.named_parameters())
    copies = [{name: w.detach().clone().requires_grad_(True) for name, w in weights.items()} for _ in times[1:]]
    of_jump = iter(copies)  # a rollout evaluates one jump after another, here with weights of its own
    x = rollout(lambda z, t, r: functional_call(network, next(of_jump), (z, t, r)), z, times)[-1]
    source = generator(seed, 1)
    t, eps = torch.rand(len(z), generator=source), torch.randn(z.shape, generator=source)
    distribution_matching_loss(x, mixture.velocity, partial(velocity, network), t, eps).mean().backward()
    return [float(sum(w.grad.square().sum() for w in copy.values()).sqrt()) for copy in copies]


def gradient_panel(network, dataset: str, seed: int, rollouts: dict[str, Tensor]) -> dict:
    """Bars of the gradient through each jump of some rollouts, {colour: times}; the last one is drawn on top."""
    bars = []
    for colour, times in rollouts.items():
        norms = gradients(network, plane.load(dataset), sobol_noise(128, (2,), seed), times, seed)
        jumps = zip(pairwise(times.tolist()), norms, strict=True)
        bars += [{"from": t, "to": r, "height": norm, "colour": colour} for (t, r), norm in jumps]
    top = max(bar["height"] for bar in bars)
    ticks = [0, float(f"{0.55 * top:.1g}"), float(f"{top:.1g}")]
    share = f"{max(norms) / sum(norms):.0%}"
    panel = {"kind": "chart", "title": "gradient through each jump", "xlabel": "t", "times": [1, 0.5, 0], "aspect": 1}
    panel |= {"ticks": ticks, "limits": [0, max(1.1 * top, ticks[-1])], "bars": bars}
    return panel | {"measures": {"largest jump's share": share}}
