"""The measures of blob videos see what is wrong, the right one and by how much; exact data read the ideal figures."""

import math

import pytest
import torch
from scipy.linalg import sqrtm

from minianyflow.measures import frechet_distance
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.video.measures import drift, find_balls, physics, summary
from toy_data import blobs

ONE, TWO = torch.tensor([1]), torch.tensor([2])


@pytest.fixture(scope="module")
def clips():
    return blobs.sample(128, generator(7))


def flight(frames=17):
    """One ball that flies straight, (1, frames, 1, 2), always clear of the walls."""
    return torch.tensor([5.0, 6.0]) + torch.arange(frames)[None, :, None, None] * torch.tensor([0.3, 0.2])


def test_balls_are_found_where_they_are(clips):
    positions, amplitudes, rest = find_balls(clips.video)
    assert [part.shape[2:] for part in (positions, amplitudes, rest)] == [(4, 2), (4,), (16, 16)]
    assert float(rest.abs().max()) < 2e-3
    present = torch.arange(4) < clips.balls[:, None, None]
    assert float((amplitudes - present.float()).abs().max()) < 5e-3
    one = clips.balls == 1
    assert float((positions[one, :, :1] - clips.positions[one, :, :1]).norm(dim=-1).max()) < 1e-4
    found, true = positions[~one, :, :2], clips.positions[~one]
    off = [(order - true).norm(dim=-1).amax(-1) for order in (found, found.flip(2))]
    assert float(torch.minimum(*off).max()) < 5e-3  # in either order, touching ones too


def test_amplitudes_of_a_known_frame():
    places = torch.tensor([[[[4.3, 9.7], [10.2, 5.1]]]])
    positions, amplitudes, _ = find_balls(0.8 * blobs.render(places[:, :, :1]) + 1.1 * blobs.render(places[:, :, 1:]))
    assert torch.allclose(positions[0, 0, :2], places[0, 0].flip(0), atol=1e-3)  # brightest first
    assert torch.allclose(amplitudes[0, 0], torch.tensor([1.1, 0.8, 0, 0]), atol=1e-3)


def test_exact_data_read_the_ideal_figures(clips):
    seen = summary(clips.video, clips.balls, (1, 2, 2))
    for part in (seen, *seen["by_chunk"]):
        assert (part["prompt_obeyed"], part["light_kept"]) == (1, 1)
        assert part["light"] == pytest.approx(1, abs=1e-3)
        assert part["from_ideal"] < 1e-4
    assert seen["acceleration"] < 1e-3  # walls do not count
    assert math.isnan(seen["by_chunk"][0]["acceleration"])  # one frame
    assert seen["by_chunk"][1]["acceleration"] < 1e-3


def test_a_missing_ball_and_a_third_one_are_counted(clips):
    pairs = clips.balls == 2
    third = torch.cat([flight(5), flight(5) + torch.tensor([0.0, 5.0]), flight(5) + torch.tensor([4.0, 0.0])], 2)
    for places, balls, count in ((clips.positions[pairs, :, :1], clips.balls[pairs], 1), (third, TWO, 3)):
        seen = physics(blobs.render(places), balls)
        assert bool((seen["count"] == count).all())
        assert torch.allclose(seen["light"], torch.tensor(count / 2), atol=5e-3)
        assert torch.allclose(seen["from_ideal"], torch.tensor(0.5).sqrt(), atol=0.02)
        assert bool(seen["acceleration"].isnan().all())


def test_dimming_is_seen_by_light_and_shape_alone_and_light_is_kept_within_fifteen_percent(clips):
    seen = summary(0.7 * clips.video, clips.balls)
    assert (seen["light_kept"], seen["prompt_obeyed"]) == (0, 1)
    assert (seen["light"], seen["from_ideal"]) == (pytest.approx(0.7, abs=1e-3), pytest.approx(0.3, abs=1e-3))
    assert seen["acceleration"] < 1e-3
    factor = torch.ones(128, 17, 1, 1)
    factor[:32, 3], factor[32:64, 3] = 1.13, 1.17  # in one frame
    assert summary(factor * clips.video, clips.balls)["light_kept"] == 0.75


def test_a_ball_that_jumps_in_one_frame():
    """Off by d in one frame: second differences d, -2 d, d among the fifteen."""
    places = flight()
    places[:, 8] += torch.tensor([0.3, -0.4])
    seen = physics(blobs.render(places), ONE)
    assert float(seen["acceleration"]) == pytest.approx(0.5 * math.sqrt(6 / 15), rel=1e-3)
    squares = seen["squared_acceleration"][0, :, 0]
    assert torch.allclose(squares[8:11], torch.tensor([0.25, 1.0, 0.25]), rtol=1e-2)
    assert float(seen["from_ideal"].max()) < 1e-3
    assert bool((seen["count"] == 1).all())


def test_jitter_is_an_acceleration():
    """Independent jitter s a coordinate: 6 s^2 in each second difference of two coordinates, so s sqrt(12)."""
    jitter = 0.1 * torch.randn(200, 17, 1, 2, generator=generator(0))
    seen = summary(blobs.render(torch.tensor([7.0, 8.0]) + jitter), torch.ones(200))
    assert seen["acceleration"] == pytest.approx(0.1 * math.sqrt(12), rel=0.05)
    assert (seen["prompt_obeyed"], seen["light_kept"]) == (1, 1)


def test_balls_keep_their_names_when_their_brightness_changes():
    first, second = blobs.render(flight(7)), blobs.render(flight(7) + torch.tensor([0.0, 3.2]))
    flicker = 0.9 + 0.2 * (torch.arange(7) % 2)[None, :, None, None]
    video = flicker * first + (2 - flicker) * second  # the brighter one is the other one in every frame
    assert float(physics(video, TWO)["acceleration"]) < 0.01


def test_bounces_do_not_count_and_a_wrong_count_does_not_either(clips):
    seen = physics(clips.video, clips.balls)
    wall = ((clips.positions - 7.5).abs() > 4.4).any(-1)  # (B, T, 2): within .1 pixels of 1.5 from a wall, or nearer
    one = clips.balls == 1
    assert bool(seen["squared_acceleration"][one][..., 0][wall[one][..., 0]].isnan().all())
    assert bool(seen["squared_acceleration"][one][..., 1].isnan().all())  # the ball that was not asked for
    assert bool(physics(clips.video, 3 - clips.balls)["acceleration"].isnan().all())


def test_chunks_are_measured_one_by_one(clips):
    video = clips.video.clone()
    video[:, 9:] *= 0.7  # latent frames 3 and 4
    chunks = summary(video, clips.balls, (1, 2, 2))["by_chunk"]
    assert [chunk["light_kept"] for chunk in chunks] == [1, 1, 0]
    assert [chunk["light"] for chunk in chunks] == pytest.approx([1, 1, 0.7], abs=1e-3)


def test_frechet_distance_of_known_gaussians():
    mix_a, mix_b = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    noise = torch.randn(2, 200_000, 2, generator=generator(0))
    a, b = noise[0] @ mix_a.T, noise[1] @ mix_b.T + torch.tensor([1.0, 2.0])
    one, two = ((mix @ mix.T).numpy() for mix in (mix_a, mix_b))
    exact = 5 + (one + two - 2 * sqrtm(one @ two).real).trace()
    assert frechet_distance(a, b) == pytest.approx(float(exact), rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a[:, :1], 3 + 2 * a[:, :1]) == pytest.approx(9 + 4, rel=0.02)  # spread 2 against 4
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_drift_names_the_chunk():
    reference = torch.randn(512, 5, 4, 4, 4, generator=generator(1))
    latents = reference.clone()
    latents[:, 3:] += 0.5
    assert drift(latents, reference, (1, 2, 2)) == [0, 0, pytest.approx(0.5, rel=0.3)]  # over fixed random directions


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: find_balls(torch.zeros(2, 17, 8, 8)), r"expected \(B, T, 16, 16\)"),
        (lambda: find_balls(torch.full((1, 1, 16, 16), torch.nan)), "NaN"),
        (lambda: physics(torch.zeros(2, 5, 16, 16), torch.tensor([1])), r"expected \(2,\), each 1 or 2"),
        (lambda: physics(torch.zeros(1, 5, 16, 16), torch.tensor([3])), "each 1 or 2"),
        (lambda: summary(torch.zeros(1, 5, 16, 16), ONE, (1, 2)), "sum to 2"),
        (lambda: summary(torch.zeros(1, 6, 16, 16), ONE, (1, 1)), r"expected 4 n \+ 1"),
        (lambda: drift(torch.zeros(4, 5, 2), torch.zeros(4, 5, 2), (5, 0)), "above 0"),
        (lambda: drift(torch.zeros(4, 5, 2), torch.zeros(4, 6, 2), (3, 2)), "expected the same frames"),
        (lambda: frechet_distance(torch.zeros(2047, 3), torch.zeros(2048, 3)), "2047.*at least 2048.*read too much"),
        (lambda: frechet_distance(torch.zeros(2048, 3), torch.zeros(2048, 4)), "3 and 4 numbers"),
    ],
)
def test_bad_input_is_one_clear_line(call, match):
    with pytest.raises(InputError, match=match):
        call()
