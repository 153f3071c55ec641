"""Bad input of any public function of the root and of the MLP is an InputError of one line, clear to a student."""

import pytest
import torch

import minianyflow as m
from minianyflow.times import stratified_uniform
from tests.refused import refused
from toy_data import plane
from toy_data.circle import CircleProcess

RING = plane.ring8()
Z, ONES, HALF, NAN, INF = torch.ones(4, 2), torch.ones(4), torch.full((4,), 0.5), float("nan"), float("inf")
DIAGONAL = {"x": Z, "eps": Z, "t": HALF, "r": HALF}
BELOW = DIAGONAL | {"r": 0 * ONES, "objective_draw": HALF}
FORWARD = m.FlowMapLoss({"eulerian": 1.0})


def still(z, t, r):
    return 0 * z


def narrow(z, t, r=None):
    return z[:, :1]


def run(steps=2, accumulate=1, loss=FORWARD, **options):
    role = m.Role(m.MLP(), loss, warmup=0, **options)
    m.train({"student": role}, m.batches(RING.sample, 8), steps, accumulate, progress=False)


TIMES = [
    (lambda: m.time_grid(0), "at least 1"),
    (lambda: m.time_grid(2.5), "whole number"),
    (lambda: m.time_shift(ONES, 0.0), "positive"),
    (lambda: m.time_shift(ONES, INF), "to a thousand"),
    (lambda: m.time_shift(ONES, 1e39), "to a thousand"),
    (lambda: stratified_uniform(-1), "at least 0"),
    (lambda: m.draw_pairs(8, diagonal=0.8, end=0.5), "at most 1"),
    (lambda: m.draw_pairs(8, diagonal=NAN, end=0.5), "at most 1"),
    (lambda: m.draw_pairs(8, drop=INF), "from 0 to 1"),
]
FLOW_MAPS = [
    (lambda: m.rollout(still, Z, torch.tensor([0.0, 1.0])), "must fall"),
    (lambda: m.rollout(still, Z, torch.tensor([1.5, 0.0])), "must fall"),
    (lambda: m.rollout(still, Z, torch.tensor([1.0])), r"steps \+ 1"),
    (lambda: m.rollout(still, Z, torch.tensor([[1.0, 1, 1], [1, 0, 0]])), "a column per state"),
    (lambda: m.rollout(still, Z, [1.0, 0.0]), "expected a tensor"),
    (lambda: m.rollout(still, Z.long(), m.time_grid(2)), "expected floating point"),
    (lambda: m.sample_consistency(still, Z, torch.ones(3, 4)), r"steps \+ 1"),
    (lambda: m.sample_ode(lambda z, t: z, Z, torch.tensor([1.0, 1.0, 0.0])), "two equal times"),
    (lambda: m.sample_ode(lambda z, t: z, Z.half(), m.time_grid(2)), "expected float32 or float64"),
    (lambda: m.jump(still, Z, HALF, ONES), "r > t"),
    (lambda: m.jump(still, Z, 2 * ONES, HALF), r"\[0, 1\]"),
    (lambda: m.jump(still, Z, ONES, NAN * HALF), r"\[0, 1\]"),
    (lambda: m.jump(still, Z, 1.0, 0.0), "expected tensors"),
    (lambda: m.jump(still, Z, ONES, HALF[:2]), "same shape"),
    (lambda: m.jump(still, Z, ONES[:2], HALF[:2]), "do not fit"),
    (lambda: m.jump(narrow, Z, ONES, HALF), "average velocity has shape"),
    (lambda: m.interpolate(Z, Z[:1], HALF), "the noise has shape"),
]
MIXTURES = [
    (lambda: m.GaussianMixture(torch.zeros(0, 2), 0.1), "one at least"),
    (lambda: m.GaussianMixture(torch.zeros(3, 2), -0.1), "positive sigma"),
    (lambda: m.GaussianMixture(torch.zeros(3, 2), 0.1, torch.zeros(3)), "not all zero"),
    (lambda: m.GaussianMixture(torch.zeros(3, 2), 0.1, torch.ones(2)), "3 means"),
    (lambda: m.GaussianMixture(torch.full((3, 2), NAN), 0.1), "NaN"),
    (lambda: RING.flow(NAN * Z, ONES, 0 * ONES), "NaN"),
    (lambda: RING.velocity(torch.zeros(4, 3), ONES), r"expected \(4, 2\)"),
    (lambda: CircleProcess().log_weights(torch.zeros(2, 16, 2)), "past frames"),
    (lambda: m.sliced_w2(Z, Z[:3]), r"expected \(K n, D\)"),
    (lambda: m.sliced_w2(Z, Z[:, :1]), "2 and 1 numbers"),
    (lambda: m.sliced_w2(Z, NAN * Z), "NaN"),
    (lambda: m.sliced_w2(INF * Z, Z), "finite"),
    (lambda: m.sliced_w2(Z[:0], Z), "n at least 1"),
    (lambda: m.off_share(Z[:0], RING), "n at least 1"),
    (lambda: m.path_error(Z, Z[:3]), "expected the same shape"),
]
LOSSES = [
    (lambda: m.FlowMapLoss({"eulerain": 1.0}), "did you mean 'eulerian'"),
    (lambda: m.FlowMapLoss({"eulerian": -1.0}), "not negative"),
    (lambda: m.FlowMapLoss({"eulerian": INF}), "finite shares"),
    (lambda: m.FlowMapLoss({"eulerian": 1.0}, delta=INF), "delta inf"),
    (lambda: m.FlowMapLoss({"lagrangian": 1.0}), "a teacher's"),
    (lambda: m.FlowMapLoss({"semigroup": 1.0}, guidance=m.Guidance(2.0, {}, published=True)), "Eulerian target alone"),
    (lambda: m.FlowMapLoss({}, guidance=m.Guidance(2.0, {}))(still, DIAGONAL), "dropped"),
    (lambda: m.Guidance(0.5, {}), "at least 1"),
    (lambda: m.Guidance(INF, {}), "finite"),
    (lambda: m.FlowMapLoss({})(still, BELOW), "no objective for them"),
    (lambda: FORWARD(still, BELOW | {"r": ONES}), "r > t"),
    (lambda: FORWARD(still, BELOW | {"x": Z.half(), "eps": Z.half()}), "expected float32 or float64"),
    (lambda: FORWARD(still, BELOW | {"x": Z.bfloat16(), "eps": Z.bfloat16()}), "expected float32 or float64"),
    (lambda: FORWARD(still, BELOW | {"t": 2 * ONES}), r"\[0, 1\]"),
    (lambda: m.FlowMapLoss({}, narrow)(still, DIAGONAL), "the velocity has shape"),
    (lambda: m.FlowMapLoss({})(narrow, DIAGONAL), "output"),
    (lambda: m.ConsistencyLoss(narrow), "average="),
    (lambda: m.ConsistencyLoss(narrow, form="discreet"), "did you mean 'discrete'"),
    (lambda: m.ConsistencyLoss(narrow, still, grid=0), "grid >= 1"),
    (lambda: m.backward_simulation_times(torch.tensor([4]), torch.tensor([4])), "outside 0"),
    (lambda: m.backward_simulation_times(torch.tensor([4, 4]), torch.tensor([1])), "one of each"),
    (lambda: m.draw_rollouts(3, steps=(0, 2)), "at least one step"),
    (lambda: m.draw_on_policy((2,), 4, fake_time="logitnormal"), "did you mean 'logit_normal'"),
]
TRAINING = [
    (lambda: m.batches(lambda n, source: torch.full((n, 2), NAN), 8), "the data holds NaN"),
    (lambda: run(300, lr=1e30), "expected finite losses"),
    (lambda: run(lr=INF), "learning rates"),
    (lambda: run(accumulate=5), "does not divide"),
    (lambda: run(0), "at least 1"),
    (lambda: run(loss=None), r"without a loss: \['student'\]"),
    (lambda: m.Role(m.MLP().requires_grad_(False)), "none of whose weights is trained"),
    (lambda: m.MLP(seeds=(0, 1))(Z, ONES, ONES), "copy="),
    (lambda: m.MLP()(torch.zeros(4, 3), ONES, ONES), r"expects z \(B, 2\)"),
]


@pytest.mark.parametrize(("call", "words"), [*TIMES, *FLOW_MAPS, *MIXTURES, *LOSSES, *TRAINING])
def test_bad_input_is_one_clear_line(call, words):
    with refused(words):
        call()
