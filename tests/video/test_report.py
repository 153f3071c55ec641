"""The report of the video students, and the committed networks, which measure what their provenance says."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from minianyflow.measures import frechet_distance, sliced_w2, sobol_noise
from minianyflow.networks.weights import KINDS, load_codec, load_network, read_weights
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.video import report as video_report
from minianyflow.video.stages import STAGES, WEIGHTS, path_of
from toy_data import blobs

SPREAD = ("eulerian", "causal")  # all seeds are committed; of the others one, for size, and of some none
NONE = ("lagrangian", "semigroup", "forward_only")  # nothing starts from them
TRAINED = [(name, seed) for name in STAGES for seed in (STAGES[name].seeds if name in SPREAD else (0,))]
TRAINED = [(name, seed) for name, seed in TRAINED if name not in NONE]
QUICK = {("teacher", 0), ("eulerian", 1), ("consistency", 0), ("on_policy", 0), ("causal", 0), ("causal_teacher", 0)}


@pytest.mark.slow
def test_the_report_and_the_comparison_are_whole(tmp_path, monkeypatch):
    instead = {
        "run_jobs": lambda jobs, workers: {name: f(*given) for name, (f, given) in jobs.items()},
        "sample_ode": lambda u, z, times, **how: torch.stack([z, 0.9 * z]),  # minutes else
        "frechet_distance": partial(frechet_distance, least=2),
        **{"COUNT": 256, "SEEN": 32, "PADDED": 1},
    }
    for name, value in instead.items():
        monkeypatch.setattr(video_report, name, value)
    names = ("teacher", "causal_gradient")
    report = video_report.run(output=tmp_path, names=names, nfes=(1,), quiet=True)
    assert json.loads((tmp_path / "any_step.json").read_text()) == report
    pictures = {"any_step.png", "from_ideal.png", "contact_sheet.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"any_step.json", *pictures}
    assert report["padding"]["causal_gradient"]["root_mean_square_difference"] > 0.01
    assert len(report["long"]["causal_gradient"]["by_chunk"]) == 5  # 9 latent frames: 1, 2, 2, 2, 2
    assert report["methods"]["teacher"]["nfe"] == [1]
    for ode in ("teacher_ode", "guided_teacher_ode"):
        assert report[ode]["sliced_w2"] > report["floors"]["codec"]["sliced_w2"]
    assert report["guided_teacher"]["1"]["sliced_w2"] != report["methods"]["teacher"]["sliced_w2"][0][0]
    assert "codec" in video_report.table(report)


def test_a_comparison_notes_what_it_measured_beside_what_was_committed(tmp_path, monkeypatch):
    for name in ("codec", "eulerian"):
        for path in (path_of(WEIGHTS, name), path_of(WEIGHTS, name).with_suffix(".json")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    method = {"seeds": [0], "nfe": [1, 4], "sliced_w2": [[0.1, 0.05]], "seconds": 7.0}
    report = {"methods": {"eulerian": method}, "floors": {"codec": {"sliced_w2": 0.04}}}
    monkeypatch.setattr(video_report, "run", lambda *given, **options: report)
    said = json.loads(path_of(WEIGHTS, "eulerian").with_suffix(".json").read_text())["figures"]["sliced_w2"]
    line = video_report.comparison(tmp_path).splitlines()[1].split()
    assert line == ["eulerian", "100.0", f"{1000 * said['1']:.1f}", "50.0", f"{1000 * said['4']:.1f}", "7"]
    noted = read_weights(tmp_path / "eulerian-0.safetensors", "wan")[2]["figures"]
    assert noted == {"sliced_w2": {"1": 0.1, "4": 0.05}}


@pytest.mark.slow
def test_the_codec_measures_what_its_provenance_says_and_refuses_what_does_not_fit():
    codec = load_codec(path_of(WEIGHTS, "codec"))
    said = json.loads(path_of(WEIGHTS, "codec").with_suffix(".json").read_text())["figures"]
    clips = blobs.sample(128, generator(11))
    found = video_report.summary(codec.decode(codec.encode(clips.video)), clips.balls)
    for name in ("light", "from_ideal"):
        assert found[name] == pytest.approx(said[name], rel=0.1), name
    for shape, match in (((1, 16, 16, 16), r"T = 4 n \+ 1"), ((1, 17, 20, 16), "multiples of 16")):
        with pytest.raises(InputError, match=match):
            codec.encode(torch.zeros(shape))
    with pytest.raises(InputError, match=r"expected \(B, F, 4, h, w\)"):
        codec.decode(torch.zeros(1, 5, 3, 4, 4))


def test_prompts_do_not_go_with_the_noise():
    """In turn they would: the parity of a Sobol point decides the sign of a coordinate."""
    _, balls = video_report.prompts_for(video_report.COUNT)
    z = sobol_noise(video_report.COUNT, (5, 4, 4, 4))
    assert (balls == 1).sum() == (balls == 2).sum()
    assert max(float(z[balls == ball].mean(0).abs().max()) for ball in (1, 2)) < 0.2


@pytest.fixture(scope="module")
def reference():
    """The first half of `held_out`."""
    return load_codec(path_of(WEIGHTS, "codec")).encode(blobs.sample(video_report.COUNT, generator(101)).video)


@pytest.mark.parametrize(
    ("name", "seed"),
    [pytest.param(*one, marks=pytest.mark.slow if one in QUICK else pytest.mark.long) for one in TRAINED[1:]],
)
def test_committed_weights_measure_what_their_provenance_says(name, seed, reference):
    path = path_of(WEIGHTS, name, seed)
    said = json.loads(path.with_suffix(".json").read_text())["figures"]["sliced_w2"]
    z, (prompt, _) = sobol_noise(video_report.COUNT, reference.shape[1:]), video_report.prompts_for(video_report.COUNT)
    ends = video_report.sample(video_report.how_sampled(name), load_network(path), z, prompt, 1)
    assert sliced_w2(ends, reference) == pytest.approx(said["1"], rel=1e-2)


def test_the_committed_weights_are_small_and_whole():
    files = list(Path(WEIGHTS).glob("*.safetensors"))
    assert {file.stem for file in files} == {f"{name}-{seed}" for name, seed in TRAINED}
    assert sum(file.stat().st_size for file in files) < 15e6
    for file in files:
        _, _, provenance = read_weights(file, *KINDS)
        assert provenance["command"].startswith("python -m minianyflow weights")
        stage = STAGES[file.stem.rsplit("-", 1)[0]]
        assert provenance["stage"] == json.loads(json.dumps(dataclasses.asdict(stage)))
