"""Bad input of any public function of the root and of the MLP is an InputError of one line, clear to a student."""

import pytest
import torch

from minianyflow import (
    MLP,
    ConsistencyLoss,
    FlowMapLoss,
    GaussianMixture,
    Guidance,
    Role,
    backward_simulation_times,
    batches,
    draw_on_policy,
    draw_pairs,
    draw_rollouts,
    eulerian_target,
    interpolate,
    jump,
    path_error,
    rollout,
    sample_consistency,
    sample_ode,
    sliced_w2,
    time_grid,
    time_shift,
    train,
)
from tests.refused import refused
from toy_data import plane
from toy_data.circle import CircleProcess

RING = plane.ring8()
Z, ONES, HALF, NAN = torch.ones(4, 2), torch.ones(4), torch.full((4,), 0.5), float("nan")
DIAGONAL = {"x": Z, "eps": Z, "t": HALF, "r": HALF}
BELOW = DIAGONAL | {"r": 0 * ONES, "objective_draw": HALF}
FORWARD = FlowMapLoss({"eulerian": 1.0})


def still(z, t, r):
    return 0 * z


def narrow(z, t, r=None):
    return z[:, :1]


def run(steps=2, accumulate=1, loss=FORWARD, **options):
    role = Role(MLP(), loss, warmup=0, **options)
    train({"student": role}, batches(RING.sample, 8), steps, accumulate, progress=False)


TIMES = [
    (lambda: time_grid(0), "at least 1"),
    (lambda: time_grid(2.5), "whole number"),
    (lambda: time_shift(ONES, 0.0), "not positive"),
    (lambda: draw_pairs(8, diagonal=0.8, end=0.5), "at most 1"),
]
FLOW_MAPS = [
    (lambda: rollout(still, Z, torch.tensor([0.0, 1.0])), "must fall"),
    (lambda: rollout(still, Z, torch.tensor([1.5, 0.0])), "must fall"),
    (lambda: rollout(still, Z, torch.tensor([1.0])), r"steps \+ 1"),
    (lambda: rollout(still, Z, [1.0, 0.0]), "expected a tensor"),
    (lambda: sample_consistency(still, Z, torch.ones(3, 4)), r"steps \+ 1"),
    (lambda: sample_ode(lambda z, t: z, Z, torch.tensor([1.0, 1.0, 0.0])), "two equal times"),
    (lambda: jump(still, Z, HALF, ONES), "r > t"),
    (lambda: jump(still, Z, 2 * ONES, HALF), r"\[0, 1\]"),
    (lambda: jump(still, Z, ONES, NAN * HALF), r"\[0, 1\]"),
    (lambda: jump(still, Z, 1.0, 0.0), "expected tensors"),
    (lambda: jump(still, Z, ONES, HALF[:2]), "same shape"),
    (lambda: jump(still, Z, ONES[:2], HALF[:2]), "do not fit"),
    (lambda: jump(narrow, Z, ONES, HALF), "average velocity has shape"),
    (lambda: interpolate(Z, Z[:1], HALF), "the noise has shape"),
]
MIXTURES = [
    (lambda: GaussianMixture(torch.zeros(0, 2), 0.1), "one at least"),
    (lambda: GaussianMixture(torch.zeros(3, 2), -0.1), "positive sigma"),
    (lambda: GaussianMixture(torch.zeros(3, 2), 0.1, torch.zeros(3)), "not all zero"),
    (lambda: GaussianMixture(torch.zeros(3, 2), 0.1, torch.ones(2)), "3 means"),
    (lambda: GaussianMixture(torch.full((3, 2), NAN), 0.1), "NaN"),
    (lambda: RING.flow(NAN * Z, ONES, 0 * ONES), "NaN"),
    (lambda: RING.velocity(torch.zeros(4, 3), ONES), r"expected \(4, 2\)"),
    (lambda: CircleProcess().log_weights(torch.zeros(2, 16, 2)), "past frames"),
    (lambda: sliced_w2(Z, Z[:3]), r"expected \(K n, D\)"),
    (lambda: sliced_w2(Z, Z[:, :1]), "2 and 1 numbers"),
    (lambda: sliced_w2(Z, NAN * Z), "NaN"),
    (lambda: path_error(Z, Z[:3]), "expected the same shape"),
]
LOSSES = [
    (lambda: FlowMapLoss({"eulerain": 1.0}), "did you mean 'eulerian'"),
    (lambda: FlowMapLoss({"eulerian": -1.0}), "not negative"),
    (lambda: FlowMapLoss({"lagrangian": 1.0}), "a teacher's"),
    (lambda: FlowMapLoss({"semigroup": 1.0}, guidance=Guidance(2.0, {}, published=True)), "Eulerian target alone"),
    (lambda: FlowMapLoss({}, guidance=Guidance(2.0, {}))(still, DIAGONAL), "dropped"),
    (lambda: Guidance(0.5, {}), "at least 1"),
    (lambda: FlowMapLoss({})(still, BELOW), "no objective for them"),
    (lambda: eulerian_target(still, Z, ONES, HALF, Z, "backward"), "jvp"),
    (lambda: FORWARD(still, BELOW | {"r": ONES}), "r > t"),
    (lambda: FORWARD(still, BELOW | {"t": 2 * ONES}), r"\[0, 1\]"),
    (lambda: FlowMapLoss({}, narrow)(still, DIAGONAL), "the velocity has shape"),
    (lambda: FlowMapLoss({})(narrow, DIAGONAL), "output"),
    (lambda: ConsistencyLoss(narrow), "average="),
    (lambda: ConsistencyLoss(narrow, form="discreet"), "did you mean 'discrete'"),
    (lambda: ConsistencyLoss(narrow, still, grid=0), "grid >= 1"),
    (lambda: backward_simulation_times(torch.tensor([4]), torch.tensor([4])), "outside 0"),
    (lambda: draw_rollouts(3, steps=(0, 2)), "at least one step"),
    (lambda: draw_on_policy((2,), 4, fake_time="logitnormal"), "did you mean 'logit_normal'"),
]
TRAINING = [
    (lambda: batches(lambda n, source: torch.full((n, 2), NAN), 8), "the data holds NaN"),
    (lambda: run(300, lr=1e30), "expected finite losses"),
    (lambda: run(accumulate=5), "does not divide"),
    (lambda: run(0), "at least 1"),
    (lambda: run(loss=None), r"without a loss: \['student'\]"),
    (lambda: Role(MLP().requires_grad_(False)), "none of whose weights is trained"),
    (lambda: MLP(seeds=(0, 1))(Z, ONES, ONES), "copy="),
    (lambda: MLP()(torch.zeros(4, 3), ONES, ONES), r"expects z \(B, 2\)"),
]


@pytest.mark.parametrize(("call", "words"), [*TIMES, *FLOW_MAPS, *MIXTURES, *LOSSES, *TRAINING])
def test_bad_input_is_one_clear_line(call, words):
    with refused(words):
        call()
