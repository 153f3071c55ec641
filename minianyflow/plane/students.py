"""Trained students of the plane, and every method's sampler by its name: all that a picture of them needs.

`demo.run` trains and writes them; those of the committed runs are in toy_data/students.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FLOW_MAPS
from minianyflow.samplers import sample_consistency, sample_euler, sample_flow_map
from minianyflow.support.errors import InputError, choose
from minianyflow.times import generator, time_grid
from toy_data import plane

STUDENTS = Path(plane.__file__).parent / "students"  # of the spiral; of another target in a folder of its name
METHODS = ("euler", *FLOW_MAPS, "consistency")


@dataclass(frozen=True)
class Budget:
    """What every method gets: training steps, rows of a batch for each seed, learning rate, network."""

    steps: int = 10000
    rows: int = 128
    lr: float = 1e-2
    width: int = 64
    depth: int = 4


def sample(method, network, dataset, z, nfe, draw=0, **condition):
    """The trajectory (nfe + 1, B, 2) of one method from noise `z` (B, 2) in `nfe` evaluations."""
    if choose("method", method, dict.fromkeys(METHODS, method)) == "euler":
        return sample_euler(plane.load(dataset).velocity, z, time_grid(nfe))
    if method == "consistency":
        return sample_consistency(network, z, time_grid(nfe), generator(nfe, draw), **condition)
    return sample_flow_map(network, z, time_grid(nfe), **condition)


def load_student(method, copy=0, folder=STUDENTS):
    """The trained network u(z, t, r) of one seed, from what `run` wrote; by default the one in toy_data/."""
    path = Path(folder) / f"{choose('method', method, dict.fromkeys(METHODS[1:], method))}.safetensors"
    if not path.exists():
        raise InputError(f"no {path.name} in {folder}; make one with python -m minianyflow demo --output {folder}")
    with safe_open(path, "pt") as file:
        made, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    seeds, budget = json.loads(made["seeds"]), Budget(**json.loads(made["budget"]))
    if not 0 <= copy < len(seeds):
        raise InputError(f"copy {copy} of a student with {len(seeds)} copies; expected 0 to {len(seeds) - 1}")
    network = MLP(width=budget.width, depth=budget.depth, seeds=seeds[copy : copy + 1])
    network.load_state_dict({name: value[copy : copy + 1] for name, value in weights.items()})
    return network.eval().requires_grad_(False)
