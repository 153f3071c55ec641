"""The measures of motion: exact clips read the floors, redrawn and jittered ones what is wrong with them."""

import pytest
import torch

from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.video import motion_report
from minianyflow.video.motion import fit_flights, flights, kept_speed, motion, spread
from minianyflow.video.report import how_sampled, prompts_for, sample
from minianyflow.video.stages import WEIGHTS, path_of
from toy_data import blobs


def clips(seed, balls, frames=17, redraw=None):
    """96 clips of so many balls."""
    drawn = blobs.sample(192, generator(seed), frames, redraw)
    which = drawn.balls == balls
    return drawn.video[which], drawn.positions[which, :, :balls]


@pytest.fixture(scope="module", params=[1, 2])
def reference(request):
    return request.param, flights(clips(1, request.param)[0], request.param)


def test_exact_flights_are_fitted_exactly():
    _, positions = clips(2, 1)
    start, velocity, square = fit_flights(positions[:, :, 0].transpose(1, 2))
    assert float(square.max()) < 1e-8
    assert torch.allclose(start, positions[:, 0, 0], atol=1e-3)
    speed = velocity.norm(dim=1)
    assert blobs.SPEED[0] - 1e-3 < float(speed.min()) < float(speed.max()) < blobs.SPEED[1] + 1e-3
    step, inside = positions[:, 1, 0] - positions[:, 0, 0], ((positions[:, :2, 0] - 7.5).abs() < 3.6).all(1)
    assert torch.allclose(velocity[inside], step[inside], atol=1e-3)  # before the first reflection


def test_exact_clips_read_the_floors(reference):
    balls, known = reference
    seen = motion(flights(clips(3, balls)[0], balls), known)
    assert seen["right"] == 1
    assert seen["residual"] < 1e-3
    assert seen["kept"] > 0.999
    assert seen["speed_w1"] < 0.06
    assert seen["coverage"] > 0.9
    assert motion(known, known)["straight"] > 0.98


def test_a_velocity_drawn_anew_is_seen_by_motion_and_hardly_by_sliced_w2(reference):
    """Count and light are perfect, and clips lie nearly as near to data as data do."""
    balls, known = reference
    video, _ = clips(3, balls, redraw=8)
    seen = motion(flights(video, balls), known)
    assert (seen["right"], seen["straight"] < 0.1) == (1, True)
    assert seen["residual"] > 0.3
    assert abs(seen["kept"]) < 0.3
    assert seen["speed_w1"] > 0.1
    data, true = clips(1, balls)[0], clips(3, balls)[0]
    assert sliced_w2(video, data) < 1.3 * sliced_w2(true, data)


def test_jitter_bends_flights_and_keeps_speeds(reference):
    balls, known = reference
    _, positions = clips(3, balls)
    shaken = positions + 0.2 * torch.randn(positions.shape, generator=generator(4))
    seen = motion(flights(blobs.render(shaken), balls), known)
    assert seen["straight"] < 0.1
    assert seen["residual"] == pytest.approx(0.2, rel=0.15)
    assert seen["kept"] > 0.9


def test_a_wrong_count_is_not_straight_and_a_speed_is_kept_from_window_to_window():
    video, _ = clips(5, 2)
    found = flights(video, 1)
    assert not bool(found.right.any())
    seen = motion(found, flights(clips(1, 1)[0], 1))
    assert (seen["right"], seen["straight"]) == (0, 0)
    assert seen["kept"] != seen["kept"]
    assert torch.allclose(kept_speed(flights(clips(6, 1, 33)[0], 1)), torch.ones(3), atol=1e-3)
    with pytest.raises(InputError, match="16 frames; expected 8 n"):
        flights(video[:, :16], 2)


def test_spread_of_a_known_law():
    latents = 2.0 * torch.randn(512, 5, 4, 4, 4, generator=generator(0))
    seen = spread(latents)
    assert seen["latent_variance"] == pytest.approx(4 * 320, rel=0.03)
    assert seen["pair_distance"] == pytest.approx((2 * 4 * 320) ** 0.5, rel=0.03)


@pytest.mark.slow
def test_the_report_says_of_each_prompt_what_the_codec_reads(monkeypatch):
    monkeypatch.setattr(motion_report, "COUNT", 64)
    codec = load_codec(path_of(WEIGHTS, "codec"))
    floors = motion_report.floors(codec, motion_report.make_reference(codec))
    for prompt in blobs.PROMPTS:
        data, redrawn = (floors[name][prompt] for name in ("data", "redrawn"))
        assert data["right"] == redrawn["right"] == 1
        assert data["straight"] > 0.8 > 0.4 > redrawn["straight"]
        assert data["kept"] > 0.8
        assert data["residual"] < 0.2 < redrawn["residual"]
        assert data["pair_distance"] == pytest.approx(redrawn["pair_distance"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nfe", "least"), [("inertia_teacher", 16, (0.8, 0.5)), ("inertia", 4, (0.7, 0.4))])
def test_balls_of_the_dense_networks_keep_their_velocity(name, nfe, least):
    codec, z, (prompt, balls) = load_codec(path_of(WEIGHTS, "codec")), sobol_noise(256, (5, 4, 4, 4)), prompts_for(256)
    video = codec.decode(sample(how_sampled(name), load_network(path_of(WEIGHTS, name)), z, prompt, nfe))
    for number, straight in enumerate(least, 1):
        known = flights(codec.decode(codec.encode(clips(1, number)[0])), number)
        assert motion(flights(video[balls == number], number), known)["straight"] > straight
