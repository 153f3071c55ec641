"""What docs/video.md claims of the committed runs, asserted of their reports."""

import json
from itertools import pairwise

import pytest

from minianyflow.support.install import ROOT
from minianyflow.support.reports import mean

REPORT = json.loads((ROOT / "docs/video/any_step.json").read_text())
CIRCLE = json.loads((ROOT / "docs/video/exposure.json").read_text())
EXPOSURE, LONG = CIRCLE["arms"], CIRCLE["long"]


def at(name, nfe, measure="sliced_w2"):
    """One figure of every seed."""
    method = REPORT["methods"][name]
    return [by_nfe[method["nfe"].index(nfe)] for by_nfe in method[measure]]


def spread(values):
    return max(values) - min(values)


def test_two_steps_are_as_good_as_sixteen_of_the_teacher_and_four_as_thirty_two():
    guided = REPORT["guided_teacher"]
    for nfe, of_teacher in ((2, 16), (4, 32)):
        assert max(at("eulerian", nfe)) <= mean(at("teacher", of_teacher))
        assert max(at("eulerian", nfe)) <= guided[str(of_teacher)]["sliced_w2"]


def test_the_excess_at_one_step_is_a_tenth_of_the_teachers():
    floor = REPORT["floors"]["codec"]["sliced_w2"]
    student, teacher = (mean(at(name, 1)) - floor for name in ("eulerian", "teacher"))
    assert student <= min(0.05 * teacher, 0.1 * (REPORT["guided_teacher"]["1"]["sliced_w2"] - floor))


def test_more_steps_never_hurt_up_to_128():
    steps = REPORT["methods"]["eulerian"]["nfe"]
    assert steps == [1, 2, 4, 8, 16, 32, 64, 128]
    rises = [mean(at("eulerian", after)) - mean(at("eulerian", before)) for before, after in pairwise(steps)]
    assert max(rises[:5]) < 0
    assert max(rises) < 1e-4 < min(spread(at("eulerian", nfe)) for nfe in steps)
    ode = REPORT["guided_teacher_ode"]["sliced_w2"]
    assert mean(at("eulerian", 64)) < ode < REPORT["guided_teacher"]["128"]["sliced_w2"]


def test_the_eulerian_objective_is_best_up_to_8_steps_and_the_four_end_together():
    objectives = ("eulerian", "mixed", "semigroup", "lagrangian")
    for nfe in (1, 2, 4, 8):
        assert min(objectives, key=lambda name: mean(at(name, nfe))) == "eulerian"
    for nfe in (32, 64, 128):
        assert spread([mean(at(name, nfe)) for name in objectives]) < 0.0012


def test_consistency_is_best_at_one_step_and_never_again():
    assert max(at("consistency", 1)) < min(at("eulerian", 1))
    for nfe in REPORT["methods"]["consistency"]["nfe"][1:]:
        assert mean(at("consistency", nfe)) > mean(at("consistency", 1)) + spread(at("consistency", nfe))
        assert mean(at("consistency", nfe)) > mean(at("eulerian", nfe))
    assert mean(at("consistency", 16, "prompt_obeyed")) > mean(at("eulerian", 16, "prompt_obeyed")) + 0.015
    assert mean(at("consistency", 16, "from_ideal")) < mean(at("eulerian", 16, "from_ideal"))
    assert mean(at("consistency", 16, "light_kept")) < mean(at("eulerian", 16, "light_kept"))


def test_on_policy_neither_hurts_nor_helps():
    def worse(nfe, measure="sliced_w2"):
        return mean(at("on_policy", nfe, measure)) - mean(at("forward_only", nfe, measure))

    assert max(abs(worse(nfe, "prompt_obeyed")) for nfe in (1, 4)) < 0.01
    assert max(worse(nfe) for nfe in (1, 2, 4)) < 0.003
    for nfe in (32, 64, 128):
        assert abs(worse(nfe)) < spread(at("on_policy", nfe))


@pytest.mark.parametrize("name", ["causal", "causal_on_policy"])
def test_causal_students_reach_their_bar_in_every_chunk(name):
    seeds = at(name, 4, "by_chunk")
    assert min(mean(chunk["obeyed_and_kept"] for chunk in chunks) for chunks in zip(*seeds, strict=True)) >= 0.9
    assert min(chunk["obeyed_and_kept"] for chunks in seeds for chunk in chunks) > 0.89


def test_the_forward_only_control_cost_what_on_policy_did():
    def units(name):  # a backward costs two forwards
        return REPORT["costs"][name]["forwards"] + 2 * REPORT["costs"][name]["backwards"]

    assert units("forward_only") == pytest.approx(units("on_policy"), rel=0.03)


def test_long_clips_keep_their_looks_but_their_last_chunks_drift():
    long = REPORT["long"]["causal"]
    assert min(chunk["prompt_obeyed"] for chunk in long["by_chunk"]) > 0.8
    excess = [ours / data for ours, data in zip(long["drift"], long["drift_of_data"], strict=True)]
    assert max(excess[:3]) < 1.25 < 1.4 < min(excess[3:])


def exposed(arm, point, nfe, what="free_running"):
    """Of every seed: the last radius error, or sliced W2 of clips, at a third, two thirds or all of the cost."""
    values = EXPOSURE[arm][point]["nfe"][str(nfe)][what]
    return values if what == "sliced_w2" else [seed[-1] for seed in values]


def test_by_the_radius_on_policy_pays_early_and_is_level_at_the_end():
    for nfe in (1, 4):
        for point in (0, 1):
            assert mean(exposed("on-policy", point, nfe)) < mean(exposed("teacher forcing", point, nfe))
        ends = [exposed(arm, 2, nfe) for arm in ("on-policy", "teacher forcing")]
        assert max(map(min, ends)) <= min(map(max, ends))  # the ranges over seeds meet


@pytest.mark.parametrize("point", range(3))
def test_by_whole_clips_on_policy_never_pays_nor_does_the_radius_without_gradient_through_the_context(point):
    ours, forced = (mean(exposed(arm, point, 4, "sliced_w2")) for arm in ("on-policy", "teacher forcing"))
    assert 2 * forced < ours < 4.1 * forced
    for nfe in (1, 4):
        assert mean(exposed("on-policy, detached", point, nfe)) > mean(exposed("on-policy", point, nfe))


def test_an_exact_teacher_ends_ahead():
    exact = {nfe: mean(exposed("teacher forcing, exact velocity", 2, nfe)) for nfe in (1, 4)}
    for arm in EXPOSURE:
        assert exact[1] <= mean(exposed(arm, 2, 1))
        assert exact[4] <= mean(exposed(arm, 2, 4)) + 0.002


def long_clips(arm, nfe, name, frame=160):
    """Of every seed: what clips of the circle keep at this frame."""
    return [figures[name][LONG["frames"].index(frame)] for figures in LONG["arms"][arm][str(nfe)]]


def test_on_policy_training_on_whole_clips_leaves_one_speed_and_teacher_forcing_forgets():
    assert min(long_clips("on-policy", 1, "tv", 16)) > 0.7
    assert min(long_clips("on-policy", 4, "tv")) > 0.7
    assert max(long_clips("teacher forcing", 4, "sliced_w2")) < 0.2 < min(long_clips("on-policy", 4, "sliced_w2"))
    assert max(long_clips("teacher forcing", 4, "kept")) < 0.5
    assert max(long_clips("teacher forcing", 4, "whole")) < 0.1
    floor = {name: values[LONG["frames"].index(160)] for name, values in LONG["exact"].items()}
    assert floor["tv"] < 0.1
    assert min(floor["kept"], floor["whole"]) > 0.85


def test_a_student_that_turns_with_its_past_keeps_the_law_and_no_stage_does():
    turned = "teacher forcing, turned student"
    spent = [points[-1]["cost"]["evaluations"] for points in (CIRCLE["turned"], CIRCLE["start"])]
    assert spent[0] < 1.1 * (spent[1] + EXPOSURE["on-policy"][-1]["cost"]["evaluations"])
    assert max(long_clips(turned, 1, "lost", 640)) == 0
    for arm in set(LONG["arms"]) - {turned}:
        assert min(long_clips(turned, 4, "whole")) > 3 * max(long_clips(arm, 4, "whole"))
        assert max(long_clips(turned, 4, "sliced_w2")) < max(long_clips(arm, 4, "sliced_w2"))
