"""Scenes on the plane: the race, the triangle of times, backward simulation.

All of it comes from the library's samplers. Exact paths are computed once for a target, a seed and a number.
"""

from functools import cache, partial
from itertools import pairwise

import ipywidgets
import torch
from torch.func import functional_call

from minianyflow.flow_map import rollout, velocity
from minianyflow.live.player import time_axis
from minianyflow.live.scene import STYLE, WIDE, Scene, dropdown, slider
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
LIMIT, TRAILS, FOLLOWED = 2.4, 90, 6
SEEDS = list(range(10))
DATASETS = ["spiral", "ring8"]  # those that committed students know


@cache
def noise(count, seed):
    """Noise (count, 2) that all panels share."""
    return sobol_noise(count, (2,), seed)


@cache
def exact_paths(dataset, count, seed):
    """The exact flow of those noises at FINE + 1 times, (FINE + 1, count, 2), and the solver's evaluations."""
    u = EvaluationCounter(tangent_of(dataset))
    paths = sample_ode(lambda z, t: u(z, t, t), noise(count, seed), time_grid(FINE))
    return paths, u.rows // count


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


def triangle_panel(title, colour, chain, drag=False):
    """A chain of times in the triangle, dots to be dragged or not."""
    return {"kind": "triangle", "title": title, "colour": colour, "chain": chain, "snap": FINE, "drag": drag}


class Race(Scene):
    """Same noise, exact flow, Euler, flow map, consistency; 1 to 128 steps."""

    title = "The race: same noise, four ways to data"
    offline = (("steps", (1, 2, 4, 8, 16, 32, 64)), ("dataset", tuple(DATASETS)))

    def make_controls(self):
        """What to race on."""
        return {
            "steps": slider("steps", [1, 2, 4, 8, 16, 32, 64, 128], 4),
            "dataset": dropdown("data", DATASETS),
            "flow_map": dropdown("flow map", flow_maps()),
            "seed": seed_control(),
        }

    def draw(self, pack, particles, steps, dataset, flow_map, seed):
        """Four panels."""
        z, data = noise(particles, seed), reference(dataset, particles)
        exact, solver = exact_paths(dataset, particles, seed)
        fine, times = time_grid(FINE), time_grid(steps)
        panels = [plane_panel(pack, "exact flow", COLOURS["exact"], exact, fine, exact[-1], solver, data)]
        for method in ("euler", flow_map, "consistency"):
            network = None if method == "euler" else EvaluationCounter(student(method, dataset))
            path = sample(method, network, dataset, z, steps, seed)
            count = network.rows // particles if network else steps
            title, colour = LABELS[method].replace("\n", " "), COLOURS[method]
            panels.append(plane_panel(pack, title, colour, path, times, exact[-1], count, data, exact))
        note = "Black dots: the same six noises. Thick grey: where the exact flow takes them. Grey dots: its ends."
        return pack.scene(self.title, panels, time_axis(times if steps > 8 else time_grid(32)), note=note)


class Triangle(Scene):
    """Drag jumps (t, r) in the triangle of times; learned against exact, from exact states at the first time."""

    title = "The triangle of times: every jump from t down to r"
    offline = (("jumps", (1, 2, 4)), ("start", (1.0, 0.75, 0.5)), ("target", (0.0, 0.25)))
    chain = None  # of times, where dots were moved by hand; else evenly spaced

    def make_controls(self):
        """The first and the last time, and how many jumps between them."""
        times = [k / FINE for k in range(FINE + 1)]
        methods = flow_maps() | {"Euler, exact velocity": "euler"}
        return {
            "jumps": slider("jumps", [1, 2, 3, 4, 6, 8], 1),
            "start": slider("from t", times[1:], 1.0),
            "target": slider("to r", times[:-1], 0.0),
            "method": dropdown("map", methods),
            "dataset": dropdown("data", DATASETS),
            "seed": seed_control(),
        }

    def on_change(self, change):
        """A control was moved: times that were placed by hand are spread evenly again, if it was a control of times."""
        if change["owner"] in (self.controls[name] for name in ("jumps", "start", "target")):
            self.chain = None
        super().on_change(change)

    def picked(self, chain):
        """A dot was moved: the controls of the first and the last time follow."""
        if len(chain) != self.controls["jumps"].value + 1:  # the slider was moved while it was on its way
            return
        for name, value in (("start", chain[0]), ("target", chain[-1])):
            with self.quiet(name):
                self.controls[name].value = value
        self.chain = chain
        self.redraw()

    def draw(self, pack, particles, jumps, start, target, method, dataset, seed):
        """The triangle, the learned jumps, the exact flow."""
        chain = check_chain(self.chain or spread(start, target, jumps))
        whole, solver = exact_paths(dataset, particles, seed)
        first, last = (round(FINE * (1 - time)) for time in (chain[0], chain[-1]))
        exact, between = whole[first : last + 1], time_grid(FINE)[first : last + 1]
        u = EvaluationCounter(tangent_of(dataset) if method == "euler" else student(method, dataset))
        with torch.no_grad():
            path = rollout(u, exact[0], torch.tensor(chain))
        colour, count = COLOURS[method], u.rows // particles
        dots = triangle_panel("drag the dots", colour, chain, drag=True)
        short = len(chain) < 6  # all times fit below
        dots["measures"] = [["times", " > ".join(f"{time:.2f}" for time in chain)] if short else ["jumps", str(count)]]
        learned = f"{LABELS[method].replace(chr(10), ' ')}: {count} jump{'s' * (count > 1)}"
        panels = [
            dots,
            plane_panel(pack, learned, colour, path, chain, exact[-1], count, exact=exact),
            plane_panel(pack, "exact flow", COLOURS["exact"], exact, between, exact[-1], f"{solver} from 1 to 0"),
        ]
        stops = between[:: max(1, len(between) // 32)].tolist()
        note = "A dot is a jump. All start from exact states. Thick grey: the exact flow of six. Grey dots: its ends."
        axis = time_axis([*stops, chain[-1]] if stops[-1] != chain[-1] else stops)
        return pack.scene(self.title, panels, axis, note=note)


class BackwardSimulation(Scene):
    """A rollout of N steps and the three jumps that stand for it: which step g is kept, and where the gradient goes."""

    title = "Backward simulation: a rollout of N steps as three jumps"
    offline = (("steps", (4, 8, 16, 50)), ("kept", (0, 1, 3, 7)))  # with two steps g changes nothing

    def make_controls(self):
        """N and g, as on-policy training draws them."""
        controls = {
            "steps": slider("N, steps of the rollout", STEPS, 16),
            "kept": ipywidgets.IntSlider(3, 0, 15, description="g, the step kept", layout=WIDE, style=STYLE),
            "method": dropdown("flow map", flow_maps()),
            "dataset": dropdown("data", DATASETS),
            "seed": seed_control(),
        }
        controls["steps"].observe(lambda change: setattr(controls["kept"], "max", change["new"] - 1), "value")
        return controls

    def possible(self, steps, kept, **others):
        """A rollout of N steps has those from 0 to N - 1."""
        return kept < steps

    def draw(self, pack, particles, steps, kept, method, dataset, seed):
        """The jumps in the triangle, both rollouts, the gradient through every jump."""
        kept = min(kept, steps - 1)
        z, (exact, _) = noise(particles, seed), exact_paths(dataset, particles, seed)
        network, all_times = student(method, dataset), time_grid(steps)
        whole, few = EvaluationCounter(network), EvaluationCounter(network)
        number, step = torch.full((particles,), steps), torch.full((particles,), kept)
        with torch.no_grad():
            path = rollout(whole, z, all_times)
            simulated = backward_simulation(few, z, number, step)
        times = backward_simulation_times(number[:1], step[:1])[:, 0]
        moving = [0, *(k + 1 for k in range(3) if times[k] > times[k + 1])]
        simulated, times = simulated[moving], times[moving]
        colour, grey = COLOURS[method], "#777777"
        dots = triangle_panel(f"N = {steps}, g = {kept}", colour, times.tolist())
        dots["dots"] = [list(pair) for pair in pairwise(all_times.tolist())]
        dots["measures"] = [["grey", f"the {steps} steps"], ["coloured", f"the {len(times) - 1} jumps"]]
        evaluations = [each.rows // particles for each in (whole, few)]
        panels = [
            dots,
            plane_panel(pack, f"all {steps} steps", grey, path, all_times, exact[-1], evaluations[0], exact=exact),
            plane_panel(
                pack, f"{len(times) - 1} jumps", colour, simulated, times, exact[-1], evaluations[1], exact=exact
            ),
            gradient_panel(network, dataset, seed, {"#444444": all_times, colour + "55": times}),
        ]
        note = "Bars: the on-policy gradient (its norm) that reaches the weights through each evaluation; 128 samples."
        note += f" Dark: all {steps} steps. Coloured: the {len(times) - 1} jumps. Thick grey: the exact flow."
        return pack.scene(self.title, panels, time_axis(time_grid(32)), note=note)


def spread(start, target, jumps):
    """A falling chain of times on the grid, as even as it can be; fewer jumps where there is no room."""
    first, last = round(FINE * start), round(FINE * target)
    count = min(jumps, max(1, first - last))
    return [round(first + (last - first) * k / count) / FINE for k in range(count + 1)]


def check_chain(chain):
    """The chain, if it falls along the grid inside [0, 1]; InputError otherwise."""
    places = [FINE * time for time in chain]
    falls = len(chain) > 1 and all(a > b for a, b in pairwise(places)) and places[-1] >= 0 and places[0] <= FINE
    if not falls or any(place != round(place) for place in places):
        raise InputError(f"times {chain}; expected falling ones, {FINE}ths in [0, 1]: choose `to r` below `from t`")
    return list(chain)


def tangent_of(dataset):
    """The exact velocity as if it were an average velocity: jumps of it are Euler's."""
    mixture = plane.load(dataset)
    return lambda z, t, r: mixture.velocity(z, t)


def gradients(network, mixture, z, times, seed=0):
    """The norm of the on-policy loss's gradient that reaches the weights through each jump: a list of N.

    The real score is exact; the fake score is the student's own velocity, which is how a fake score starts.
    """
    copies = [
        {name: value.detach().clone().requires_grad_(True) for name, value in network.named_parameters()}
        for _ in times[1:]
    ]
    turn = iter(copies)  # a rollout asks for one jump after another
    x = rollout(lambda z, t, r: functional_call(network, next(turn), (z, t, r)), z, times)[-1]
    source = generator(seed, 1)
    t, eps = torch.rand(len(z), generator=source), torch.randn(z.shape, generator=source)
    fake = partial(velocity, network)
    distribution_matching_loss(x, mixture.velocity, fake, t, eps).mean().backward()
    return [float(torch.stack([each.grad.square().sum() for each in copy.values()]).sum().sqrt()) for copy in copies]


def gradient_panel(network, dataset, seed, rollouts):
    """Bars of the gradient through every jump of some rollouts, {colour: times}; the last is drawn above the others."""
    bars = []
    for colour, times in rollouts.items():
        norms = gradients(network, plane.load(dataset), noise(128, seed), times, seed)
        for (t, r), height in zip(pairwise(times.tolist()), norms, strict=True):
            bars.append({"from": t, "to": r, "height": height, "colour": colour})
    top = 1.1 * max(bar["height"] for bar in bars)
    ticks = [0, float(f"{top / 2:.1g}"), float(f"{top / 1.1:.1g}")]
    panel = {"kind": "chart", "title": "gradient through each jump", "xlabel": "t", "times": [1, 0.5, 0], "aspect": 1}
    panel |= {"ticks": ticks, "limits": [0, max(top, ticks[-1])], "bars": bars}
    of_jumps = [bar["height"] for bar in bars if bar["colour"] == list(rollouts)[-1]]
    return panel | {"measures": [["largest jump's share", f"{max(of_jumps) / sum(of_jumps):.0%}"]]}
