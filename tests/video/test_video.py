"""The video stages: the functions of the plane, fed right; and the committed networks, which measure what they say."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minianyflow import consistency, flow_map, objectives, on_policy, samplers, training
from minianyflow.interpolant import interpolate
from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.networks import causal, codec, wan
from minianyflow.networks.teacher_forcing import TeacherForced, cycle_context_lengths
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import KINDS, describe, load_codec, load_network, read_weights, save_weights
from minianyflow.plane import exposure, students
from minianyflow.plane import race as demo
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.video import report as video_report
from minianyflow.video import stages as video_stages
from minianyflow.video.stages import BUILDERS, GUIDANCE, STAGES, WEIGHTS, Earlier, Latents, path_of
from toy_data import blobs

torch.set_num_threads(1)
SPREAD = ("eulerian", "consistency", "on_policy", "causal")  # all seeds are committed; of the others one, for size
TRAINED = [
    (name, seed)
    for name, stage in STAGES.items()
    for seed in (stage.seeds if name in SPREAD else (0,))
    if name != "codec"
]


def test_video_runs_on_the_functions_of_the_plane():
    for name in ("FlowMapLoss", "ConsistencyLoss", "Role", "train", "generator", "EvaluationCounter"):
        assert getattr(video_stages, name) is getattr(demo, name), name
    for name in ("sample_flow_map", "sample_euler", "sample_consistency", "sliced_w2", "sobol_noise", "time_grid"):
        assert getattr(video_report, name) is (vars(students) | vars(demo))[name], name
    assert video_stages.OnPolicyLoss is on_policy.OnPolicyLoss
    assert causal.backward_simulation_times is on_policy.backward_simulation_times
    assert causal.rollout is flow_map.rollout
    assert video_stages.velocity is video_report.velocity is flow_map.velocity
    assert video_stages.FlowMapLoss.__module__ == objectives.__name__


def test_no_function_of_the_mathematics_is_written_again():
    """Nothing in the video rooms has the name of anything in the rooms of the mathematics, and the loop is the one."""
    below = (consistency, flow_map, objectives, on_policy, samplers, training)
    known = {
        name
        for room in below
        for name, value in vars(room).items()
        if getattr(value, "__module__", "") == room.__name__
    }
    for room in (codec, wan, causal, exposure, video_stages, video_report):
        own = {name for name, value in vars(room).items() if getattr(value, "__module__", "") == room.__name__}
        assert not own & known
    assert codec.train is exposure.train is training.train


def test_blobs_are_what_they_say():
    clips = blobs.sample(64, generator(0))
    assert torch.equal(clips.video, blobs.sample(64, generator(0)).video)
    light = clips.video.sum((2, 3)) / (blobs.LIGHT * clips.balls[:, None])
    assert (light - 1).abs().max() < 2e-3  # no light is lost at the edge
    pairs = clips.positions[clips.balls == 2]
    assert (pairs[:, :, 0] - pairs[:, :, 1]).norm(dim=2).min() > blobs.APART
    inside = clips.positions.nan_to_num(7.5)
    assert inside.min() >= blobs.WALLS[0]
    assert inside.max() <= blobs.WALLS[1]
    speed = (clips.positions[:, 1:] - clips.positions[:, :-1]).norm(dim=3)
    assert speed.nan_to_num(0).max() <= blobs.SPEED[1] + 1e-5
    with pytest.raises(InputError, match=r"16 frames; expected 4 n \+ 1"):
        blobs.sample(1, frames=16)


def test_teacher_forcing_trains_every_frame_and_sees_only_earlier_chunks():
    network = load_network(path_of(WEIGHTS, "causal"))
    x = torch.arange(5.0)[None, :, None, None, None].expand(2, 5, 4, 4, 4)  # a frame holds its own number
    batch, seen = {"x": x, "eps": -x, "condition": {}}, set()
    for step in range(2):
        part = cycle_context_lengths(batch, step, network)
        numbers = [int(frame) for frame in part["x"][0, :, 0, 0, 0]]
        past = part["context"].get("past", x[:, :0])[0, :, 0, 0, 0].tolist()
        assert past == list(range(numbers[0]))
        assert torch.equal(part["x"], part["context"]["clean"])
        assert torch.equal(part["x"], -part["eps"])
        seen |= set(numbers)
    assert seen == {0, 1, 2, 3, 4}


def test_teacher_forced_hands_the_context_to_the_network_alone():
    given = {}

    def loss(u, batch):
        given.update(batch["condition"])

    TeacherForced(loss)(None, {"condition": {"prompt": 1}, "context": {"clean": 2, "past": 3}})
    assert given == {"prompt": 1, "clean": 2, "past": 3}


def test_what_distribution_matching_scores_is_at_time_zero():
    """If all data is 0 then u(z, t, r) = z / t and Phi(z; t -> r) = (r / t) z: only a whole journey ends at 0.

    What the scores are asked about, the end noised to t, is then t eps and nothing else.
    """

    def u(z, t, r, prompt, cache=(), fill_cache=False):
        return () if fill_cache else z / t[:, None, None, None, None]

    source, simulate = generator(0), causal.causal_backward_simulation()
    real, fake = Recorder(), Recorder()
    batch = on_policy.draw_on_policy((5, 4, 2, 2), 16, source) | {"condition": {"prompt": torch.zeros(16, 1, 1)}}
    z, lengths, step, t = (batch[name] for name in ("noise", "lengths", "step", "score_t"))
    on_policy.OnPolicyLoss(real, fake, None, shift=5.0, simulate=simulate)(u, batch)
    on_policy.FakeScoreLoss(u, 5.0, simulate)(fake, batch)
    asked = [*real.asked, *fake.asked]
    assert len(asked) == 3  # the teacher once; the fake score to be matched, and to learn
    for scored, at in asked:
        assert torch.equal(at, t)
        assert torch.allclose(scored, t[:, None, None, None, None] * batch["score_eps"], atol=1e-6)
    path = simulate(u, z, lengths, step, 5.0, **batch["condition"])
    assert torch.equal(path[0], z)
    assert path[-2].abs().amax((1, 2, 3, 4))[step < lengths - 1].min() > 1e-3  # the one before is still noisy


class Recorder(torch.nn.Module):
    """A velocity or network in the place of `inner` that remembers the states and times it was asked about."""

    def __init__(self, inner=lambda z, *times, **condition: 0 * z):
        super().__init__()
        self.inner, self.asked = inner, []

    def forward(self, z, t, *r, **condition):
        self.asked.append((z.detach(), t))
        return self.inner(z, t, *r, **condition)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder where any stage may begin: the committed weights, and latents that hold nothing but their own number."""
    folder = tmp_path_factory.mktemp("begun")
    for name in ("teacher", "eulerian", "causal_teacher", "causal"):
        path_of(folder, name).write_bytes(path_of(WEIGHTS, name).read_bytes())
    latents = torch.arange(10.0)[:, None, None, None, None].expand(10, 5, 4, 4, 4).contiguous()
    save_file({"latents": latents, "balls": torch.arange(10) % 2 + 1}, folder / video_stages.LATENTS)
    return folder


def prompts_of(data, batch):
    """Of every row of a batch of `begun`: whether it has the null prompt, and whether that of its own latents."""
    prompt, balls = batch["condition"]["prompt"], data.balls[batch["x"][:, 0, 0, 0, 0].long()]
    return [(prompt == expected).flatten(1).all(1) for expected in (TextEncoder()([""]), data.prompts[balls])]


def test_a_dropped_prompt_is_the_null_prompt_and_changes_nothing_else(begun):
    data = Latents(begun)
    assert torch.equal(data.prompts[1:], TextEncoder()(blobs.PROMPTS))
    kept, half, dropped = (data.batch(64, generator(0), drop) for drop in (0, 0.5, 1))
    for batch, share in ((kept, 0), (half, 0.5), (dropped, 1)):
        null, own = prompts_of(data, batch)
        assert torch.equal(own, ~null)
        assert float(null.float().mean()) == pytest.approx(share, abs=0.2 * (share == 0.5))
        assert all(torch.equal(batch[name], kept[name]) for name in kept if name != "condition")


def noisy(rows):
    """States of rows, their times, and their prompts, of which the first is the null prompt."""
    source = generator(1)
    z, t = torch.randn(rows, 5, 4, 4, 4, generator=source), torch.rand(rows, generator=source)
    return z, t, TextEncoder()(["", *blobs.PROMPTS, *blobs.PROMPTS])[:rows]


def context(teacher):
    """What a teacher has to know of the rows of `noisy` beside their prompts: a causal one takes them as one chunk."""
    return {"single_chunk": torch.zeros(4)} if teacher == "causal_teacher" else {}


@torch.no_grad()
def by_hand(folder, name, scale):
    """The guided velocity of a teacher at the rows of `noisy`, from two passes over all of them."""
    z, t, prompt = noisy(4)
    network = load_network(path_of(folder, name))
    v, v_null = (network(z, t, t, each, **context(name)) for each in (prompt, TextEncoder()([""]).expand_as(prompt)))
    return v_null + scale * (v - v_null)


@torch.no_grad()
def test_a_teacher_is_asked_with_its_guidance_and_counted(begun):
    z, t, prompt = noisy(4)
    for scale, rows in ((2.0, 4 + 3), (1.0, 4)):  # the null prompt needs no second forward
        earlier = Earlier(begun)
        v = earlier.velocity("teacher", scale)(z, t, prompt=prompt)
        assert torch.allclose(v, by_hand(begun, "teacher", scale), atol=1e-5)
        assert [each.rows for each in earlier.asked] == [rows]
    assert not torch.allclose(v, by_hand(begun, "teacher", 2.0), atol=1e-2)


def velocities_in(loss):
    """The teachers' velocities that a loss asks for."""
    if isinstance(loss, TeacherForced):
        return velocities_in(loss.forward)
    if isinstance(loss, on_policy.OnPolicyLoss):
        return {"real": loss.real} | velocities_in(loss.forward)
    return {"forward": loss.velocity}


@pytest.mark.parametrize("name", ["eulerian", "consistency", "on_policy", "causal", "causal_on_policy"])
@torch.no_grad()
def test_students_learn_from_the_teacher_guided_as_their_stage_says(name, begun):
    """What scores is always the bidirectional teacher; the forward loss beside it is that of the parent."""
    stage = dataclasses.replace(STAGES[name], guidance=3.0)
    roles, _ = BUILDERS[stage.kind](stage, 0, Earlier(begun))
    found, (z, t, prompt) = velocities_in(roles["student"].loss), noisy(4)
    teacher = "causal_teacher" if name.startswith("causal") else "teacher"
    expected = {"forward": by_hand(begun, teacher, 3.0)}
    if "on_policy" in name:
        forward = by_hand(begun, teacher, STAGES[stage.parent].guidance)
        expected = {"forward": forward, "real": by_hand(begun, "teacher", 3.0)}
    assert set(found) == set(expected)
    for place, v in found.items():
        known = context(teacher) if place == "forward" else {}
        assert torch.allclose(v(z, t, prompt=prompt, **known), expected[place], atol=1e-5), place


def test_every_student_is_guided_and_no_teacher():
    for name, stage in STAGES.items():
        assert stage.guidance == (1.0 if name in ("codec", "teacher", "causal_teacher") else GUIDANCE), name


@pytest.mark.parametrize(
    "name", ["teacher", "causal_teacher", "eulerian", "consistency", "on_policy", "causal", "causal_on_policy"]
)
def test_teachers_drop_a_tenth_of_their_prompts_and_students_none(name, begun):
    _, draw = BUILDERS[STAGES[name].kind](dataclasses.replace(STAGES[name], rows=512), 0, Earlier(begun))
    null, own = prompts_of(Latents(begun), draw(0))
    assert torch.equal(own, ~null)
    assert float(null.float().mean()) == pytest.approx(0.1 if "teacher" in name else 0, abs=0.04 * ("teacher" in name))


@pytest.mark.parametrize("name", ["on_policy", "causal_on_policy"])
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
    network, (noise, lengths, step) = student.network.network, (batch[each] for each in ("noise", "lengths", "step"))
    end = simulate(network, noise, lengths, step, **batch["condition"])[-1]
    for asked in (student.loss.real.asked, student.loss.fake.asked, learner.asked):
        ((scored, t),) = asked
        assert torch.equal(t, batch["score_t"])
        assert torch.allclose(scored, interpolate(end, batch["score_eps"], t), atol=1e-5)


def test_stages_come_after_what_they_start_from(small, monkeypatch):
    names = list(STAGES)
    assert all(stage.parent == "" or names.index(stage.parent) < names.index(name) for name, stage in STAGES.items())
    asked = []
    monkeypatch.setattr(video_stages, "run_jobs", lambda jobs, workers, after=None: asked.append((jobs, after)))
    video_stages.train_all(small, quiet=True)
    ((jobs, after),) = asked  # the codec is there
    assert set(jobs) == {(name, 0) for name in STAGES if name != "codec"}
    assert after == {(name, 0): (STAGES[name].parent, 0) for name, _ in jobs if STAGES[name].parent != "codec"}


def test_latents_of_another_codec_or_of_other_clips_are_made_again(small, monkeypatch):
    """A run may stop after the codec was trained anew and before its latents were made."""
    monkeypatch.setattr(video_stages, "run_jobs", lambda *jobs: None)
    place, path = small / video_stages.LATENTS, path_of(small, "codec")

    def held_after_a_run():
        video_stages.train_all(small, quiet=True)
        return load_file(place)["latents"]

    def encoded():
        return load_codec(path).encode(blobs.sample(video_stages.CLIPS, generator(100)).video)

    first, written = load_file(place)["latents"], place.stat()
    assert torch.equal(held_after_a_run(), first)
    assert place.stat().st_ino == written.st_ino  # what fits is left alone
    again = load_codec(path)
    for weight in again.parameters():
        weight.mul_(1.02)
    save_weights(path, again.state_dict(), read_weights(path, "codec")[2] | describe(again))
    assert torch.equal(held_after_a_run(), encoded())
    assert not torch.allclose(encoded(), first, atol=1e-2)
    monkeypatch.setattr(video_stages, "CLIPS", 40)
    assert torch.equal(held_after_a_run(), encoded())
    save_file({"latents": first, "balls": torch.ones(32)}, place)  # from before their file said what it is from
    assert torch.equal(held_after_a_run(), encoded())


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Stages of two steps, in a folder with the committed codec."""
    tiny = {name: dataclasses.replace(stage, steps=2, rows=8, seeds=(0,)) for name, stage in STAGES.items()}
    monkeypatch.setattr(video_stages, "STAGES", tiny | {"codec": STAGES["codec"]})
    monkeypatch.setattr(video_stages, "CLIPS", 32)
    monkeypatch.setattr(video_stages, "run_jobs", lambda jobs, *how: [f(*given) for f, given in jobs.values()])
    for end in ("safetensors", "json"):
        name = f"codec-0.{end}"
        (tmp_path / name).write_bytes((WEIGHTS / name).read_bytes())
    video_stages.make_latents(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_stage_trains_counts_and_goes_on_where_it_stopped(small, monkeypatch):
    video_stages.train_all(small, quiet=True)
    for name in STAGES:
        cost = read_weights(path_of(small, name), *KINDS)[2]["cost"]
        assert cost["seconds"] > 0
        assert name == "codec" or cost["forwards"] >= cost["backwards"] >= 16, name
    assert read_weights(path_of(small, "mixed"), *KINDS)[2]["cost"]["backwards"] == 16  # two steps of eight rows
    calls = []
    monkeypatch.setattr(video_stages, "train_stage", lambda name, *given: calls.append(name))
    video_stages.train_all(small, quiet=True)
    assert not calls
    path_of(small, "causal_gradient").unlink()
    video_stages.train_all(small, quiet=True)
    assert calls == ["causal_gradient"]


@pytest.mark.slow
def test_what_came_from_another_parent_is_trained_again(small):
    names = [name for name in STAGES if name in ("codec", "teacher", "semigroup")]
    few = {name: video_stages.STAGES[name] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_stages, "STAGES", few)
        video_stages.train_all(small, quiet=True)
        before = path_of(small, "semigroup").read_bytes()
        patch.setitem(few, "teacher", dataclasses.replace(few["teacher"], lr=1e-3))
        video_stages.train_stage("teacher", 0, small, quiet=True)  # as if interrupted here
        assert video_stages._is_done(small, "teacher", 0)
        assert not video_stages._is_done(small, "semigroup", 0)
        video_stages.train_all(small, quiet=True)
        assert path_of(small, "semigroup").read_bytes() != before


@pytest.mark.slow
def test_the_report_and_the_comparison_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(
        video_report, "run_jobs", lambda jobs, workers: {k: f(*given) for k, (f, given) in jobs.items()}
    )
    monkeypatch.setattr(video_report, "SEEN", 32)
    monkeypatch.setattr(video_report, "PADDED", 1)
    monkeypatch.setattr(
        video_report, "sample_ode", lambda u, z, times, **how: torch.stack([z, 0.9 * z])
    )  # minutes else
    names = ("teacher", "causal_gradient")
    report = video_report.run(output=tmp_path, names=names, nfes=(1,), quiet=True)
    assert json.loads((tmp_path / "any_step.json").read_text()) == report
    assert {path.name for path in tmp_path.iterdir()} == {
        "any_step.json",
        "any_step.png",
        "from_ideal.png",
        "contact_sheet.png",
    }
    assert report["padding"]["causal_gradient"]["root_mean_square_difference"] > 0.01
    assert len(report["long"]["causal_gradient"]["by_chunk"]) == 5  # 9 latent frames: 1, 2, 2, 2, 2
    assert report["methods"]["teacher"]["nfe"] == [1]
    for guided_or_not in ("teacher_ode", "guided_teacher_ode"):
        assert report[guided_or_not]["sliced_w2"] > report["floors"]["codec"]["sliced_w2"]
    assert report["guided_teacher"]["1"]["sliced_w2"] != report["methods"]["teacher"]["sliced_w2"][0][0]
    assert "teacher" in video_report.table(report)


def test_the_codec_measures_what_its_provenance_says(held):
    codec, _, _ = held
    said = json.loads(path_of(WEIGHTS, "codec").with_suffix(".json").read_text())["figures"]
    clips = blobs.sample(128, generator(11))
    seen = video_report.summary(codec.decode(codec.encode(clips.video)), clips.balls)
    for name in ("light", "from_ideal"):
        assert seen[name] == pytest.approx(said[name], rel=0.1), name


def test_the_codec_refuses_what_does_not_fit(held):
    codec, _, _ = held
    with pytest.raises(InputError, match=r"T = 4 n \+ 1"):
        codec.encode(torch.zeros(1, 16, 16, 16))
    with pytest.raises(InputError, match="multiples of 16"):
        codec.encode(torch.zeros(1, 17, 20, 16))
    with pytest.raises(InputError, match=r"expected \(B, F, 4, h, w\)"):
        codec.decode(torch.zeros(1, 5, 3, 4, 4))


def test_prompts_do_not_go_with_the_noise():
    """In turn they would: the parity of a Sobol point decides the sign of a coordinate."""
    _, balls = video_report.prompts_for(video_report.COUNT)
    z = sobol_noise(video_report.COUNT, (5, 4, 4, 4))
    assert (balls == 1).sum() == (balls == 2).sum()
    assert max(float(z[balls == ball].mean(0).abs().max()) for ball in (1, 2)) < 0.2


@pytest.fixture(scope="module")
def held():
    codec = load_codec(path_of(WEIGHTS, "codec"))
    return codec, *video_report.held_out(codec)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), TRAINED)
def test_committed_weights_measure_what_their_provenance_says(name, seed, held):
    path = path_of(WEIGHTS, name, seed)
    said = json.loads(path.with_suffix(".json").read_text())["figures"]["sliced_w2"]
    _, (reference, _), _ = held
    z, (prompt, _) = sobol_noise(video_report.COUNT, reference.shape[1:]), video_report.prompts_for(video_report.COUNT)
    ends = video_report.sample(video_report.how_sampled(name), load_network(path), z, prompt, 1)
    assert sliced_w2(ends, reference) == pytest.approx(said["1"], rel=1e-2)


def test_the_committed_weights_are_small_and_whole():
    files = list(Path(WEIGHTS).glob("*.safetensors"))
    assert {file.stem for file in files} == {f"{name}-{seed}" for name, seed in [*TRAINED, ("codec", 0)]}
    assert sum(file.stat().st_size for file in files) < 15e6
    for file in files:
        _, _, made = read_weights(file, *KINDS)
        assert made["command"].startswith("python -m minianyflow weights")
        assert made["stage"] == json.loads(json.dumps(dataclasses.asdict(STAGES[file.stem.rsplit("-", 1)[0]])))
