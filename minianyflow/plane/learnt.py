"""A velocity learnt from samples alone, in place of a formula: the teacher and the truth of a target without one."""

import torch
from torch import Tensor

from minianyflow.batch import batches
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.plane.students import Budget, frozen
from minianyflow.samplers import sample_ode
from minianyflow.training import Role, train
from toy_data.own import Sampled


class Learnt(Sampled):
    """Samples `rows` (n, D), and the network whose diagonal u(z, t, t) learned their velocity."""

    def __init__(self, rows: Tensor, network):
        super().__init__(rows)
        self.network = network

    @torch.no_grad()
    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """u(z, t, t): (B, D)."""
        t = t.clamp(0, 1)  # an adaptive solver looks past its end
        return self.network(z, t, t)

    def flow(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Where a long ODE of the velocity takes z (B, D), from t to r, each the same in all rows."""
        return sample_ode(self.velocity, z, torch.stack([t[0], r[0]]), tolerance=1e-6)[-1]


def learn(law: Sampled, budget: Budget, quiet: bool = True, position: int = 0) -> Learnt:
    """Flow matching on the samples: a network twice as wide as a student's, four times its rows, like steps."""
    torch.set_num_threads(1)
    network = MLP(law.shape, 2 * budget.width, budget.depth)
    teacher = Role(network, FlowMapLoss({}, weight=torch.ones_like), lr=budget.lr, ema=0.99)
    draw = batches(law.sample, 4 * budget.rows, diagonal=1.0, end=0.0)
    bar = {"desc": "learning the velocity", "position": position, "disable": quiet or None}
    train({"teacher": teacher}, draw, max(1, budget.evaluations // (5 * budget.rows)), progress=bar)
    return Learnt(law.rows, frozen(teacher.average.module, teacher.average.module.state_dict()))
