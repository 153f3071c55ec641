"""What holds for any shape, type and number of rows: random cases, the same in every run. Types are kept or refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import minianyflow as m
from minianyflow.interpolant import clean_from_velocity, interpolate, score_from_velocity
from minianyflow.measures import frechet_distance, off_share
from minianyflow.times import draw_pairs, time_grid, time_shift
from tests.refused import refused
from toy_data import plane

TYPES = some.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))
ROWS, STEPS, SEEDS = some.integers(0, 5), some.integers(1, 9), some.integers(0, 999)
SHAPES = some.lists(some.integers(1, 3), min_size=1, max_size=3).map(tuple)
SHIFTS = some.floats(0.05, 20)
cases = settings(max_examples=40, deadline=None, derandomize=True, database=None)
ULPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}


def still(z, t, r):
    """The average velocity of z(t) = z(1) + t - 1, by components: every jump of it is exact."""
    return torch.ones_like(z)


@cases
@given(ROWS, SHAPES, TYPES, STEPS, SHIFTS, some.booleans(), SEEDS)
def test_a_rollout_keeps_type_and_ends_where_one_jump_does(rows, shape, dtype, steps, shift, columns, seed):
    z = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    times = time_grid(steps, shift)
    if columns:
        times = times[:, None].repeat(1, rows)
    trajectory = m.rollout(still, z, times)
    assert (trajectory.shape, trajectory.dtype) == ((steps + 1, *z.shape), dtype)
    expected = m.jump(still, z, torch.ones(rows), torch.zeros(rows))
    assert expected.dtype == dtype
    assert torch.allclose(trajectory[-1].double(), expected.double(), atol=ULPS[dtype] * steps)


@cases
@given(ROWS, SHAPES, TYPES, SEEDS)
def test_the_line_and_its_inverses_keep_the_type(rows, shape, dtype, seed):
    source = torch.Generator().manual_seed(seed)
    x, eps = (torch.randn(rows, *shape, generator=source).to(dtype) for _ in range(2))
    t = 0.1 + 0.8 * torch.rand(rows, generator=source)
    z, v = interpolate(x, eps, t), eps - x
    back, score = clean_from_velocity(v, z, t), score_from_velocity(v, z, t)
    assert {value.dtype for value in (z, back, score)} == {dtype}
    assert torch.allclose(back.double(), x.double(), atol=4 * ULPS[dtype])
    assert torch.allclose(score.double(), -eps.double() / t.double().view(-1, *[1] * len(shape)), atol=99 * ULPS[dtype])


@cases
@given(some.integers(0, 40), some.floats(0, 1), some.floats(0, 1), SHIFTS, some.floats(0, 1), SEEDS)
def test_pairs_are_in_the_triangle_in_their_shares(count, diagonal, end, shift, drop, seed):
    source = torch.Generator().manual_seed(seed)
    if diagonal + end > 1:
        with refused("at most 1"):
            draw_pairs(count, source, diagonal, end)
        return
    pairs = draw_pairs(count, source, diagonal, end, shift, drop)
    t, r = pairs["t"], pairs["r"]
    assert all(value.shape == (count,) for value in pairs.values())
    assert bool(((r >= 0) & (r <= t) & (t <= 1)).all())
    assert bool(((pairs["objective_draw"] >= 0) & (pairs["objective_draw"] < 1 + 1e-5)).all())
    assert abs(int((r == t).sum()) - diagonal * count) < 1 + 1e-4 * count + 2 * (end * count > 0)
    assert ("dropped" in pairs) == (drop > 0)


@cases
@given(TYPES, some.floats(1e-3, 1e3), some.integers(1, 99))
def test_a_shift_keeps_type_order_and_ends(dtype, shift, count):
    s = torch.linspace(0, 1, count + 1).to(dtype)
    shifted = time_shift(s, shift)
    assert shifted.dtype == dtype
    assert float(time_shift(torch.tensor(0.5), shift)) == pytest.approx(shift / (1 + shift))
    assert (float(shifted[0]), float(shifted[-1])) == (0, 1)
    assert bool((shifted[1:] >= shifted[:-1]).all())


@cases
@given(ROWS, SHAPES, TYPES, SHIFTS, SEEDS)
def test_backward_simulation_ends_where_the_exact_rollout_does(rows, shape, dtype, shift, seed):
    source = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, *shape, generator=source).to(dtype)
    lengths, step = m.draw_rollouts(rows, source)
    states = m.backward_simulation(still, z, lengths, step, shift)
    assert (states.shape, states.dtype) == ((4, *z.shape), dtype)
    assert torch.allclose(states[-1].double(), z.double() - 1, atol=4 * ULPS[dtype])
    for other in (lengths[:-1], torch.cat([lengths, lengths[:1] + 1, lengths[:1]])) if rows > 1 else ():
        with refused("one of each per sample|a column per state"):
            m.backward_simulation(still, z, other, step if len(other) < rows else other - other, shift)


@cases
@given(some.integers(1, 30), some.integers(1, 4), TYPES, SEEDS)
def test_distances_are_metrics_of_any_type(count, size, dtype, seed):
    a, b = torch.randn(2, count, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert m.sliced_w2(a, a) == m.path_error(a, a) == 0
    assert m.sliced_w2(a, b) == pytest.approx(m.sliced_w2(b, a), rel=1e-5)
    assert m.sliced_w2(a, b) <= m.path_error(a, b) * count**0.5 + 1e-5
    if count == 1:
        with refused("n at least 2"):
            frechet_distance(a, b, 2)
    else:
        assert abs(frechet_distance(a, a, 2)) < 1e-4
        assert frechet_distance(a, b, 2) >= -1e-6
    assert 0 <= off_share(a[:, :1].repeat(1, 2), plane.ring8()) <= 1
