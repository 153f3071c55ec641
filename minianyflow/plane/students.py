"""Trained students of the plane: how they sample and are saved. The committed ones are in toy_data/students."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FLOW_MAPS
from minianyflow.samplers import sample_consistency, sample_euler, sample_flow_map
from minianyflow.support.errors import InputError, choose
from minianyflow.times import generator, time_grid
from toy_data import plane

STUDENTS = Path(plane.__file__).parent / "students"  # of the spiral; of another target in a folder of its name
METHODS = ("euler", *FLOW_MAPS, "teacher_step", "consistency")


@dataclass(frozen=True)
class Budget:
    """What every method gets: evaluations per seed (costs.py), rows per batch and seed, rates, kind of network."""

    evaluations: int = 6_000_000
    rows: int = 128
    lr: float = 1e-2
    muon: float | None = 0.03  # of square weights, in place of lr: `training.Role`
    width: int = 64
    depth: int = 4
    sharp: bool = False

    @property
    def ema(self) -> float:
        """The decay of a flow map's average: over a twenty-fifth of the steps, if a row costs 5.6 evaluations."""
        return max(0.0, 1 - 25 * 5.6 * self.rows / self.evaluations)


def sample(method: str, network, dataset: str, z: Tensor, nfe: int, draw: int = 0, **condition) -> Tensor:
    """The trajectory (nfe + 1, B, D) of one method from noise `z` (B, D) in `nfe` evaluations."""
    choose("method", method, dict.fromkeys(METHODS))
    if method == "euler":
        return sample_euler(plane.load(dataset).velocity, z, time_grid(nfe))
    if method == "consistency":
        return sample_consistency(network, z, time_grid(nfe), generator(nfe, draw), **condition)
    return sample_flow_map(network, z, time_grid(nfe), **condition)


def load_student(method: str, copy: int = 0, folder: str | Path = STUDENTS) -> MLP:
    """The network u(z, t, r) of one seed that a race wrote; by default of the committed spiral."""
    choose("method", method, dict.fromkeys(METHODS[1:]))
    weights, seeds, budget = read_copy(Path(folder) / f"{method}.safetensors", copy)
    shape = weights[f"bias{budget['depth']}"].shape[2:]  # of what it returns
    sharp = budget.get("sharp", False)
    return frozen(MLP(shape, budget["width"], budget["depth"], seeds, sharp=sharp), weights)


def save_copies(path: Path, weights: dict[str, Tensor], budget, seeds, **metadata: str) -> None:
    """Write weights with one copy per seed along their first axis, and the budget and the seeds beside them."""
    metadata |= {"budget": json.dumps(asdict(budget)), "seeds": json.dumps(list(seeds))}
    save_file(weights, path, metadata)


def read_copy(path: str | Path, copy: int, prefix: str = "") -> tuple[dict[str, Tensor], list[int], dict]:
    """The float32 weights of one copy from a file of `save_copies`, [its seed], and the budget; InputError if none.

    prefix: only weights whose names begin with it, without it.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no {path.name} in {path.parent}; expected a folder that `demo` or `exposure` has written")
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            weights = {name.removeprefix(prefix): file.get_tensor(name)[copy : copy + 1].float() for name in names}
        seeds, budget = json.loads(metadata["seeds"]), json.loads(metadata["budget"])
    except (SafetensorError, TypeError, KeyError, ValueError) as problem:
        raise InputError(
            f"{path} is no file of students ({problem}); write it anew with `demo` or `exposure`"
        ) from None
    if not names or not 0 <= copy < len(seeds):
        raise InputError(f"copy {copy} of {prefix or path.stem}; expected 0 to {len(seeds) - 1} of a trained student")
    return weights, seeds[copy : copy + 1], budget


def frozen(network, weights: dict[str, Tensor]):
    """The network with these weights, ready to sample."""
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
