"""What training costs: evaluations of every network, exact ones too. A backward counts as two forwards."""

from collections.abc import Callable
from itertools import product

from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.training import Role


def counted(velocity: Callable) -> tuple[Callable, EvaluationCounter]:
    """An exact velocity(z, t, **condition) that counts its evaluations, and the counter."""
    counter = EvaluationCounter(lambda z, t, r, **condition: velocity(z, t, **condition))
    return lambda z, t, **condition: counter(z, t, t, **condition), counter


def spent(counters: dict[str, EvaluationCounter]) -> dict:
    """The evaluations so far, for all seeds: by name, and the sum, where a backward counts as two forwards."""
    total = sum(counter.rows + 2 * counter.with_grad for counter in counters.values())
    by_name = {name: {"forwards": one.rows, "backwards": one.with_grad} for name, one in counters.items()}
    return {"evaluations": total, **by_name}


def step_cost(roles: dict[str, Role], draw: Callable, counters: dict[str, EvaluationCounter], probes: int = 8) -> float:
    """The mean evaluations of a step, from the losses of the first ones; the counters start again at zero."""
    for role, step in product(roles.values(), range(probes)):
        role.loss(role.network, draw(step))
    cost = spent(counters)["evaluations"] / probes
    for counter in counters.values():
        counter.rows = counter.with_grad = 0
    return cost
