"""Exposure bias on the circle process: which past is seen, where gradients go, what is counted as cost."""

import json

import pytest
import torch

from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.objectives import FlowMapLoss
from minianyflow.on_policy import OnPolicyLoss, backward_simulation_times, draw_rollouts
from minianyflow.plane import exposure
from minianyflow.plane.circle_student import (
    WINDOW,
    CausalMLP,
    ClipScore,
    FrameLoss,
    conditional_velocity,
    frame_by_frame,
    sample_clips,
    simulate,
)
from minianyflow.plane.exposure import ARMS, NFE, Budget, draw_clips, make_arm, measure, radius_error, spent, step_cost
from minianyflow.samplers import sample_euler
from minianyflow.support.errors import InputError
from minianyflow.times import generator, time_grid
from toy_data.circle import CircleProcess

PROCESS = CircleProcess()
TINY = Budget(start=2000, after=4000, rows=16, clips=4, width=8, points=2)


@pytest.mark.slow
def test_the_exact_sampler_has_no_exposure_bias():
    """Frame by frame by the exact conditional flow: the last radius is as far off as the first, and as the data's."""
    noise, times = torch.randn(512, 16, 2, generator=generator(0)), time_grid(64, 0.125)  # finest near the data
    velocity, data = conditional_velocity(PROCESS), PROCESS.clips.sample(4096, generator(1))
    free = frame_by_frame(lambda z, **past: sample_euler(velocity, z, times, **past)[-1], noise)
    error, own = radius_error(free).mean(0), radius_error(data).mean()  # (16,)
    assert float((error - own).abs().max()) < 0.005  # four standard errors
    assert float((error[8:].mean() - error[:8].mean()).abs()) < 0.0015  # flat
    likely = [float(PROCESS.clips.log_density(clips, torch.zeros(len(clips))).mean()) for clips in (free, data)]
    assert likely[0] == pytest.approx(likely[1], abs=1.5)  # whole clips are those of the process: nothing is forgotten


def test_the_exact_conditional_velocity_is_that_of_each_frame_and_sees_no_later_one():
    clips, frame = PROCESS.clips.sample(12, generator(0)), torch.tensor([0, 3, 15] * 4)
    z, t = torch.randn(12, 2, generator=generator(1)), torch.linspace(0.1, 1, 12)
    v = conditional_velocity(PROCESS)(z, t, clips, frame)
    for row, index in enumerate(frame.tolist()):
        weights = PROCESS.log_weights(clips[row : row + 1, :index])
        alone = PROCESS.frame(index).velocity(z[row : row + 1], t[row : row + 1], weights)
        assert torch.allclose(v[row], alone[0], atol=1e-5)


def test_the_student_sees_its_window_and_nothing_else():
    u, past = CausalMLP(width=8), torch.randn(5, 16, 2)
    z, t, frame = torch.randn(5, 2), torch.full((5,), 0.7), torch.tensor([0, 1, 3, 7, 15])
    out = u(z, t, 0 * t, past, frame)
    for place in range(16):
        other = past.clone()
        other[:, place] += 1
        changed = (u(z, t, 0 * t, other, frame) != out).any(1)
        assert changed.tolist() == [frame - WINDOW <= place < frame for frame in frame.tolist()]
    at_origin = u(z, t, 0 * t, torch.zeros_like(past), frame)  # frames at the origin are not frames that are missing
    assert not torch.equal(u(z, t, 0 * t, torch.zeros_like(past), frame.clamp(max=3)), at_origin)


def test_teacher_forcing_is_the_forward_loss_on_one_frame_and_its_true_past():
    u, forward = CausalMLP(width=8), FlowMapLoss({"semigroup": 1.0})
    batch = draw_clips(PROCESS, 32, (0,))(0)
    rows, frame = torch.arange(32), batch["frame"]
    assert set(frame.tolist()) == set(range(16))  # stratified: two rows each
    alone = {"x": batch["x"][rows, frame], "eps": batch["eps"][rows, frame]}
    expected, _ = forward(u, batch | alone | {"condition": {"past": batch["x"], "frame": frame}})
    assert torch.equal(FrameLoss(forward)(u, batch)[0], expected)


def rollouts(count=6):
    z, (lengths, step) = torch.randn(count, 16, 2, generator=generator(2)), draw_rollouts(count, generator(3))
    return z.requires_grad_(), lengths, step


def test_gradient_crosses_frames_only_through_a_past_that_is_not_detached():
    values, (z, lengths, step) = [], rollouts()
    for detach in (True, False):
        values.append(simulate(detach)(CausalMLP(width=8), z, lengths, step)[-1])
        gradient = torch.autograd.grad(values[-1][:, 5].sum(), z)[0].abs().sum((0, 2))  # (16,), frame 5 to each noise
        assert gradient[5] > 0
        assert gradient[6:].sum() == 0
        assert bool((gradient[:5] == 0).all()) == detach
        assert bool((gradient[:5] > 0).all()) != detach
    assert torch.equal(*values)


def test_what_runs_free_is_what_has_its_own_clips_for_context():
    u, (z, _, _) = CausalMLP(width=8), rollouts()
    free = sample_clips(u, z, 4)
    assert torch.allclose(sample_clips(u, z, 4, truth=free), free, atol=1e-6)
    other = sample_clips(u, z, 4, truth=PROCESS.clips.sample(6, generator(4)))
    assert torch.allclose(other[:, 0], free[:, 0], atol=1e-6)  # the first frame has no past
    assert not torch.allclose(other[:, 1], free[:, 1], atol=1e-3)


def test_rows_are_counted_right():
    network, (z, lengths, step) = EvaluationCounter(CausalMLP(width=8)), rollouts()
    simulate(True)(network, z, lengths, step)
    times = backward_simulation_times(lengths, step)
    assert network.rows == network.with_grad == 16 * int((times[:-1] > times[1:]).sum())
    network.rows = network.with_grad = 0
    sample_clips(network, z, 4)
    assert (network.rows, network.with_grad) == (6 * 16 * 4, 0)
    network.with_grad = 1
    assert spent({"student": network})["evaluations"] == 6 * 16 * 4 + 2


def test_several_seeds_are_what_each_is_alone():
    together, alone = CausalMLP(width=8, seeds=(3, 5)), CausalMLP(width=8, seeds=(5,))
    z = torch.randn(4, 16, 2)
    both = sample_clips(together, z.repeat_interleave(2, 0), 2, copy=torch.arange(2).repeat(4))
    assert torch.allclose(both[1::2], sample_clips(alone, z, 2), atol=1e-5)
    drawn, single = draw_clips(PROCESS, 4, (3, 5), (1, 4))(7), draw_clips(PROCESS, 4, (5,), (1, 4))(7)
    for name in ("x", "eps", "noise", "score_eps"):
        assert torch.equal(drawn[name][1::2], single[name])
        assert not torch.equal(drawn[name][::2], single[name])


def test_a_fake_score_begins_as_the_real_one_and_then_nothing_moves_the_student():
    clips = PROCESS.clips
    fake, u = ClipScore(clips.velocity, (16, 2)), CausalMLP(width=8)
    z, t = torch.randn(8, 16, 2), torch.rand(8)
    assert torch.equal(fake(z, t, t), clips.velocity(z, t))
    loss = OnPolicyLoss(clips.velocity, fake, None, simulate=simulate(False))
    loss(u, {**draw_clips(PROCESS, 8, (0,), (2, 4))(0)})[0].mean().backward()
    assert all(float(weight.grad.abs().max()) == 0 for weight in u.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_teaches_its_student_and_counts_what_it_costs(arm):
    network = CausalMLP(width=8, seeds=(0, 1))
    roles, draw, counters = make_arm(arm, network, PROCESS, (0, 1), TINY)
    assert step_cost(roles, draw, counters, probes=1) > 0
    assert spent(counters)["evaluations"] == 0  # a probe is not training
    assert all(weight.grad is None for weight in network.parameters())
    roles["student"].loss(roles["student"].network, draw(0))[0].mean().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in network.parameters())
    cost = spent(counters)
    assert cost["student"]["backwards"] > 0
    assert ("exact" in cost) == (arm != "teacher forcing")


@pytest.mark.slow
def test_the_report_is_whole_and_its_arms_cost_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(exposure, "CLIPS", 64)
    monkeypatch.setattr(exposure, "TRUE", 32)
    monkeypatch.setattr(exposure, "LONG", (16, 20))
    monkeypatch.setattr(exposure, "LONG_CLIPS", 32)
    monkeypatch.setattr(exposure, "run_jobs", lambda jobs, workers: {n: f(*args) for n, (f, args) in jobs.items()})
    arms, written = ("teacher forcing", "on-policy"), tmp_path / "students.safetensors"
    report = exposure.run((0, 1), TINY, arms, tmp_path, quiet=True)
    assert json.loads((tmp_path / "exposure.json").read_text())["arms"].keys() == set(arms)
    assert {file.name for file in tmp_path.iterdir()} == {"exposure.json", "exposure.png", "students.safetensors"}
    copies = [exposure.load_student("on-policy", copy, written) for copy in (0, 1)]
    assert not torch.equal(copies[0].mlp.weight0, copies[1].mlp.weight0)
    with pytest.raises(InputError, match="unknown arm"):
        exposure.load_student("start", path=written)
    for arm, copy in (("on-policy", 2), ("on-policy, detached", 0)):
        with pytest.raises(InputError, match=f"copy {copy} of {arm}"):
            exposure.load_student(arm, copy, written)
    for points in report["arms"].values():
        assert len(points) == 2
        assert points[-1]["cost"]["evaluations"] == pytest.approx(2 * TINY.after, rel=0.15)
        assert set(points[-1]["nfe"]) == set(map(str, NFE))
        assert torch.tensor(points[-1]["nfe"]["1"]["free_running"]).shape == (2, 16)


def test_the_measure_tells_free_running_from_true_context(monkeypatch):
    """A student that repeats the last frame it sees: without error running free, the data's own error otherwise."""
    monkeypatch.setattr(exposure, "CLIPS", 256)
    monkeypatch.setattr(exposure, "TRUE", 256)

    def repeat(z, t, r, past, frame):  # ends at the last frame seen; at (1, 0) if there is none
        last = past[:, -1] if past.shape[1] else torch.tensor([1.0, 0.0]).expand_as(z)
        return (z - last) / (t - r)[:, None]

    figures = measure(repeat, PROCESS, 1, (1,))["1"]
    assert figures["free_running"][0] == [0.0] * 16
    assert figures["true_context"][0] == [0.0, *[pytest.approx(0.04, abs=0.01)] * 15]
    assert figures["lost"] == [0.0]


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="no less than"):
        CausalMLP(width=8)(torch.zeros(2, 2), torch.ones(2), torch.zeros(2), torch.zeros(2, 3, 2), torch.tensor([1, 4]))
    with pytest.raises(InputError, match="unknown arm"):
        exposure.run(arms=("student forcing",), output=tmp_path)
    with pytest.raises(InputError, match="different seeds"):
        exposure.run(seeds=(1, 1), output=tmp_path)
    assert not list(tmp_path.iterdir())
