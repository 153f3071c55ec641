"""Targets, pairs, weights and the forward loss: derivatives, edges, gradients, empty kinds, evaluation counts."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from minianyflow.guidance import Guidance
from minianyflow.interpolant import interpolate
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.objectives import (
    FLOW_MAPS,
    OBJECTIVES,
    FlowMapLoss,
    adaptive_weight,
    eulerian_target,
    lagrangian_target,
    teacher_step_target,
)
from minianyflow.samplers import sample_flow_map
from minianyflow.times import draw_pairs, generator, time_grid
from minianyflow.wan.published import Rebalanced, anyflow_weight
from tests.refused import refused
from toy_data.gaussians import Gaussian

GAUSSIAN = Gaussian(0.6, 0.5)
ONES, NONE = torch.ones(4), torch.zeros(4, dtype=torch.bool)
ALL = dict.fromkeys(OBJECTIVES, 1.0)


def batch_of(count, shape=(2,), dtype=torch.float32, **pairs):
    x, eps = torch.randn(2, count, *shape, dtype=dtype)
    return {"x": x, "eps": eps} | {name: value.to(dtype) for name, value in draw_pairs(count, **pairs).items()}


def test_forward_mode_equals_central_difference_for_a_network():
    u = MLP(shape=(3,)).double()
    z, v = torch.randn(2, 40, 3, dtype=torch.float64)
    t, r = torch.rand(2, 40, dtype=torch.float64).sort(0, descending=True).values
    for target, where in ((eulerian_target, v), (lagrangian_target, lambda z, t: z * t[:, None] - 0.3)):
        exact, gaps = target(u, z, t, r, where, delta=0), []
        for delta in (4e-4, 1e-4):
            inside = (t + delta <= 1) & (t - delta >= r) & (r - delta >= 0)
            gaps.append(float((target(u, z, t, r, where, delta=delta) - exact)[inside].abs().max()))
        assert gaps[1] < 1e-3
        assert gaps[0] / gaps[1] == pytest.approx(16, rel=0.2)  # second order in delta


@pytest.mark.parametrize(("t", "r"), [(1.0, 0.0), (1.0, 0.999), (0.5, 0.4999), (0.002, 0.0), (0.3, 0.0), (1e-6, 0.0)])
def test_one_sided_differences_stay_inside_the_triangle(t, r):
    """At all edges and corners u is evaluated inside r <= t in [0, 1] alone, and the exact map is its own target."""

    def u(z, t, r):
        assert bool(((r >= 0) & (r <= t) & (t <= 1)).all())
        return GAUSSIAN.average_velocity(z, t, r)

    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    t, r = (torch.full((5,), time, dtype=torch.float64) for time in (t, r))
    exact = GAUSSIAN.average_velocity(z, t, r)
    for target, where in ((eulerian_target, GAUSSIAN.velocity(z, t)), (lagrangian_target, GAUSSIAN.velocity)):
        assert float((target(u, z, t, r, where) - exact).abs().max()) < 1e-2  # first order in delta at an edge
        assert float((target(u, z, t, r, where, delta=1e-6) - exact).abs().max()) < 1e-5


def gradients(losses, u):
    found = torch.autograd.grad(losses.mean(), list(u.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "lagrangian_through_end"])
def test_no_gradient_through_a_target_and_one_to_every_weight(name):
    """The gradient is that of plain regression on the target of a copy."""
    u, copy, teacher = MLP(), MLP(), nn.Linear(2, 2)  # a teacher with weights of its own
    batch, loss = batch_of(32), FlowMapLoss({name: 1.0}, lambda z, t: teacher(z) * t[:, None])
    loss(u, batch)[0].mean().backward()
    assert all(bool(weight.grad.abs().sum() > 0) for weight in u.parameters())
    assert teacher.weight.grad is None
    t, z = batch["t"], interpolate(batch["x"], batch["eps"], batch["t"])
    target = torch.empty_like(z)
    for kind, rows in loss.kinds(batch).items():
        target[rows] = loss.target(kind, copy, batch, rows, z[rows])[0]
    plain = (1 - t).sqrt() * (u(z, t, batch["r"]) - target.detach()).square().mean(1)
    assert torch.allclose(gradients(plain, u), gradients(loss(u, batch)[0], u), atol=1e-6)


def test_weights_pass_no_gradient_and_reach_the_loss():
    """Rebalanced or adaptive, the gradient of a row is its plain one times a constant."""
    batch, u = batch_of(32), MLP()
    plain, adaptive, level = (
        wrap(FlowMapLoss({"eulerian": 1.0}, GAUSSIAN.velocity, adaptive=power))(u, batch)[0]
        for power, wrap in ((0.0, partial), (0.5, partial), (0.0, Rebalanced))
    )
    fixed, diagonal = plain.detach(), batch["t"] == batch["r"]
    pull = (fixed / (1 - batch["t"]).sqrt() + 5e-3) ** -0.5
    factor = torch.where(diagonal, 1.0, fixed[diagonal].mean() / fixed)
    assert torch.allclose(level.detach(), factor * fixed, rtol=1e-4)
    of_rows = [torch.stack([gradients(loss[row], u) for row in (0, 1, 2, 3)]) for loss in (plain, adaptive, level)]
    assert torch.allclose(of_rows[1], pull[:4, None] * of_rows[0], rtol=1e-3, atol=1e-5)
    assert torch.allclose(of_rows[2], factor[:4, None] * of_rows[0], rtol=1e-3, atol=1e-5)


def test_pairs_have_exact_shares_in_order_and_at_random():
    pairs = draw_pairs(64, generator(0))
    t, r = pairs["t"], pairs["r"]
    assert bool(((r >= 0) & (r <= t) & (t <= 1)).all())
    assert int((t == r).sum()) == 32
    assert int((r == 0).sum()) == 16
    assert not torch.equal((t == r), (draw_pairs(64, generator(1))["t"] == draw_pairs(64, generator(1))["r"]))
    assert all(torch.equal(pairs[name], draw_pairs(64, generator(0))[name]) for name in pairs)
    for rows in (r == 0, (r > 0) & (r < t)):  # and either kind is divided evenly among objectives
        assert int((pairs["objective_draw"][rows] < 0.5).sum()) == 8
    kinds = FlowMapLoss({"eulerian": 1.0, "semigroup": 1.0}).kinds(pairs)
    assert {name: len(rows) for name, rows in kinds.items()} == {"tangent": 32, "eulerian": 16, "semigroup": 16}


def test_a_batch_of_one_has_every_kind_in_its_share():
    """Splits by rank or by position would give one sample one objective for ever."""
    drawn = [draw_pairs(1, generator(0, step)) for step in range(2000)]
    t, r = (torch.cat([pair[name] for pair in drawn]) for name in ("t", "r"))
    assert float((t == r).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float((r == 0).float().mean()) == pytest.approx(0.25, abs=0.05)


def test_numbers_that_round_up_to_one_leave_no_row_without_objective(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 2**-24))  # the largest it draws
    pairs = draw_pairs(3, diagonal=0, end=0)
    assert float(pairs["objective_draw"].max()) < 1
    assert len(FlowMapLoss({"eulerian": 1.0}).kinds(pairs | {"r": pairs["t"] / 2})["eulerian"]) == 3


def test_long_keys_do_not_collide():
    keys = [(seed, step) for seed in (0, 1 << 32) for step in range(50)]
    assert len({float(torch.rand(1, generator=generator(*key))) for key in keys}) == 100


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_times_are_uniform_and_shifted_and_rows_dropped(shift):
    pairs = draw_pairs(20_000, generator(0), shift=shift, drop=0.1)
    medians = [(pairs["t"] == pairs["r"], 0.5), (pairs["r"] == 0, 0.5**0.5)]  # of one uniform, of the larger of two
    for rows, place in medians:
        assert float(pairs["t"][rows].median()) == pytest.approx(shift * place / (1 + (shift - 1) * place), abs=0.03)
    assert float(pairs["dropped"].float().mean()) == pytest.approx(0.1, abs=0.02)
    assert float(pairs["split"].mean()) == pytest.approx(0.5, abs=0.02)
    assert float(pairs["split"].std()) == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize(
    "pairs", [{"diagonal": 0.0}, {"end": 0.0}, {"diagonal": 1.0, "end": 0.0}, {"diagonal": 0.0, "end": 1.0}]
)
@pytest.mark.parametrize("wrap", [partial, Rebalanced])
def test_any_kind_of_row_may_be_absent(pairs, wrap):
    for count in (1, 2, 7):
        u = MLP()
        loss, raw = wrap(FlowMapLoss(ALL, GAUSSIAN.velocity, adaptive=0.5))(u, batch_of(count, **pairs))
        loss.mean().backward()
        assert loss.shape == (count,)
        assert all(map(torch.isfinite, raw.values()))
        assert bool(nn.utils.get_total_norm([weight.grad for weight in u.parameters()]).isfinite())


@pytest.mark.parametrize("name", [*FLOW_MAPS, "teacher_step", "lagrangian_through_end"])
def test_evaluations_are_counted_and_none_is_wasted(name):
    """One with gradient per row, two without per row r < t, none more per row r = t. The teacher's are counted too.

    A teacher's step takes two of the teacher and, unless it ends at r, one of the student. Through the end, a
    Lagrangian row takes two, both with gradient.
    """
    u, teacher, batch = (
        EvaluationCounter(MLP()),
        EvaluationCounter(lambda z, t, r: GAUSSIAN.velocity(z, t)),
        batch_of(64),
    )
    FlowMapLoss(FLOW_MAPS.get(name, {name: 1.0}), lambda z, t: teacher(z, t, t))(u, batch)
    longer = int((batch["t"] - batch["r"] > FlowMapLoss.longest_step).sum())
    of_student = {"teacher_step": (64, 64 + longer), "lagrangian_through_end": (64 + 32, 64 + 32)}
    student = of_student.get(name, (64, 64 + 2 * 32))
    assert (u.with_grad, u.rows) == student
    assert teacher.rows == 32 + 32 * {"semigroup": 0, "mixed": 0.5, "teacher_step": 2}.get(name, 1)


def test_a_teachers_step_errs_by_its_cube_and_ends_at_r():
    """On the exact map the target errs as the one step does: third order; a longer step would pass r."""
    z = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None]
    t, r = torch.linspace(0.4, 1, 60, dtype=torch.float64), torch.linspace(0.3, 0, 60, dtype=torch.float64)
    u, gaps = GAUSSIAN.average_velocity, []
    for solver, step in product(("midpoint", "heun"), (1 / 32, 1 / 64)):
        target = teacher_step_target(u, z, t, r, t - step, GAUSSIAN.velocity, solver)
        gaps.append(float(((target - u(z, t, r)) * (t - r)[:, None]).abs().max()))
    assert gaps[0] / gaps[1] > 6.4  # 15.6: a Gaussian's velocity is kind to the midpoint
    assert gaps[2] / gaps[3] == pytest.approx(8, rel=0.2)
    assert max(gaps) < 4e-4  # 1.3e-4
    loss = FlowMapLoss({"teacher_step": 1.0}, GAUSSIAN.velocity)
    loss.longest_step, loss.solver = 0.5, "midpoint"
    batch = {"t": t, "r": r, "x": z, "eps": z}
    whole = loss.target("teacher_step", pytest.fail, batch, torch.arange(20), z[:20])[0]  # t - r < .5: no student
    half = (t - r)[:, None] / 2
    assert torch.allclose(whole, GAUSSIAN.velocity(z - half * GAUSSIAN.velocity(z, t), (t + r) / 2)[:20])


def test_around_the_diagonal_the_velocity_in_the_middle_is_the_average_one_to_second_order():
    """On the exact map half the width is a quarter of the gap; rows near t = 0 and 1 stay inside."""
    batch = batch_of(64, dtype=torch.float64, diagonal=1.0, end=0.0) | {"split": torch.ones(64, dtype=torch.float64)}
    losses = [
        FlowMapLoss({}, GAUSSIAN.velocity, weight=torch.ones_like, around=width)(GAUSSIAN.average_velocity, batch)[0]
        for width in (0.0, 1 / 32, 1 / 16)
    ]
    assert losses[0].max() < 1e-20
    inside = (batch["t"] > 1 / 32) & (batch["t"] < 1 - 1 / 32)
    assert float(losses[2][inside].mean() / losses[1][inside].mean()) == pytest.approx(16, rel=0.2)
    seen = []
    FlowMapLoss({}, GAUSSIAN.velocity, around=1.0)(lambda z, t, r: seen.append((t, r)) or z, batch)
    ((t, r),) = seen
    assert torch.allclose((t + r) / 2, batch["t"])
    assert torch.minimum(r, 1 - t).abs().max() < 1e-9  # the widest that there are


def test_through_the_end_a_lagrangian_row_is_the_residual_of_its_derivative():
    """The error is that of the stop-gradient form; the gradient is that of |d/dr Phi - v|^2, with v fixed."""
    u, batch = MLP().double(), batch_of(32, dtype=torch.float64)
    batch |= {"t": 0.2 + 0.8 * batch["t"], "r": 0.1 + 0.05 * batch["r"]}
    plain, through = (
        FlowMapLoss({name: 1.0}, GAUSSIAN.velocity, weight=torch.ones_like, delta=0)
        for name in ("lagrangian", "lagrangian_through_end")
    )
    assert torch.allclose(through(u, batch)[0], plain(u, batch)[0])
    t, r, z = batch["t"], batch["r"], interpolate(batch["x"], batch["eps"], batch["t"])
    end, slope = torch.func.jvp(lambda r: z - (t - r)[:, None] * u(z, t, r), (r,), (torch.ones_like(r),))
    expected = (slope - GAUSSIAN.velocity(end, r).detach()).square().mean(1)
    assert torch.allclose(through(u, batch)[0], expected)
    assert torch.allclose(gradients(through(u, batch)[0], u), gradients(expected, u))
    assert not torch.allclose(gradients(plain(u, batch)[0], u), gradients(expected, u), rtol=0.1)


def test_data_velocity_is_the_default():
    batch = batch_of(16, diagonal=1.0, end=0.0)
    _, raw = FlowMapLoss({})(lambda z, t, r: batch["eps"] - batch["x"], batch)
    assert float(raw["tangent"]) == 0


def test_rebalancing_levels_the_rows_and_leaves_the_errors():
    losses = torch.tensor([1.0, 3.0, 10.0, 0.1])
    level = Rebalanced(lambda u, batch: (losses, {}))

    def step(diagonal, part=0):
        return level(None, {"t": ONES, "r": diagonal.float(), "part": torch.full((4,), part)})[0].tolist()

    assert step(NONE) == losses.tolist()
    level.totals = None
    assert step(torch.tensor([True, True, False, False])) == pytest.approx([1, 3, 2, 2])
    assert level.totals.tolist() == [4, 2, 2]
    known = level.totals
    for part in (0, 1):  # without rows r = t, the mean of the step before, or of this one so far
        level.totals = known
        assert step(NONE, part) == pytest.approx([2, 2, 2, 2])
    with refused("rows r = t after rows r < t of the same step"):
        step(~NONE, part=1)
    batch, u = batch_of(32), MLP()
    plain = FlowMapLoss({"eulerian": 1.0})
    assert plain(u, batch)[1] == Rebalanced(plain)(u, batch)[1]


def test_delta_reaches_the_target():
    batch, u = batch_of(64, dtype=torch.float64), MLP().double()
    coarse, fine, exact = (
        FlowMapLoss({"eulerian": 1.0}, GAUSSIAN.velocity, delta=delta)(u, batch)[0].detach()
        for delta in (0.05, 1e-4, 0)
    )
    assert float((fine - exact).abs().max()) < 1e-3 * float((coarse - exact).abs().max())


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 4)])
def test_a_state_has_any_shape(shape):
    """Losses, rollouts and samplers know nothing of the plane; on an exact map they are exact."""
    u, batch = GAUSSIAN.average_velocity, batch_of(24, shape, torch.float64)
    losses, raw = FlowMapLoss(ALL, GAUSSIAN.velocity, delta=1e-4)(u, batch)
    assert losses.shape == (24,)
    assert len(raw) == 6
    assert max(map(float, raw.values())) < 1e-6
    ends = [sample_flow_map(u, batch["eps"], time_grid(steps).double())[-1] for steps in (1, 3)]
    assert ends[0].shape == (24, *shape)
    assert torch.allclose(*ends, atol=1e-6)


def test_guidance_replaces_what_it_names():
    guidance = Guidance(2.0, {"label": torch.zeros(1, dtype=torch.long)}, published=False)

    def u(z, t, r, label, shift):
        return z * 0 + shift[:, None] + label[:, None]

    condition = {"label": torch.ones(8, dtype=torch.long), "shift": torch.arange(8.0)}
    batch = batch_of(8, diagonal=1.0, end=0.0) | {"condition": condition}
    loss = FlowMapLoss({}, lambda z, t, label, shift: 0 * z, guidance)
    target, *_ = loss.target("tangent", u, batch | {"dropped": torch.arange(8) >= 6}, torch.arange(8), batch["x"])
    assert torch.allclose(target[:6, 0], -condition["shift"][:6])  # v + (g - 1) (v - u_null), with v = 0 and label 0
    assert not target[6:].any()


def test_a_condition_follows_its_row():
    """Rows are split by objective; each must keep its own condition."""
    batch = batch_of(48) | {"condition": {"shift": torch.arange(48.0)}}

    def u(z, t, r=None, *, shift):
        return z * 0 + shift[:, None]

    _, raw = FlowMapLoss(ALL, u)(u, batch)
    assert len(raw) == 6
    assert max(map(float, raw.values())) < 1e-6


def test_weights_are_their_formulas():
    error = torch.tensor([4.0, 100.0])
    assert (error * adaptive_weight(error, 0.5, floor=0.0)).tolist() == pytest.approx([2, 10])  # absolute values
    assert adaptive_weight(error, 0.0) == 1
    weight, grid = anyflow_weight(5.0), time_grid(1000, 5.0)[:-1]
    assert float(weight(grid).mean()) == pytest.approx(1, abs=1e-5)
    t = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(weight(t) / weight(t)[1], t * (1 - t).sqrt() / (0.5 * 0.5**0.5))
