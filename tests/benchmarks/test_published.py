"""AnyFlow's choices beside ours: the committed report holds every arm, and a label names a half of the spiral."""

import torch

from benchmarks import published
from minianyflow.course.notebooks import report
from minianyflow.times import generator


def test_the_report_has_every_arm_and_three_seeds():
    committed = report("wan/choices.json")
    for toy, (_, groups, _) in published.TOYS.items():
        arms = {name: [*arms] for name, (_, arms) in groups.items()}
        assert {name: [*entry] for name, entry in committed[toy].items()} == arms
    entries = [entry for groups in committed.values() for arms in groups.values() for entry in arms.values()]
    assert {len(entry["figures"]) for entry in entries} == {3}


def test_a_label_names_a_half_of_the_spiral():
    """The velocity of all is the mean of the halves', weighted by their densities."""
    z, t = torch.randn(60, 2, generator=generator(0)), torch.rand(60, generator=generator(1))
    whole, one, other = (published.labelled_velocity(z, t, torch.full((60,), label)) for label in (0.0, 1.0, -1.0))
    density = torch.stack([half.log_density(z, t) for half in published.HALVES]).softmax(0)[..., None]
    assert torch.allclose(whole, density[0] * one + density[1] * other, atol=1e-4)
