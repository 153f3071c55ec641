"""The measures measure: known distances, the exact Euler bars of the spiral, floors."""

import math

import pytest
import torch

from minianyflow.measures import directions, off_share, path_error, sliced_w2, sobol_noise
from minianyflow.samplers import sample_euler
from minianyflow.times import generator, time_grid
from toy_data import plane
from toy_data.circle import CircleProcess


def test_distances_of_a_shift_and_a_scaling():
    """A shift by d: |d| / sqrt(dimensions). A scaling by c of a centred cloud: |c - 1| times its spread per number."""
    a = sobol_noise(4096, (2,))
    shifted = a + torch.tensor([3.0, 4.0])
    assert path_error(a, shifted) == pytest.approx(5, rel=1e-4)
    assert sliced_w2(a, shifted) == pytest.approx(5 / math.sqrt(2), rel=1e-4)
    assert sliced_w2(a, 1.5 * a) == pytest.approx(0.5, rel=0.01)
    assert sliced_w2(a, a[torch.randperm(4096)]) == 0
    high = torch.randn(512, 3, 4)
    assert sliced_w2(high, high + 1) == pytest.approx(1, rel=0.5)  # fixed random directions


def test_pooled_draws_are_measured_by_their_mean_quantiles():
    reference = sobol_noise(512, (2,), 1)
    draws = torch.randn(64 * 512, 2, generator=generator(0))
    pooled, single = sliced_w2(draws, reference), sliced_w2(draws[:512], reference)
    assert pooled < 0.8 * single  # sampling noise falls as 1 / sqrt(draws)
    assert sliced_w2(reference.repeat(3, 1), reference) < 1e-6


def test_directions_are_even_in_the_plane_and_fixed_above():
    assert torch.allclose(directions(2, 4)[2], torch.tensor([0.0, 1.0]), atol=1e-6)
    assert torch.equal(directions(5), directions(5))
    assert torch.allclose(directions(5).norm(dim=1), torch.ones(128))


def test_sobol_noise_is_standard_normal_and_repeats():
    z = sobol_noise(8192, (2, 3))
    assert z.shape == (8192, 2, 3)
    assert (float(z.mean()), float(z.std())) == pytest.approx((0, 1), abs=1e-3)
    assert torch.equal(z, sobol_noise(8192, (2, 3)))


@pytest.mark.parametrize(("nfe", "value", "within"), [(1, 1.073, 0.02), (8, 0.090, 0.04), (64, 0.0115, 0.15)])
def test_exact_euler_on_the_spiral_reads_what_it_should(nfe, value, within):
    spiral = plane.spiral()
    reference = spiral.sample_stratified(8192, generator(0))
    end = sample_euler(spiral.velocity, sobol_noise(8192, (2,)), time_grid(nfe))[-1]
    assert sliced_w2(end, reference) == pytest.approx(value, rel=within)


def test_off_share():
    ring, clips = plane.ring8(), CircleProcess().clips
    samples = ring.sample_stratified(4000, generator(0))
    assert off_share(samples, ring) == pytest.approx(math.exp(-8), abs=2e-3)  # beyond four sigmas in the plane
    assert off_share(torch.zeros(10, 2), ring) == 1
    exact = clips.sample_stratified(4000, generator(1))  # 16 frames: 32 dimensions
    assert off_share(exact, clips) < 2e-3
    assert off_share(1.3 * exact, clips) > 0.3  # all, in 32 dimensions
