"""Evaluation of the blob students as exported: what is sampled, kept, measured, compared, and refused."""

import json
import re
import shutil
from functools import partial
from itertools import pairwise, takewhile

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from matplotlib.figure import Figure

from minianyflow.flow_map import velocity
from minianyflow.measures import frechet_distance
from minianyflow.networks.causal import causal_rollout
from minianyflow.networks.pipelines import save_pipeline
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.samplers import sample_euler, sample_flow_map
from minianyflow.support.cli import run
from minianyflow.times import generator, time_grid
from minianyflow.video.stages import WEIGHTS, path_of
from minianyflow.wan import evaluate as evaluation
from minianyflow.wan import samples as sampled
from minianyflow.wan.commands import evaluate as command
from minianyflow.wan.data.latents import write_latents
from minianyflow.wan.evaluate import labelled, table
from minianyflow.wan.folders import encode_prompts, moving_shapes
from minianyflow.wan.sampler import guided_network
from minianyflow.wan.samples import file_stem, motion, persistence, roughness
from toy_data import blobs

STEPS, VIDEOS = (1, 2, 8), 4
NAMES = {f"{prompt}-{index}.mp4" for prompt in blobs.PROMPTS for index in range(VIDEOS)}


@pytest.fixture(scope="module")
def networks():
    names = ("teacher", "eulerian", "causal", "causal_teacher")
    return {name: load_network(path_of(WEIGHTS, name)) for name in names}


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    """Exports, prompts and held-out latents of the blobs."""
    folder, codec, text = tmp_path_factory.mktemp("evaluation"), load_codec(path_of(WEIGHTS, "codec")), TextEncoder()
    for name in ("teacher", "eulerian", "causal"):
        stage = "teacher" if name == "teacher" else "forward"
        save_pipeline(folder / name, networks[name], codec, text, stage=stage)
    clips = blobs.sample(32, generator(101))
    captions = [blobs.PROMPTS[balls - 1] for balls in clips.balls.tolist()]
    write_latents(folder / "held_out", codec.encode(clips.video), text(captions), text([""]), captions, null_text="")
    (folder / "prompts.txt").write_text("\n".join([*blobs.PROMPTS, blobs.PROMPTS[0]]) + "\n")  # one of them twice
    return folder


def call(*arguments, steps=STEPS, videos=VIDEOS, data=("--data", "held_out")):
    """The exit status of `evaluate`, sources first, in the folder of the exports."""
    options = ["--prompts", "prompts.txt", *data, "--videos", videos, "--batch", 8, "--steps", *steps]
    sources = list(takewhile(lambda argument: not str(argument).startswith("--"), arguments))
    argv = [*sources, *options, *arguments[len(sources) :]]
    return run(lambda: command([str(argument) for argument in argv]))


@pytest.fixture
def evaluate(folder, monkeypatch):
    """`call`, without real videos."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sampled, "write_clip", lambda path, clip, fps: path.write_bytes(b"a video"))
    monkeypatch.setattr(evaluation, "sheet", lambda samples, steps: Figure((1, 1)))
    return call


@pytest.fixture(scope="module")
def made(folder):
    """Teacher and student, evaluated once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("teacher", "eulerian", "--output", "out", steps=reversed(STEPS)) == 0
    return folder / "out"


def report_of(folder):
    return json.loads((folder / "any_step.json").read_text())


def noise(numbers):
    return torch.stack([torch.randn(5, 4, 4, 4, generator=generator(0, number)) for number in numbers])


def kept(folder, label, steps, count=2 * VIDEOS):
    files = [folder / label / f"latents/{steps}_steps/{number:05}.safetensors" for number in range(count)]
    return torch.stack([sampled.read_file(file, "latents")[0]["latents"] for file in files])


# ---- what is sampled


@pytest.mark.slow
@pytest.mark.parametrize("steps", STEPS)
def test_clips_are_what_our_samplers_make_of_the_trained_networks(made, networks, steps):
    prompt, z = TextEncoder()(blobs.PROMPTS).repeat(VIDEOS, 1, 1), noise(range(2 * VIDEOS))
    student = sample_flow_map(networks["eulerian"], z, time_grid(steps), prompt=prompt)[-1]
    assert float((kept(made, "eulerian", steps) - student).abs().max()) < 1e-4
    teacher = sample_euler(partial(velocity, networks["teacher"]), z, time_grid(steps), prompt=prompt)[-1]
    assert float((kept(made, "teacher", steps) - teacher).abs().max()) < 1e-4


@pytest.mark.slow
def test_videos_lie_as_vbench_wants_them(made):
    for label in ("teacher", "eulerian"):
        for steps in STEPS:
            assert {file.name for file in (made / label / f"videos/{steps}_steps").iterdir()} == NAMES
    assert json.loads((made / "prompts.json").read_text()) == {name: name[:-6] for name in NAMES}
    assert all(min(imageio.imread(made / name).shape[:2]) > 400 for name in ("any_step.png", "sheet.png"))
    codec, number = load_codec(path_of(WEIGHTS, "codec")), 3  # the second prompt's second clip
    frames = imageio.mimread(made / "eulerian/videos/8_steps/two balls-1.mp4")
    video = torch.tensor(np.array(frames)) / 255  # (T, H, W, 3)
    expected = codec.decode(kept(made, "eulerian", 8)[number : number + 1])[0]
    assert float((video.mean(-1) - expected).abs().mean()) < 0.02
    others = codec.decode(kept(made, "eulerian", 8)[[1, 2, 5]])
    assert float((video.mean(-1) - others).abs().mean((1, 2, 3)).min()) > 0.04


@pytest.mark.slow
def test_causal_sources_are_sampled_chunk_by_chunk(folder, networks, evaluate):
    assert evaluate("causal", "--output", "out_causal", steps=(1, 4), videos=2) == 0
    prompt, z = TextEncoder()(blobs.PROMPTS).repeat(2, 1, 1), noise(range(4))
    expected = causal_rollout(networks["causal"], z, time_grid(4), prompt)[-1]
    assert float((kept(folder / "out_causal", "causal", 4, 4) - expected).abs().max()) < 1e-4
    method = report_of(folder / "out_causal")["methods"]["causal"]
    assert method["evaluations"] == [[3 * steps + 2 for steps in (1, 4)]]  # three chunks, and two to remember


@pytest.mark.slow
def test_a_teacher_may_be_guided_and_a_student_is_not(folder, networks, evaluate, made):
    asked = ["teacher", "eulerian", "--guidance", 3, "--negative", "two balls", "--output", "out_guided"]
    assert evaluate(*asked, steps=(2, 4)) == 0
    prompt, z = TextEncoder()(blobs.PROMPTS).repeat(VIDEOS, 1, 1), noise(range(2 * VIDEOS))
    null = TextEncoder()(["two balls"]).expand_as(prompt)

    def guided(z, t, prompt):
        v, v_null = (velocity(networks["teacher"], z, t, prompt=each) for each in (prompt, null))
        return 3 * v - 2 * v_null

    expected = sample_euler(guided, z, time_grid(2), prompt=prompt)[-1]
    assert float((kept(folder / "out_guided", "teacher", 2) - expected).abs().max()) < 1e-4
    assert torch.equal(kept(folder / "out_guided", "eulerian", 2), kept(made, "eulerian", 2))
    methods = report_of(folder / "out_guided")["methods"]
    assert methods["eulerian"]["evaluations"] == [[2, 4]]
    assert methods["teacher"]["evaluations"] == [[3, 6]]  # half of the clips have the null prompt: they are asked once


@pytest.mark.slow
def test_wan_itself_is_followed_by_eulers_method_on_its_own_times(tiny, tmp_path):
    """The velocity of the stock class, guided; from noise of our seed, on a grid of the scheduler's own shift."""
    (tmp_path / "prompts.txt").write_text("a red disc\n")
    size = ["--frames", 5, "--height", 16, "--width", 16, "--length", 8, "--batch", 2]
    options = ["--prompts", tmp_path / "prompts.txt", "--guidance", 4, "--negative", "ugly", *size, "--device", "cpu"]
    assert call(tiny, *options, "--output", tmp_path / "out", steps=(1, 3), videos=2, data=[]) == 0
    stock = WanPipeline.from_pretrained(tiny)
    shape = (2, 16, 2, 2)
    z = torch.stack([torch.randn(shape, generator=generator(0, number)) for number in range(2)]).transpose(1, 2)
    prompts = encode_prompts(stock.tokenizer, stock.text_encoder, ["a red disc", "ugly"], 8)
    times = [3 * t / (1 + 2 * t) for t in (1, 2 / 3, 1 / 3, 0)]  # shift 3
    with torch.no_grad():
        for t, r in pairwise(times):
            v, v_null = (
                stock.transformer(z, torch.full((2,), 1000 * t), each.expand(2, -1, -1), return_dict=False)[0]
                for each in prompts.split(1)
            )
            z = z - (t - r) * (4 * v - 3 * v_null)
    made = kept(tmp_path / "out", "tiny", 3, 2)
    assert float((made - z.transpose(1, 2)).abs().max()) < 1e-3 * float(z.abs().max())
    assert report_of(tmp_path / "out")["methods"]["tiny"]["evaluations"] == [[2, 6]]


@pytest.mark.slow
def test_a_causal_teacher_keeps_a_cache_for_each_branch(networks):
    network, z = networks["causal_teacher"], noise(range(2))
    prompt, null = TextEncoder()(blobs.PROMPTS), TextEncoder()([""])
    config = type("", (), {"architecture": "causal"})
    made = causal_rollout(guided_network(network, config, null, 3.0), z, time_grid(2), prompt)[-1]

    def whole(z, t, r, prompt, context):  # nothing is remembered
        v, v_null = (network(z, t, t, prompt=each, context=context) for each in (prompt, null.expand_as(prompt)))
        return 3 * v - 2 * v_null

    with torch.no_grad():
        expected = causal_rollout(whole, z, time_grid(2), prompt, cached=False)[-1]
    assert float((made - expected).abs().max()) < 1e-3
    assert float((made - causal_rollout(network, z, time_grid(2), prompt)[-1]).abs().max()) > 0.1


# ---- what is measured


@pytest.mark.slow
def test_more_steps_bring_a_flow_map_to_its_own_many_step_sample(made):
    methods = report_of(made)["methods"]
    for name in ("teacher", "eulerian"):
        (path,) = methods[name]["path_error"]
        assert path[0] > path[1] > 0
        assert path[2] is None  # it is compared with itself
        expected = (kept(made, name, 1) - kept(made, name, 8)).flatten(1).norm(dim=1).mean()
        assert path[0] == pytest.approx(float(expected), rel=1e-4)
    assert methods["eulerian"]["path_error"][0][0] < 0.6 * methods["teacher"]["path_error"][0][0]


@pytest.mark.slow
def test_one_step_of_a_flow_map_is_nearer_to_data_than_one_of_its_teacher(made):
    methods, floor = report_of(made)["methods"], report_of(made)["floors"]["data"]
    for measure in ("sliced_w2", "temporal_roughness"):  # eight clips are too few for a Frechet distance to tell
        (teacher,), (student,) = (methods[name][measure] for name in ("teacher", "eulerian"))
        assert student[0] < 0.95 * teacher[0], measure
        assert teacher[2] < teacher[0], measure
    assert floor["motion"] == pytest.approx(methods["eulerian"]["motion"][0][2], rel=0.2)


@pytest.mark.slow
def test_two_sources_stand_in_one_table_with_their_ratio(made):
    text = table(report_of(made))
    methods = report_of(made)["methods"]
    block = text.split("sliced W2 of latents")[1].split("\n\n")[0].splitlines()
    assert block[0].startswith(f" ({2 * VIDEOS} clips; data: ")
    assert block[1].split() == ["steps", "teacher", "eulerian", "eulerian", "/", "teacher"]
    one, other = (methods[name]["sliced_w2"][0][0] for name in ("teacher", "eulerian"))
    assert block[2].split() == ["1", f"{one:.4g}", f"{other:.4g}", f"{other / one:.2f}"]
    last = text.split("distance to own sample of 8 steps")[1].split("\n\n")[0].splitlines()[-1]
    assert last.split() == ["8", "-", "-", "-"]


def test_a_frechet_distance_of_few_large_samples_is_the_same():
    a, b = torch.randn(2, 50, 8, generator=generator(0))
    b = 2 * b + 1
    wide = [torch.cat([each, torch.zeros(50, 80)], 1) for each in (a, b)]
    turn = torch.linalg.qr(torch.randn(88, 88, generator=generator(1)))[0]  # spread over all of them
    assert frechet_distance(*(each @ turn for each in wide), 2) == pytest.approx(frechet_distance(a, b, 2), rel=1e-4)
    assert frechet_distance(wide[0], wide[0], 2) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match=r"n at least 2048"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match=r"shape \(1, 8\); expected .* n at least 2"):
        frechet_distance(a[:1], b[:1], 2)


def test_roughness_is_known_for_known_motion():
    def read(video):
        known = [motion(clip) for clip in video[:, :, None, None, None]]
        return roughness({name: [each[name] for each in known] for name in known[0]})

    steady = torch.arange(16.0).expand(4, 16)
    white = torch.randn(64, 400, generator=generator(0))
    assert read(steady) == pytest.approx(0, abs=1e-6)
    assert read(white.cumsum(1)) == pytest.approx(2, rel=0.03)
    assert read(white) == pytest.approx(3, rel=0.03)
    assert read(torch.ones(2, 9)) != read(torch.ones(2, 9))  # NaN: nothing moves
    assert motion(steady[0][:, None, None, None])["change"] == pytest.approx(1)


def test_flow_persists_where_motion_does():
    def read(video):
        known = [motion(clip[:, None].expand(-1, 3, -1, -1)) for clip in video]
        return persistence({name: [each[name] for each in known] for name in known[0]})

    data, redrawn = (read(blobs.sample(128, generator(3), redraw=frame).video) for frame in (None, 8))
    assert data > 0.4 > redrawn  # one of three boundaries is redrawn
    shapes = moving_shapes(8, generator(1))[1].mean(2)
    assert read(shapes) > 0.9  # they are as large as a block
    assert read(torch.cat([shapes[:, :5], shapes[:, :4].flip(1)], 1)) < -0.9  # back again in the next latent frame
    assert read(torch.ones(2, 17, 16, 16)) != read(torch.ones(2, 17, 16, 16))  # NaN: nothing flows
    assert motion(shapes[0, :8, None])["flow"] == 0  # fewer than two latent frames


# ---- what is kept


def spied(monkeypatch, stop=None):
    """How many clips are sampled at which step counts, in order; an interruption before call `stop`."""
    calls, original = [], sampled.sample

    def spy(config, network, z, prompt, steps):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append((steps, len(z)))
        return original(config, network, z, prompt, steps)

    monkeypatch.setattr(sampled, "sample", spy)
    return calls


@pytest.mark.slow
def test_nothing_is_sampled_twice(folder, made, evaluate, monkeypatch):
    out = shutil.copytree(made, folder / "out_again")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    calls = spied(monkeypatch)
    assert evaluate("teacher", "eulerian", "--output", out) == 0
    assert calls == []
    assert report_of(out)["methods"] == report_of(made)["methods"]
    (out / "eulerian/latents/2_steps/00003.safetensors").unlink()
    (out / "eulerian/latents/2_steps/00003.json").unlink()
    assert evaluate("teacher", "eulerian", "--output", out, steps=(*STEPS, 3)) == 0
    assert sorted(calls) == [(2, 1), (3, 8), (3, 8)]
    written = {path for path in out.rglob("*.mp4") if before.get(path) != path.stat().st_mtime_ns}
    assert {path.parent.name for path in written} == {"2_steps", "3_steps"}
    assert len(written) == 1 + 4 * VIDEOS
    assert float((kept(out, "eulerian", 2) - kept(made, "eulerian", 2)).abs().max()) < 1e-5


@pytest.mark.slow
def test_an_interruption_leaves_whole_files_and_the_same_end(folder, made, evaluate, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        calls = spied(patch, stop=2)
        assert evaluate("eulerian", "--output", "out_cut") == 130
    assert calls == [(1, 8), (2, 8)]
    assert torch.equal(kept(folder / "out_cut", "eulerian", 2), kept(made, "eulerian", 2))
    with monkeypatch.context() as patch:
        write = sampled.write_clip
        counted = []

        def full(path, clip, fps):
            assert "videos" not in path.parts  # a kill may leave it there, and VBench takes what it finds in a folder
            counted.append(path)
            path.write_bytes(b"half a video")
            if len(counted) == 5:
                raise OSError(28, "No space left on device")
            write(path, clip, fps)

        patch.setattr(sampled, "write_clip", full)
        assert evaluate("eulerian", "--output", "out_cut") == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    out = folder / "out_cut/eulerian"
    assert len(list(out.rglob("*.mp4"))) == 2 * 8 + 4
    assert not list(out.rglob(".unfinished*"))
    assert not (folder / "out_cut/any_step.json").exists()
    for killed in (out, out.parent):  # what SIGKILL leaves; `make faults` sends it
        (killed / ".unfinished-killed").mkdir()
        (killed / ".unfinished-killed/clip.mp4").write_bytes(b"half")
    calls = spied(monkeypatch)
    assert evaluate("eulerian", "--output", "out_cut") == 0
    assert calls == [(8, 4)]
    assert not list(out.parent.rglob(".unfinished*"))
    for steps in STEPS:
        assert float((kept(folder / "out_cut", "eulerian", steps) - kept(made, "eulerian", steps)).abs().max()) < 1e-5
    mine, whole = (report_of(each)["methods"]["eulerian"] for each in (folder / "out_cut", made))
    assert (list(mine), mine["evaluations"]) == (list(whole), whole["evaluations"])


@pytest.mark.slow
def test_few_latents_are_kept_where_clips_are_large(folder, made, evaluate, monkeypatch):
    monkeypatch.setattr(sampled, "MOST", 4 * 320)  # numbers of four clips
    assert evaluate("eulerian", "--output", "out_few", steps=(1, 2)) == 0
    out = folder / "out_few"
    assert len(list((out / "eulerian/latents/1_steps").glob("*.safetensors"))) == 4
    assert len(list((out / "eulerian/videos/1_steps").iterdir())) == 2 * VIDEOS
    assert report_of(out)["measure"]["compared"] == 4
    calls = spied(monkeypatch)
    assert evaluate("eulerian", "--output", "out_few", steps=(1, 2)) == 0
    assert calls == []


# ---- names


def test_prompts_are_names_of_files_wherever_they_can_be():
    assert file_stem("A 3D model of a 1800s victorian house.") == "A 3D model of a 1800s victorian house."
    odd = ["either/or", "either_or", "x" * 300, "x" * 301, "..", "é" * 200, "a\\b"]
    names = [file_stem(each) for each in odd]
    assert len({*names}) == len(odd)
    assert all(len(name.encode()) <= 240 and "/" not in name and not name.startswith(".") for name in names)


def test_sources_are_told_apart_by_the_ends_of_their_names():
    assert labelled(["a/b", "nvidia/c/"]) == {"b": "a/b", "c": "nvidia/c/"}
    assert labelled(["a/x", "b/x", "b/y"]) == {"a-x": "a/x", "b-x": "b/x", "b-y": "b/y"}
    assert list(labelled(["./x", "a/x"])) == ["x", "a-x"]
    for sources in (["..", "a/x"], [".", "a/x"], ["a/..", "../.."], ["/tmp/../x", "./.."]):  # which would lead outside
        assert all(re.fullmatch(r"\w[^/]*", label) for label in labelled(sources))


# ---- bad input


@pytest.mark.slow
def test_bad_input_is_one_line(folder, made, evaluate, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (folder / "no_export").mkdir(exist_ok=True)
    rows = torch.zeros(3, 5, 4, 4, 4)
    write_latents(tmp_path / "few", rows, torch.zeros(3, 4, 16), torch.zeros(1, 4, 16), ["x"] * 3)
    same = torch.zeros(8, 5, 4, 4, 4), torch.zeros(8, 4, 16), torch.zeros(1, 4, 16)
    write_latents(tmp_path / "same", *same, ["x"] * 8)
    shutil.copytree(folder / "eulerian", tmp_path / "short")
    known = json.loads((tmp_path / "short/minianyflow.json").read_text())
    known["clip"]["frames"] = 13
    (tmp_path / "short/minianyflow.json").write_text(json.dumps(known))
    large = torch.zeros(8, 5, 4, 8, 8)
    write_latents(tmp_path / "other", large, torch.zeros(8, 4, 16), torch.zeros(1, 4, 16), ["x"] * 8)
    for arguments, message in (
        (["none"], "no folder none; expected the folder of a run"),
        (["no_export"], "neither run.json nor model_index.json in no_export"),
        (["eulerian", "no_export"], "neither run.json nor model_index.json in no_export"),
        (["eulerian", "./eulerian"], "sources eulerian, ./eulerian; expected different ones"),
        (["eulerian", "--prompts", tmp_path / "none.txt"], r"cannot read .*none.txt \(No such file"),
        (["eulerian", "--prompts", tmp_path / "empty.txt"], "no prompts in .*empty.txt"),
        (["eulerian", "--steps", 4, 0], "0 steps; expected whole numbers, at least 1"),
        (["eulerian", "--videos", 0], "videos 0; expected at least 1"),
        (["eulerian", "--batch", -1], "batch -1; expected at least 1"),
        (["eulerian", "--guidance", 0.5], "guidance 0.5; expected at least 1"),
        (["eulerian", "--guidance", "inf"], "guidance inf; expected at least 1, at most a million"),
        (["eulerian", "--videos", 10**13], "at most a million"),
        (["eulerian", "--frames", 16], "frames 16; expected 4 n"),
        (["eulerian", tmp_path / "short"], r"clips of 17 x 16 x 16 \(eulerian\), 13 x 16 x 16 \(.*; expected one"),
        (["teacher", "--guidance", 2, "--data", tmp_path / "same"], "does not say of which text its null prompt is; "),
        (["eulerian", "--frames", 9], r"eulerian makes latents \(3, 4, 4, 4\); expected \(5, 4, 4, 4\), as held_out"),
        (["eulerian", "--height", 20], "height 20; expected a multiple of 8: the codec's 4, patches of 2"),
        (["eulerian", "--data", tmp_path / "none"], "no latents in .*none"),
        (["eulerian", "--data", tmp_path / "few"], "8 clips and 3 held-out latents; a Frechet .* 2 and 4"),
        (["eulerian", "--data", tmp_path / "other"], r"expected \(5, 4, 8, 8\)"),
        (["eulerian", "--output", made, "--seed", 1], r"sampled with another setting \(seed\); name another folder"),
        (["eulerian", "--output", made, "--videos", 5], r"another setting \(videos\)"),
    ):
        options = [] if "--output" in arguments else ["--output", tmp_path / "out"]
        capsys.readouterr()
        assert evaluate(*arguments, *options) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1, error
        assert re.search(message, error[0]), error[0]
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.slow
def test_samples_that_are_not_finite_are_one_line(folder, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(sampled, "sample", lambda config, u, z, prompt, steps: z / 0)
    assert evaluate("eulerian", "--output", "out_nan", steps=(1,)) == 2
    assert "eulerian at 1 steps is not finite" in capsys.readouterr().err
    assert not list((folder / "out_nan").rglob("*.safetensors"))


# ---- VBench


@pytest.mark.slow
def test_scores_of_vbench_are_read_where_its_command_left_them(folder, made, evaluate, tmp_path, capsys):
    """One file per dimension and run; a step count that was not scored has no value."""
    out = shutil.copytree(made, tmp_path / "out")
    for label, steps, name, score in (
        ("eulerian", 1, "temporal_flickering", 0.9),
        ("eulerian", 8, "temporal_flickering", 0.95),
        ("eulerian", 8, "motion_smoothness", 0.5),
        ("teacher", 1, "temporal_flickering", 0.45),
    ):
        place = out / label / f"vbench/{steps}_steps"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"results_{name}_eval_results.json").write_text(json.dumps({name: [score, [{"video_path": "x"}]]}))
    assert evaluate("teacher", "eulerian", "--output", out) == 0
    methods = report_of(out)["methods"]
    assert methods["eulerian"]["vbench_temporal_flickering"] == [[0.9, None, 0.95]]
    assert methods["eulerian"]["vbench_motion_smoothness"] == [[None, None, 0.5]]
    assert methods["teacher"]["vbench_temporal_flickering"] == [[0.45, None, None]]
    lines = capsys.readouterr().out.split("vbench temporal flickering")[1].splitlines()
    assert lines[2].split() == ["1", "0.45", "0.9", "2.00"]
    assert lines[3].split() == ["2", "-", "-", "-"]
