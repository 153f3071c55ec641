"""What docs/video.md says of the committed run, asserted of the report it was written from."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
REPORT = json.loads((DOCS / "video/any_step.json").read_text())
TEXT = (DOCS / "video.md").read_text()
FLOOR = REPORT["floors"]["codec"]
DATA = "data against data"


def at(name, nfe, measure="sliced_w2"):
    """One figure of every seed."""
    method = REPORT["methods"][name]
    return [by_nfe[method["nfe"].index(nfe)] for by_nfe in method[measure]]


def mean(values):
    return sum(values) / len(values)


def spread(values):
    return max(values) - min(values)


def test_two_steps_are_as_good_as_sixteen_of_the_teacher_and_four_as_thirty_two():
    guided = REPORT["guided_teacher"]
    for nfe, of_teacher in ((2, 16), (4, 32)):
        assert max(at("eulerian", nfe)) <= mean(at("teacher", of_teacher))
        assert max(at("eulerian", nfe)) <= guided[str(of_teacher)]["sliced_w2"]


def test_the_excess_at_one_step_is_a_tenth_of_the_teachers():
    student, teacher = (mean(at(name, 1)) - FLOOR["sliced_w2"] for name in ("eulerian", "teacher"))
    assert student <= 0.05 * teacher
    assert student <= 0.1 * (REPORT["guided_teacher"]["1"]["sliced_w2"] - FLOOR["sliced_w2"])


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
    for nfe in (1, 4):
        looks = [mean(at(name, nfe, "prompt_obeyed")) for name in ("on_policy", "forward_only")]
        assert looks[0] == pytest.approx(looks[1], abs=0.01)
    worse = [mean(at("on_policy", nfe)) - mean(at("forward_only", nfe)) for nfe in (1, 2, 4)]
    assert worse == pytest.approx([0.0004, 0.0021, 0.0009], abs=6e-5)
    for nfe in (32, 64, 128):
        assert abs(mean(at("on_policy", nfe)) - mean(at("forward_only", nfe))) < spread(at("on_policy", nfe))


def test_causal_students_reach_their_bar_as_the_text_says():
    for name, said in (("causal", (97, 90, 94)), ("causal_on_policy", (97, 91, 95))):
        seeds = at(name, 4, "by_chunk")
        both = [100 * mean([chunks[k]["obeyed_and_kept"] for chunks in seeds]) for k in range(3)]
        assert min(both) >= 90
        assert both == pytest.approx(said, abs=0.51)
        assert " / ".join(map(str, said)) + "%" in TEXT
    assert min(chunk["obeyed_and_kept"] for chunks in at("causal", 4, "by_chunk") for chunk in chunks) > 0.897


def test_the_forward_only_control_cost_what_on_policy_did():
    def units(name):  # a backward costs two forwards
        return REPORT["costs"][name]["forwards"] + 2 * REPORT["costs"][name]["backwards"]

    assert units("forward_only") == pytest.approx(units("on_policy"), rel=0.03)


def rows_of(tag):
    """The rows of the table after a comment in the text: {first cell: the other cells}."""
    table = TEXT.split(f"<!-- {tag} -->\n")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]
    return {first.split(",")[0]: rest for first, *rest in cells}


def test_the_tables_say_what_the_report_says():
    tables = rows_of("any_step")
    assert tables.pop(DATA) == [f"{1000 * FLOOR['sliced_w2']:.1f}"]
    assert set(tables) == {name.replace("_", "-") for name in REPORT["methods"] if "causal" not in name}
    for shown, cells in tables.items():
        name = shown.replace("-", "_")
        steps, seeds = REPORT["methods"][name]["nfe"], len(REPORT["methods"][name]["seeds"])
        assert f"over seeds) | {' | '.join(map(str, steps))} |" in TEXT
        label = f"{shown}, {seeds} seeds" if seeds > 1 else shown
        assert f"| {label} | {cells[0]} |" in TEXT
        for nfe, cell in zip(steps, cells, strict=True):
            said = re.fullmatch(r"([\d.]+)(?: \(([\d.]+)\))?", cell).groups()
            assert float(said[0]) == pytest.approx(1000 * mean(at(name, nfe)), abs=0.051), (name, nfe)
            assert (said[1] is None) == (seeds == 1), (name, nfe)
            assert float(said[1] or 0) == pytest.approx(1000 * spread(at(name, nfe)), abs=0.051), (name, nfe)
    costs = rows_of("costs")
    assert set(costs) == {name.replace("_", "-") for name in REPORT["costs"]}
    for shown, (steps, *thousands, seconds, gain) in costs.items():
        name = shown.replace("-", "_")
        cost = REPORT["costs"][name]
        counted = [float(cell.removesuffix(" k")) for cell in thousands]
        assert counted == pytest.approx([cost["forwards"] / 1000, cost["backwards"] / 1000], abs=0.51), name
        assert [float(steps), float(seconds)] == pytest.approx([cost["steps"], cost["seconds"]], abs=0.51), name
        reached = [1000 * mean(at(name, nfe)) for nfe in (1, 4)] if name != "codec" else []
        assert [float(cell) for cell in gain.split("/") if cell != "-"] == pytest.approx(reached, abs=0.051), name
    looks = rows_of("causal")
    assert set(looks) == {name.replace("_", "-") for name in REPORT["methods"] if "causal" in name}
    for shown, (*cells, law) in looks.items():
        name = shown.replace("-", "_")
        for cell, measure in zip(cells, ("prompt_obeyed", "light_kept", "obeyed_and_kept"), strict=True):
            said = [float(share.strip(" %")) for share in cell.split("/")]
            measured = [100 * mean([chunks[k][measure] for chunks in at(name, 4, "by_chunk")]) for k in range(3)]
            assert said == pytest.approx(measured, abs=0.51), name
        assert float(law) == pytest.approx(1000 * mean(at(name, 4)), abs=0.051), name
    padding = rows_of("padding")
    assert set(padding) == {"ours", "stock"}
    for name, cells in padding.items():
        said = REPORT["padding"]["causal"][name]
        shares = [100 * said[measure] for measure in ("prompt_obeyed", "light_kept")]
        assert float(cells[0]) == pytest.approx(1000 * said["sliced_w2"], abs=0.051)
        assert [float(cell.strip("%")) for cell in cells[1:]] == pytest.approx(shares, abs=0.51)


def test_what_is_said_of_long_clips_is_measured():
    text, long = " ".join(TEXT.split()), REPORT["long"]["causal"]
    shares = re.search(r"the balls are right in ([\d /]+)% of clips, chunk by chunk", text)[1].split(" / ")
    obeyed = [100 * chunk["prompt_obeyed"] for chunk in long["by_chunk"]]
    assert [float(share) for share in shares] == pytest.approx(obeyed, abs=0.51)
    laws = re.search(r"the sliced W2 of a chunk is ([\d., ]+), and of data ([\d., ]+)\. So", text).groups()
    for said, measure in zip(laws, ("drift", "drift_of_data"), strict=True):
        assert [float(law) for law in said.split(", ")] == pytest.approx(long[measure], abs=0.00051), measure


def test_the_page_for_instructors_says_what_the_report_says():
    page = (DOCS.parent / "notebooks/INSTRUCTOR.md").read_text()
    rows = {line[2:].split(" ")[0]: line for line in page.splitlines() if "(video) |" in line}
    steps = {"one": 1, "four": 4, "sixteen": 16, "128": 128}
    said = re.findall(r"(\d+)(?: \(x 1000\))? at (one|four|sixteen|128)\b", rows["consistency"])
    assert {steps[word] for _, word in said} == set(steps.values())
    for figure, word in said:
        assert round(1000 * mean(at("consistency", steps[word]))) == int(figure)
    ends = re.search(r"the flow map goes from (\d+) down to (\d+)", rows["consistency"]).groups()
    assert [round(1000 * mean(at("eulerian", nfe))) for nfe in (1, 128)] == [int(each) for each in ends]
    shares = re.search(
        r"up to sixteen \((\S+) to (\S+) of clips; the flow map (\S+) to (\S+)\)", rows["consistency"]
    ).groups()
    obeyed = [mean(at(name, nfe, "prompt_obeyed")) for name in ("consistency", "eulerian") for nfe in (1, 16)]
    assert [float(each) for each in shares] == pytest.approx(obeyed, abs=0.0051)
    two = re.search(r"\((\d+) against (\d+) at two\)", rows["on-policy"]).groups()
    assert [round(1000 * mean(at(name, 2))) for name in ("on_policy", "forward_only")] == [int(each) for each in two]


EXPOSED = json.loads((DOCS / "video/exposure.json").read_text())
EXPOSURE, START = EXPOSED["arms"], EXPOSED["start"][-1]


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


def test_by_whole_clips_on_policy_never_pays():
    for point in range(3):
        ours, forced = (mean(exposed(arm, point, 4, "sliced_w2")) for arm in ("on-policy", "teacher forcing"))
        assert 2 * forced < ours < 4.1 * forced


def test_without_gradient_through_the_context_the_radius_is_worse():
    for point in range(3):
        for nfe in (1, 4):
            assert mean(exposed("on-policy, detached", point, nfe)) > mean(exposed("on-policy", point, nfe))


def test_an_exact_teacher_ends_ahead():
    exact = {nfe: mean(exposed("teacher forcing, exact velocity", 2, nfe)) for nfe in (1, 4)}
    for arm in EXPOSURE:
        assert exact[1] <= mean(exposed(arm, 2, 1))
        assert exact[4] <= mean(exposed(arm, 2, 4)) + 0.002


def test_the_table_of_exposure_bias_says_what_its_report_says():
    named = {
        "teacher forcing": "teacher forcing",
        "teacher forcing, exact velocity": "teacher forcing, exact velocity",
        "on-policy, gradient through the context": "on-policy",
        "on-policy, context detached": "on-policy, detached",
        "on-policy, gradient, forward loss x 4": "on-policy, forward x 4",
    }
    assert set(named.values()) == set(EXPOSURE)
    columns = [(1, "free_running"), (4, "free_running"), (4, "sliced_w2")]

    def row(label):
        return re.search(rf"^\| {re.escape(label)} \| (.*) \|$", TEXT, re.M)[1].split(" | ")

    for label, arm in named.items():
        *cells, seconds = row(label)
        for cell, (nfe, what) in zip(cells, columns, strict=True):
            measured = [mean(exposed(arm, point, nfe, what)) for point in range(3)]
            assert [float(figure) for figure in cell.split(", ")] == pytest.approx(measured, abs=0.00101), label
        assert float(seconds) == pytest.approx(EXPOSURE[arm][-1]["cost"]["cpu_seconds"], abs=0.51), label
    *cells, seconds = row("start")
    measured = [mean([seed[-1] for seed in START["nfe"][nfe]["free_running"]]) for nfe in ("1", "4")]
    measured += [mean(START["nfe"]["4"]["sliced_w2"])]
    assert [float(cell) for cell in cells] == pytest.approx(measured, abs=0.00101)
    assert float(seconds) == pytest.approx(START["cost"]["cpu_seconds"], abs=0.51)
