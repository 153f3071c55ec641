"""Targets of one's own: what is read is what was written, the fit is the one it is said to be, bad input is a line."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

from minianyflow.measures import sobol_noise
from minianyflow.mixtures import GaussianMixture
from minianyflow.plane import commands, race
from minianyflow.plane.learnt import learn
from minianyflow.plane.race import load_student, run, sample
from minianyflow.plane.race_figure import axes_of, draw_paths
from minianyflow.plane.students import Budget
from minianyflow.times import generator
from tests.refused import refused
from toy_data import own, plane
from toy_data.own import Sampled, of_points, read_points

POINTS = torch.randn(40, 2, generator=generator(1), dtype=torch.float64) * torch.tensor([3.0, 700.0]) + 5


def helix(count, generator):
    turn = 4 * math.pi * torch.rand(count, generator=generator)
    return torch.stack([turn.cos(), turn.sin(), turn / 4], 1) + 0.1 * torch.randn(count, 3, generator=generator)


def rows(points, mark=",", end="\n"):
    return end.join(mark.join(f"{number:.6f}" for number in point) for point in points.tolist())


@pytest.mark.parametrize(
    "text",
    [
        rows(POINTS),
        "\ufefflength, width of leaf\r\n" + rows(POINTS, end="\r\n") + "\r\n\r\n",
        '"a";"b"\n' + rows(POINTS, ";").replace(".", ","),
        "a\tb\n\n" + rows(POINTS, "\t"),
        rows(POINTS, "  "),
    ],
    ids=["commas", "names, BOM, CRLF", "semicolons, decimal commas", "tabs, empty line", "blanks"],
)
def test_a_table_is_read_however_it_was_saved(text, tmp_path):
    path = tmp_path / "points.csv"
    path.write_bytes(text.encode())
    assert torch.allclose(read_points(path), POINTS, atol=1e-6)


BAD_TABLES = {
    "words": ("x,y\n1,2\n3,leaf\n" + rows(POINTS), r"'leaf' on line 3 is no number; expected finite .*: correct or"),
    "nan": (rows(POINTS) + "\nnan,1", "'nan' on line 41 is no number"),
    "inf": ("inf,1\n" + rows(POINTS), "'inf' on line 1 is no number"),
    "missing": (rows(POINTS) + "\n1,", "'' on line 41 is no number"),
    "ragged": (rows(POINTS) + "\n\n1,2,3", "line 42 has 3 numbers, line 1 has 2; expected as many on every line"),
    "empty": ("\n \n", "is empty; expected a point a line"),
    "index": (",x,y\n" + "\n".join(f"{k},{k * k},{-k}" for k in range(9)), "first column has no name and counts"),
    "half names": ("x,1\n" + rows(POINTS), "'x' on line 1 is no number"),
    "quoted decimal commas": ('"1,5","2,5"\n' * 9, "'1,5' on line 2 is no number"),
    "underscores": ("1_0,2\n" * 9, "'1_0' on line 1 is no number"),
    "names alone": ("x,y\n", "has 0 points; expected at least 8"),
    "one point": ("x,y\n1,2\n", "has 1 point; expected at least 8"),
    "all equal": ("0.1,7\n" * 20, "column 1 has no spread; expected different numbers: leave it out"),
    "a flat column": (rows(torch.cat([POINTS, 0 * POINTS[:, :1]], 1)), "column 3 has no spread"),
    "a thousand dimensions": (rows(torch.randn(9, 1000)), "has points of 1000 numbers; expected 1 to 32: choose some"),
    "a field without end": (rows(POINTS) + "\n" + "1" * 140_000 + ",2", "cannot be read .field larger"),
    "another encoding": ("höhe,b\n".encode("latin-1") + rows(POINTS).encode(), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_one_clear_line(case, tmp_path):
    text, words = BAD_TABLES[case]
    path = tmp_path / "points.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(words):
        plane.load(path)


def a_picture(path, colour="white", ink="black", mode="RGB", place=(40, 10, 79, 29)):
    image = Image.new(mode, (120, 60), colour)
    if ink:
        ImageDraw.Draw(image).rectangle(place, fill=ink)
    image.save(path)
    return path


OTHERS = {
    "one colour": (lambda path: a_picture(path / "a.png", ink=None), "has one colour; expected a drawing"),
    "no picture": (lambda path: (path / "a.png").write_text("1,2") and path / "a.png", "is no picture"),
    "no file": (lambda path: "nosuch.csv", "nosuch.csv cannot be read"),
    "no picture file": (lambda path: path / "nosuch.png", "is no picture"),
    "no name": (lambda path: "spirol", "did you mean 'spiral'"),
    "a shape": (lambda path: lambda count, generator: torch.randn(count), r"has shape \(128,\); expected \(128, D"),
    "a count": (lambda path: lambda count, generator: torch.randn(5, 2), r"has shape \(5, 2\)"),
    "many numbers": (lambda path: lambda count, generator: torch.ones(count, 1000), "points of 1000 numbers"),
    "NaN": (lambda path: lambda count, generator: torch.full((count, 2), math.nan), "NaN"),
    "arguments": (lambda path: lambda count: torch.randn(count, 2), r"expected sample\(count, generator\)"),
    "states": (lambda path: GaussianMixture(torch.zeros(2, 3, 2), 1.0), r"states \(3, 2\).*: flatten its means"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_bad_targets_are_one_clear_line(case, tmp_path):
    make, words = OTHERS[case]
    with refused(words):
        plane.load(make(tmp_path))


def test_a_law_without_velocity_says_so():
    law = Sampled(torch.randn(64, 2))
    for call in (
        lambda: law.velocity(None, None),
        lambda: law.sample_stratified(48),
        lambda: law.sample_stratified(64),
    ):
        with refused("learn one|expected a power of two"):
            call()


def test_points_are_standardised_and_the_width_is_the_likeliest():
    """The likelihood of each point under the others is that of GaussianMixture, and the fit is where it is highest."""
    target = of_points(POINTS, "points.csv")
    law, (mean, scale) = target.law, (torch.tensor(value) for value in target.standardised.values())
    assert torch.allclose(law.means * scale + mean, POINTS.float(), rtol=1e-4)
    assert torch.allclose(law.means.std(0), torch.ones(2), atol=1e-4)

    def likelihood(width):
        others = [torch.cat([law.means[:k], law.means[k + 1 :]]) for k in range(40)]
        pairs = zip(law.means, others, strict=True)
        logs = [GaussianMixture(rest, width).log_density(point[None], torch.zeros(1)) for point, rest in pairs]
        return float(torch.cat(logs).mean())

    width = float(law.sigma)
    assert own.left_out_likelihood(law.means.double(), width) == pytest.approx(likelihood(width), abs=1e-3)
    assert likelihood(width) > max(likelihood(width / 1.5), likelihood(width * 1.5))


def test_of_many_points_some_are_fitted_and_the_words_say_so():
    target = of_points(torch.randn(3000, 3, generator=generator(2)), "points.csv")
    assert target.law.means.shape == (own.KERNELS, 3)
    assert (target.truth, target.in_report()["units"][:12]) == ("fitted", "standardised")
    assert "fitted to 1024 of 3000 points, each blurred by 0." in target.flow


def test_a_picture_is_the_density_of_its_ink(tmp_path):
    """A rectangle of 40 x 20 pixels: its mean, its two variances; the same whichever of ink and paper is dark."""
    target = plane.target(a_picture(tmp_path / "dark.png"))
    mean, scale = (torch.tensor(value) for value in target.standardised.values())
    pixels = target.law.means * scale + mean
    assert torch.allclose(mean, torch.tensor([60.0, -20.0]), atol=0.5)  # y points upwards
    assert float(scale[0]) == pytest.approx(math.sqrt((40**2 + 20**2) / 24), rel=0.03)
    assert bool(((pixels - mean).abs() < torch.tensor([20.0, 10.0])).all())
    assert torch.allclose(target.law.sample(20000, generator(0)).square().sum(1).mean(), torch.tensor(2.0), atol=0.05)
    for name, *options in (("bright.png", "black", "white"), ("clear.png", (0, 0, 0, 0), (0, 0, 0, 255), "RGBA")):
        other = plane.load(a_picture(tmp_path / name, *options))
        assert torch.allclose(other.means, target.law.means)
        assert torch.allclose(other.weights, target.law.weights)


def test_even_samples_are_evener_than_independent_ones():
    law = Sampled(torch.randn(2**15, 2, generator=generator(3)))
    even, free = (
        torch.stack([draw(512, generator(k)).cos().mean(0) for k in range(20)]).std(0).mean()
        for draw in (law.sample_stratified, law.sample)
    )
    assert float(even) < 0.4 * float(free)


@pytest.mark.parametrize(("numbers", "drawn"), [(1, 2), (2, 2), (3, 3), (5, 2)])
def test_states_of_any_dimension_are_drawn(numbers, drawn):
    figure, axes = plt.subplots(subplot_kw=axes_of(numbers))
    paths = torch.randn(5, 7, numbers)
    draw_paths(axes, paths, "black", paths[-1], paths[-1])
    line = axes.lines[0].get_data_3d() if drawn == 3 else axes.lines[0].get_data()
    assert np.allclose(line[-1], paths[:, 0, min(numbers, drawn) - 1])
    plt.close(figure)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A race in this process, of few points; returns its folder."""
    for name, value in {"POINTS": 256, "PIECE": 128, "NFE": (1, 2, 4, 16, 64)}.items():
        monkeypatch.setattr(race, name, value)
    jobs_here = lambda jobs, workers=1: {name: job(*given) for name, (job, given) in jobs.items()}  # noqa: E731
    monkeypatch.setattr(race, "run_jobs", jobs_here)
    return tmp_path / "demo"


@pytest.mark.slow
def test_a_table_in_three_dimensions_goes_through_the_demo(tiny, tmp_path, capsys):
    (tmp_path / "helix.csv").write_text("x,y,z\n" + rows(helix(300, generator(0)) * 100))
    arguments = ["--data", str(tmp_path / "helix.csv"), "--evaluations", "25000", "--seeds", "0,1", "--quiet"]
    assert commands.demo([*arguments, "--output", str(tiny)]) == 0
    report, said = json.loads((tiny / "any_step.json").read_text()), capsys.readouterr().out
    assert (report["dataset"], report["truth"], len(report["mean"])) == ("helix.csv", "fitted", 3)
    assert f"helix.csv, in units standardised: (x - mean) / scale; the truth: {report['flow']}" in said
    assert "mixture fitted to 300 points, each blurred by" in report["flow"]
    assert (tiny / "any_step.png").stat().st_size > 10_000
    student = load_student("mixed", 1, tiny)
    assert sample("mixed", student, "spiral", sobol_noise(8, (3,)), 4).shape == (5, 8, 3)


@pytest.mark.slow
def test_a_function_is_raced_against_a_velocity_learnt_from_its_samples(tiny):
    report = run(helix, (0,), Budget(evaluations=25_000), tiny, quiet=True, methods=("euler", "mixed"))
    assert (report["dataset"], report["truth"]) == ("helix", "learnt")
    assert report["flow"] == "a long ODE of a velocity learnt from 262144 samples"
    path = report["methods"]["euler"]["path_error"][0]
    assert path[-1] < 0.1 * path[0]  # Euler tends to that ODE


@pytest.mark.slow
def test_the_learnt_velocity_is_that_of_the_samples():
    """Of a standard normal it is a formula: (2 t - 1) / (t^2 + (1 - t)^2) z."""
    law = learn(Sampled(torch.randn(2**16, 2, generator=generator(4))), Budget(evaluations=128_000))
    z, t = torch.randn(2000, 2, generator=generator(5)), torch.rand(2000, generator=generator(6))
    spread = (t**2 + (1 - t) ** 2)[:, None]
    z = spread.sqrt() * z
    error = law.velocity(z, t) - (2 * t - 1)[:, None] / spread * z
    assert float(error.square().mean().sqrt()) < 0.3
    ends = law.flow(z[:200], torch.ones(200), torch.zeros(200))
    assert float((ends - z[:200]).norm(dim=1).mean()) < 0.2  # from a normal to a normal: the identity


@pytest.mark.long
def test_in_three_dimensions_the_path_error_falls_at_every_doubling(tmp_path):
    turn = torch.linspace(0, 4 * math.pi, 80)
    target = GaussianMixture(torch.stack([turn.cos(), turn.sin(), turn / 4 - math.pi / 2], 1), 0.08)
    report = run(target, (0, 1, 2), output=tmp_path, quiet=True, methods=("mixed",))
    path = np.array(report["methods"]["mixed"]["path_error"])  # (seeds, step counts)
    assert (np.diff(path[:, 1:7].mean(0)) < 0).all()  # from 2 to 64
