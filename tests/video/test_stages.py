"""The video stages: the functions of the plane, with the right inputs and in the right order; resume."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from minianyflow import on_policy
from minianyflow.interpolant import interpolate
from minianyflow.networks import causal
from minianyflow.networks.teacher_forcing import TeacherForced, cycle_context_lengths
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import KINDS, describe, load_codec, load_network, read_weights, save_weights
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.video import stages
from minianyflow.video.stages import BUILDERS, GUIDANCE, STAGES, WEIGHTS, Earlier, latents_path, path_of
from toy_data import blobs

ON_POLICY = ("on_policy", "causal_on_policy")
STUDENTS = ("eulerian", "consistency", "causal", *ON_POLICY)


def test_blobs_are_what_they_say():
    clips = blobs.sample(64, generator(0))
    assert torch.equal(clips.video, blobs.sample(64, generator(0)).video)
    light = clips.video.sum((2, 3)) / (blobs.LIGHT * clips.balls[:, None])
    assert (light - 1).abs().max() < 2e-3  # no light is lost at the edge
    pairs = clips.positions[clips.balls == 2]
    assert (pairs[:, :, 0] - pairs[:, :, 1]).norm(dim=2).min() > blobs.APART
    inside = clips.positions.nan_to_num(7.5)
    assert blobs.WALLS[0] <= inside.min() <= inside.max() <= blobs.WALLS[1]
    speed = (clips.positions[:, 1:] - clips.positions[:, :-1]).norm(dim=3)
    assert speed.nan_to_num(0).max() <= blobs.SPEED[1] + 1e-5
    with pytest.raises(InputError, match=r"16 frames; expected 4 n \+ 1"):
        blobs.sample(1, frames=16)


def test_teacher_forcing_trains_every_frame_and_sees_only_earlier_chunks():
    network = load_network(path_of(WEIGHTS, "causal"))
    x = torch.arange(5.0)[None, :, None, None, None].expand(2, 5, 4, 4, 4)  # a frame holds its own number
    trained = set()
    for step in range(2):
        part = cycle_context_lengths({"x": x, "eps": -x, "condition": {}}, step, network)
        numbers = [int(frame) for frame in part["x"][0, :, 0, 0, 0]]
        past = part["context"].get("past", x[:, :0])[0, :, 0, 0, 0].tolist()
        assert past == list(range(numbers[0]))
        assert torch.equal(part["x"], part["context"]["clean"])
        assert torch.equal(part["x"], -part["eps"])
        trained |= set(numbers)
    assert trained == {0, 1, 2, 3, 4}


class Recorder(torch.nn.Module):
    """A velocity or network in the place of `inner` that records the states and times of its calls."""

    def __init__(self, inner=lambda z, *times, **condition: 0 * z):
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, z, t, *r, **condition):
        self.calls.append((z.detach(), t))
        return self.inner(z, t, *r, **condition)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder where any stage may begin: the committed weights, and latents that hold nothing but their own number."""
    folder = tmp_path_factory.mktemp("begun")
    for name in ("codec", "teacher", "eulerian", "causal_teacher", "causal"):
        path_of(folder, name).write_bytes(path_of(WEIGHTS, name).read_bytes())
    latents = torch.arange(10.0)[:, None, None, None, None].expand(10, 5, 4, 4, 4).contiguous()
    save_file({"latents": latents, "balls": torch.arange(10) % 2 + 1}, latents_path(folder))
    return folder


def prompts_of(data, batch):
    """Of every row of a batch of `begun`: whether it has the null prompt, and whether that of its own latents."""
    prompt, balls = batch["condition"]["prompt"], data.balls[batch["x"][:, 0, 0, 0, 0].long()]
    return [(prompt == expected).flatten(1).all(1) for expected in (TextEncoder()([""]), data.prompts[balls])]


def test_a_dropped_prompt_is_the_null_prompt_and_changes_nothing_else(begun):
    data = Earlier(begun)
    assert torch.equal(data.prompts[1:], TextEncoder()(blobs.PROMPTS))
    whole, half, dropped = (data.batch(64, generator(0), drop) for drop in (0, 0.5, 1))
    for batch, share in ((whole, 0), (half, 0.5), (dropped, 1)):
        null, own = prompts_of(data, batch)
        assert torch.equal(own, ~null)
        assert torch.equal(batch["dropped"], null)
        assert float(null.float().mean()) == pytest.approx(share, abs=0.2 * (share == 0.5))
        assert all(torch.equal(batch[name], whole[name]) for name in whole if name not in ("condition", "dropped"))


def noisy():
    """States of four rows, their times, and their prompts, of which the first is the null prompt."""
    z, t = torch.randn(4, 5, 4, 4, 4, generator=generator(1)), torch.rand(4, generator=generator(2))
    return z, t, TextEncoder()(["", *blobs.PROMPTS, blobs.PROMPTS[0]])


def context(teacher):
    """What a teacher takes for the rows of `noisy` beside their prompts: a causal one takes them as one chunk."""
    return {"single_chunk": torch.zeros(4)} if teacher == "causal_teacher" else {}


@torch.no_grad()
def by_hand(folder, name, scale):
    """The guided velocity of a teacher at the rows of `noisy`, from two passes over all of them."""
    (z, t, prompt), network = noisy(), load_network(path_of(folder, name))
    prompts = prompt, TextEncoder()([""]).expand_as(prompt)
    v, v_null = (network(z, t, t, text, **context(name)) for text in prompts)
    return v_null + scale * (v - v_null)


@torch.no_grad()
def test_a_teachers_velocity_is_guided_and_counted(begun):
    z, t, prompt = noisy()
    for scale, rows in ((2.0, 4 + 3), (1.0, 4)):  # the null prompt needs no second forward
        earlier = Earlier(begun)
        v = earlier.velocity("teacher", scale)(z, t, prompt=prompt)
        assert torch.allclose(v, by_hand(begun, "teacher", scale), atol=1e-5)
        assert [counter.rows for counter in earlier.teachers] == [rows]
    assert not torch.allclose(v, by_hand(begun, "teacher", 2.0), atol=1e-2)


def velocities_in(loss):
    """The teachers' velocities of a loss."""
    if isinstance(loss, TeacherForced):
        return velocities_in(loss.forward)
    if isinstance(loss, on_policy.OnPolicyLoss):
        return {"real": loss.real} | velocities_in(loss.forward)
    return {"forward": loss.velocity}


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_students_learn_from_the_teacher_guided_as_their_stage_says(name, begun):
    """What scores is always the bidirectional teacher; the forward loss beside it is that of the parent."""
    stage = dataclasses.replace(STAGES[name], guidance=3.0)
    roles, _ = BUILDERS[stage.kind](stage, 0, Earlier(begun))
    found, (z, t, prompt) = velocities_in(roles["student"].loss), noisy()
    teacher = "causal_teacher" if name.startswith("causal") else "teacher"
    expected = {"forward": by_hand(begun, teacher, 3.0)}
    if name in ON_POLICY:
        forward = by_hand(begun, teacher, STAGES[stage.parent].guidance)
        expected = {"forward": forward, "real": by_hand(begun, "teacher", 3.0)}
    assert set(found) == set(expected)
    for place, v in found.items():
        known = context(teacher) if place == "forward" else {}
        assert torch.allclose(v(z, t, prompt=prompt, **known), expected[place], atol=1e-5), place


@pytest.mark.parametrize("name", ["teacher", "causal_teacher", *STUDENTS])
def test_teachers_drop_a_tenth_of_their_prompts_and_students_none(name, begun):
    _, draw = BUILDERS[STAGES[name].kind](dataclasses.replace(STAGES[name], rows=512), 0, Earlier(begun))
    null, own = prompts_of(Earlier(begun), draw(0))
    assert torch.equal(own, ~null)
    share = float(null.float().mean())
    assert 0.05 < share < 0.15 if "teacher" in name else share == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_POLICY)
@torch.no_grad()
def test_on_policy_stages_score_what_their_student_makes(name, begun):
    """The end of its backward simulation, chunk by chunk if it is causal, noised; for the fake score to learn, too."""
    stage = dataclasses.replace(STAGES[name], rows=4)
    roles, draw = BUILDERS[stage.kind](stage, 0, Earlier(begun))
    student, fake, batch = roles["student"], roles["fake"], draw(0)
    student.loss.real, student.loss.fake = Recorder(student.loss.real), Recorder(student.loss.fake)
    learner = Recorder(fake.network)
    student.loss(student.network, batch)
    fake.loss(learner, batch)
    simulate = causal.causal_backward_simulation() if "causal" in name else on_policy.backward_simulation
    noise, lengths, step = (batch[key] for key in ("noise", "lengths", "step"))
    end = simulate(student.network.network, noise, lengths, step, **batch["condition"])[-1]
    for calls in (student.loss.real.calls, student.loss.fake.calls, learner.calls):
        ((scored, t),) = calls
        assert torch.equal(t, batch["score_t"])
        assert torch.allclose(scored, interpolate(end, batch["score_eps"], t), atol=1e-5)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Stages of two steps, in a folder with the committed codec."""
    tiny = {name: dataclasses.replace(stage, steps=2, rows=8, seeds=(0,)) for name, stage in STAGES.items()}
    monkeypatch.setattr(stages, "STAGES", tiny | {"codec": STAGES["codec"]})
    monkeypatch.setattr(stages, "CLIPS", 32)
    monkeypatch.setattr(stages, "run_jobs", lambda jobs, *how: [f(*given) for f, given in jobs.values()])
    for end in ("safetensors", "json"):
        (tmp_path / f"codec-0.{end}").write_bytes((WEIGHTS / f"codec-0.{end}").read_bytes())
    stages.make_latents(tmp_path)
    return tmp_path


def test_stages_come_after_what_they_start_from(small, monkeypatch):
    names = list(STAGES)
    for name, stage in STAGES.items():
        assert stage.parent == "" or names.index(stage.parent) < names.index(name)
        unguided = name in ("codec", "teacher", "causal_teacher") or stage.kind.startswith("dense")
        assert stage.guidance == (1.0 if unguided else GUIDANCE), name
    calls = []
    monkeypatch.setattr(stages, "run_jobs", lambda jobs, workers, after=None: calls.append((jobs, after)))
    stages.train_all(small, quiet=True)
    ((jobs, after),) = calls  # the codec is there
    assert set(jobs) == {(name, 0) for name in STAGES if name != "codec"}
    assert after == {(name, 0): (STAGES[name].parent, 0) for name, _ in jobs if STAGES[name].parent != "codec"}


@pytest.mark.slow
def test_latents_of_another_codec_or_of_other_clips_are_made_again(small, monkeypatch):
    """A run may stop after the codec was trained anew and before its latents were made."""
    monkeypatch.setattr(stages, "run_jobs", lambda *jobs: None)
    path = path_of(small, "codec")

    def after_a_run():
        stages.train_all(small, quiet=True)
        return load_file(latents_path(small))["latents"]

    def encoded():
        return load_codec(path).encode(blobs.sample(stages.CLIPS, generator(100)).video)

    first, written = load_file(latents_path(small))["latents"], latents_path(small).stat()
    assert torch.equal(after_a_run(), first)
    assert latents_path(small).stat().st_ino == written.st_ino  # what fits is left alone
    again = load_codec(path)
    for weight in again.parameters():
        weight.mul_(1.02)
    save_weights(path, again.state_dict(), read_weights(path, "codec")[2] | describe(again))
    assert torch.equal(after_a_run(), encoded())
    assert not torch.allclose(encoded(), first, atol=1e-2)
    monkeypatch.setattr(stages, "CLIPS", 40)
    assert torch.equal(after_a_run(), encoded())


@pytest.mark.slow
def test_every_stage_trains_counts_and_resumes_where_it_stopped(small, monkeypatch):
    stages.train_all(small, quiet=True)
    for name in STAGES:
        cost = read_weights(path_of(small, name), *KINDS)[2]["cost"]
        assert cost["seconds"] > 0
        assert name == "codec" or cost["forwards"] >= cost["backwards"] >= 16, name
    assert read_weights(path_of(small, "mixed"), *KINDS)[2]["cost"]["backwards"] == 16  # two steps of eight rows
    calls = []
    monkeypatch.setattr(stages, "train_stage", lambda name, *given: calls.append(name))
    stages.train_all(small, quiet=True)
    assert not calls
    path_of(small, "causal_gradient").unlink()
    stages.train_all(small, quiet=True)
    assert calls == ["causal_gradient"]


@pytest.mark.slow
def test_what_came_from_another_parent_is_trained_again(small, monkeypatch):
    few = {name: stages.STAGES[name] for name in ("codec", "teacher", "semigroup")}
    monkeypatch.setattr(stages, "STAGES", few)
    stages.train_all(small, quiet=True)
    before = path_of(small, "semigroup").read_bytes()
    monkeypatch.setitem(few, "teacher", dataclasses.replace(few["teacher"], lr=1e-3))
    stages.train_stage("teacher", 0, small, quiet=True)  # as if interrupted at this point
    assert stages._is_done(small, "teacher", 0)
    assert not stages._is_done(small, "semigroup", 0)
    stages.train_all(small, quiet=True)
    assert path_of(small, "semigroup").read_bytes() != before


@pytest.mark.long
def test_another_codec_makes_its_students_be_trained_again(small, monkeypatch):
    stages.train_stage("teacher", 0, small, quiet=True)
    assert stages._is_done(small, "teacher", 0)
    monkeypatch.setitem(stages.STAGES, "codec", dataclasses.replace(STAGES["codec"], steps=2))
    stages.train_stage("codec", 0, small, quiet=True)
    assert read_weights(path_of(small, "codec"), *KINDS)[2]["cost"]["backwards"] == 16 + 8  # rows of two batches
    assert not stages._is_done(small, "teacher", 0)
