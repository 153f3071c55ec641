"""The map of what cures exposure bias: pasts of a student's own, conditional scores, equal cost, and what it claims."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import exposure_map
from benchmarks.exposure_map import (
    AHEAD,
    BUDGET,
    DAGGER,
    EXACT,
    FORCING,
    ON_POLICY,
    TURNED,
    WINDOWS,
    Chains,
    make_recipe,
    run,
)
from minianyflow.mixtures import GaussianMixture
from minianyflow.plane.circle_student import WINDOW, CausalMLP, frame_by_frame
from minianyflow.plane.exposure import draw_clips
from minianyflow.support.install import ROOT
from minianyflow.times import generator
from toy_data.circle import CircleProcess

PROCESS = CircleProcess()
TINY = replace(BUDGET, weak=2000, strong=2000, after=2000, width=8, rows=8, clips=4)


def test_frames_go_on_from_a_past():
    clips, z = PROCESS.clips.sample(5, generator(0)), torch.randn(5, 2, 2, generator=generator(1))
    u = CausalMLP(width=8)
    t = torch.ones(5)

    def one_step(z, **past):
        return z - u(z, t, 0 * t, **past)

    made = frame_by_frame(one_step, z, past=clips[:, :WINDOW])
    first = one_step(z[:, 0], past=clips[:, :WINDOW], frame=torch.full((5,), WINDOW))
    assert torch.equal(made[:, 0], first)
    seen = torch.cat([clips[:, :WINDOW], first[:, None]], 1)
    assert torch.equal(made[:, 1], one_step(z[:, 1], past=seen, frame=torch.full((5,), WINDOW + 1)))


def test_chains_end_with_the_frames_added_until_they_begin_anew():
    chains = Chains(CausalMLP(width=8, seeds=(0, 1)), PROCESS, 32, (0, 1), (1, 4), life=6)
    left, past = chains.left.clone(), chains.past.clone()
    assert set(left.tolist()) == set(range(1, 7))
    frames = torch.randn(64, 2, 2)
    chains.add(frames)
    lives = left > 2
    assert torch.equal(chains.past[lives], torch.cat([past[lives, 2:], frames[lives]], 1))
    assert bool((chains.left[~lives] == 6).all())
    assert not chains.past.requires_grad


def test_the_score_of_a_window_is_that_of_the_joint_law_given_its_past():
    """p(past, window) = p(past) p(window | past): log densities at t = 0, all as mixtures of their own."""
    clip = CircleProcess(WINDOW + AHEAD, phases=128)
    x = clip.clips.sample(16, generator(2))
    past = GaussianMixture(clip.clips.means.reshape(-1, WINDOW + AHEAD, 2)[:, :WINDOW], clip.clips.sigma)
    zero = torch.zeros(16)
    given = clip.after(WINDOW).log_density(x[:, WINDOW:], zero, clip.log_weights(x[:, :WINDOW]))
    joint = clip.clips.log_density(x, zero) - past.log_density(x[:, :WINDOW], zero)
    assert torch.allclose(given, joint, atol=1e-2)


def test_half_the_pasts_are_the_students_own_and_their_next_frames_lawful():
    _, draw, _ = make_recipe(DAGGER, CausalMLP(width=8), PROCESS, (0,), replace(TINY, rows=64))
    batch, data = draw(3), draw_clips(PROCESS, 64, (0,))(3)
    assert torch.equal(batch["x"][32:], data["x"][32:])
    assert bool((batch["frame"][:32] == WINDOW).all())
    step = PROCESS.log_weights(batch["x"][:32, :WINDOW]).exp() @ PROCESS.frame(WINDOW).means
    assert float((batch["x"][:32, WINDOW] - step).norm(dim=1).median()) < 0.3


def test_gradient_of_windows_stops_at_their_past_and_the_fake_score_sees_what_was_made():
    network = CausalMLP(width=8, seeds=(0, 1))
    roles, draw, _ = make_recipe(WINDOWS, network, PROCESS, (0, 1), replace(TINY, rows=32))
    batch = draw(0)
    past = batch["rollout_condition"]["past"]
    roles["student"].loss(roles["student"].network, batch)[0].mean().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in network.parameters())
    fake = roles["fake_score_0"]
    assert fake is roles["fake_score_3"]
    loss, _ = fake.loss(fake.network, batch)
    assert loss.shape == (64,)
    again = draw(1)["rollout_condition"]["past"]
    goes_on = (again[:, :2] == past[:, 2:]).all(2).all(1)
    assert goes_on.tolist() == [row // 8 > 1 for row in range(64)]  # ages differ by the four rollout lengths and seeds
    assert not again.requires_grad


@pytest.mark.slow
def test_the_map_is_whole(tmp_path, monkeypatch):
    fewer = {"STARTS": {"weak": FORCING}, "STAGES": (WINDOWS,)}
    for name, value in ({"CLIPS": 8, "NFE": (1,), "FRAMES": (16, 160)} | fewer).items():
        monkeypatch.setattr(exposure_map, name, value)
    monkeypatch.setattr(exposure_map, "run_jobs", lambda jobs, workers: {n: f(*args) for n, (f, args) in jobs.items()})
    report = run((0,), TINY, tmp_path, quiet=True)
    assert {file.name for file in tmp_path.iterdir()} == {"exposure_map.json", "exposure_map.png"}
    assert report["cells"]["weak"].keys() == {WINDOWS, TURNED}
    assert all(len(cell["nfe"]["1"]) == 1 for cell in report["cells"]["weak"].values())
    assert json.loads((tmp_path / "exposure_map.json").read_text())["frames"] == [16, 160]


# What docs/video.md and notebook 7a say of the committed map


REPORT = json.loads((ROOT / "docs/video/exposure_map.json").read_text())


def read(start, recipe, nfe, figure, frame=160):
    """One figure per seed."""
    cell = REPORT["cells"][start][recipe] if recipe else REPORT["starts"][start]
    return torch.tensor([seed[figure][REPORT["frames"].index(frame)] for seed in cell["nfe"][str(nfe)]])


def test_recipes_of_a_start_cost_the_same():
    seeds, budget = len(REPORT["seeds"]), REPORT["budget"]
    for start, recipes in REPORT["cells"].items():
        for recipe, cell in recipes.items():
            evaluations = budget["after"] + (budget[start] if recipe == TURNED else 0)
            assert cell["cost"]["evaluations"] == pytest.approx(seeds * evaluations, rel=0.03)


def test_from_the_weak_start_nothing_pays_with_coverage():
    assert bool((read("weak", ON_POLICY, 4, "tv") > 0.6).all())
    for recipe in (None, FORCING, EXACT, DAGGER, WINDOWS):
        assert bool((read("weak", recipe, 4, "kept") < 0.3).all())
        assert bool((read("weak", recipe, 4, "whole") < 0.02).all())
    drift = [read("weak", recipe, 1, "sliced_w2") for recipe in (FORCING, DAGGER)]
    assert float(drift[1].max()) < 0.12
    assert float(drift[0].min()) > 1
    assert bool((read("weak", DAGGER, 1, "lost", 320) < 0.03).all())


def test_from_the_strong_start_windows_pay_a_little_and_miss_the_bars():
    assert bool((read("strong", WINDOWS, 4, "tv") < 0.25).all())
    for figure, bar in (("whole", 2), ("kept", 1.25)):
        windows, start, control = (read("strong", recipe, 4, figure) for recipe in (WINDOWS, None, EXACT))
        assert bool((windows > start).all())
        assert bool((windows > control).all())
        assert float(windows.mean() / start.mean()) < bar
    undone = read("strong", None, 4, "whole") - read("strong", EXACT, 4, "whole")  # by the full rate
    assert float(undone.min()) > 0


def test_a_student_that_fits_the_process_pays():
    for nfe in (4, 16):
        assert bool((read("strong", TURNED, nfe, "tv") < 0.05).all())
        assert bool((read("strong", TURNED, nfe, "kept") > 0.9).all())
        assert bool((read("strong", TURNED, nfe, "whole") > 0.88).all())
    assert bool((read("strong", TURNED, 1, "lost", 320) <= 0.01).all())
    assert float(read("weak", TURNED, 4, "tv").mean()) > 0.25
