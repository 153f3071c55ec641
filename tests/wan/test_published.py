"""As published: presets, draws and trained weights against the fact sheet; every loss against a few plain lines.

tests/data/published.json has a row per item: its value, AnyFlow's name, file and line, section of the paper.
"""

import json
import re
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from minianyflow.batch import deal
from minianyflow.networks.teacher_forcing import add_whole_clips, teacher_forcing_batch
from minianyflow.on_policy import rollout_condition
from minianyflow.times import draw_pairs, generator
from minianyflow.wan.config import LAYERS, OPTIONS, load_config
from minianyflow.wan.run_networks import RunNetworks
from minianyflow.wan.stages import STAGES, draws
from tests.wan.test_config import flat

SHEET = json.loads((Path(__file__).parents[1] / "data/published.json").read_text())
MODELS, ARCHITECTURES = ("wan-1.3b", "wan-14b"), LAYERS["architecture"]
PUBLISHED = ("teacher", "forward-published", "on_policy-published")
CASES = list(product(ARCHITECTURES, PUBLISHED))


def facts(part, **case):
    """The rows of the sheet that hold for a case."""
    return [row for row in SHEET[part] if all(case[name] in row.get(name, [case[name]]) for name in case)]


@pytest.mark.parametrize(("model", "architecture", "stage"), list(product(MODELS, ARCHITECTURES, PUBLISHED)))
def test_presets_are_the_sheet(model, architecture, stage):
    options = flat(asdict(load_config([model, architecture, stage])))
    for row in facts("options", model=model, architecture=architecture, stage=stage):
        value, found = row["value"], options[row["option"]]
        value = value.format(model=model, architecture=architecture) if isinstance(value, str) else value
        assert (found, type(found)) == (value, type(value)), row


def test_every_option_has_its_row_or_says_why_not():
    rows = SHEET["options"]
    assert {row["option"] for row in rows} | {*SHEET["ours"]} == {*OPTIONS}
    assert not {row["option"] for row in rows} & {*SHEET["ours"]}
    assert all(row.get("at") or row.get("why") for row in rows)


def test_every_key_of_their_files_is_an_option_or_says_why_not():
    """And the rows of options name no other key."""
    keys = SHEET["keys"]
    assert {name for value in keys.values() if isinstance(value, list) for name in value} <= {*OPTIONS}
    leaves = {leaf for key in keys for leaf in re.split(r"[., ]+", key)}
    named = [row["at"].removeprefix("yml ") for row in SHEET["options"] if row.get("at", "").startswith("yml ")]
    assert {leaf for at in named for leaf in re.split(r"[.,; ]+", at)} <= leaves | {"name"}


# ---- draws


class Clips:
    """Stands in for a data set: empty clips of Wan's 21 latent frames, prompt 1, null prompt 0."""

    shape, null = (21, 1, 1, 1), torch.zeros(1, 1, 1)

    def draw(self, step, rows, seed, part, **pairs):
        empty = torch.zeros(1, *self.shape).expand(rows, *self.shape)
        batch = {"x": empty, "eps": empty, "condition": {"prompt": torch.ones(rows, 1, 1)}}
        return batch | deal(draw_pairs(rows, generator(seed, step), **pairs), *part)


def draw_of(architecture, stage, rows, **changes):
    config = load_config(["wan-1.3b", architecture, stage])
    return draws(replace(config, batch=rows, **changes), Clips())


@cache
def laws(architecture, stage, rows=100_000):
    """What one step of `rows` rows draws, {name of a draw: numbers (n,) or a mask}; and t of the rows r = t."""
    batch = draw_of(architecture, stage, rows)(0)
    t, r = batch["t"], batch["r"]
    free = (r > 0) & (r < t)
    found = {"t of rows r = t": t[t == r], "t of rows r = 0": t[r == 0], "t of rows 0 < r < t": t[free]}
    found["r of rows 0 < r < t"] = r[free]
    found["t of distribution matching"], found["t of the fake score"] = batch.get("score_t"), batch.get("fake_t")
    found["rows without prompt: forward loss"] = batch["condition"]["prompt"].flatten() == 0
    found["rows without prompt: rollout, scores, fake score"] = rollout_condition(batch)["prompt"].flatten() == 0
    if architecture == "causal" and stage == "forward-published":
        config = load_config(["wan-1.3b", architecture, stage])
        whole = draws(replace(config, batch=rows, causal=replace(config.causal, bidirectional=1.0)), Clips())(1)
        found["t of whole clips"] = whole["whole"]["t"]
    return found


@pytest.mark.parametrize(("architecture", "stage"), CASES)
def test_draws_are_the_sheet(architecture, stage):
    """Shares of rows; mean and deviation of times; the share of late times in the weights that a stage gives them."""
    rows, found = facts("draws", architecture=architecture, stage=stage), laws(architecture, stage)
    for row in rows:
        values = found[row["draw"]]
        share = values.float().mean() if values.dtype == torch.bool else torch.tensor(len(values) / 100_000)
        assert float(share) == pytest.approx(row["share"], abs=4e-3), row
        if "mean" in row:
            assert float(values.mean()) == pytest.approx(row["mean"], abs=4e-3), row
            assert float(values.std()) == pytest.approx(row["deviation"], abs=4e-3), row
        if "weighted_late" in row:
            weight = values * (1 - values).sqrt()
            assert float(weight[values > 0.9].sum() / weight.sum()) == pytest.approx(row["weighted_late"], abs=8e-3)


@pytest.mark.parametrize(("architecture", "stage"), CASES[2:3] + CASES[4:])
def test_steps_are_the_sheet(architecture, stage):
    """Shares of steps: chunks of a clip, whole clips, rollouts. The first step always has the whole clip."""
    steps, draw = 600, draw_of(architecture, stage, 2)
    found = dict.fromkeys((row["steps"] for row in SHEET["steps"]), 0)
    ends = torch.tensor([1, 4, 7, 10, 13, 16, 19, 21])
    for step in range(1, steps + 1):
        batch = draw(step)
        names = ["whole clips added"] if "whole" in batch else []
        if architecture == "causal":
            past = batch["context"]["past"].shape[1] if "past" in batch["context"] else 0
            names.append(f"{int((ends <= past + batch['x'].shape[1]).sum())} chunks")
        if "lengths" in batch:
            (n, m), (g, h) = batch["lengths"].tolist(), batch["step"].tolist()
            names += (
                [f"rollouts of {n}"] + ["g of all rows alike"] * ((n, g) == (m, h)) + ["first half of g"] * (2 * g < n)
            )
        for name in names:
            found[name] += 1
    for row in facts("steps", architecture=architecture, stage=stage):
        assert found[row["steps"]] / steps == pytest.approx(row["share"], abs=0.04), row


# ---- what learns, and the losses


def built(tiny, architecture, stage, learn=True):
    """(configuration, networks, roles) of a stage on the tiny Wan, in float64, all adapters stirred."""
    places = [f"base={tiny}", f"data={tiny}/latents", "student=none", "teacher=null", "checkpointing=false"]
    config = replace(load_config([architecture, stage, "tiny"], places), student=None)
    networks = RunNetworks(config, 5)
    roles = STAGES[config.stage](config, networks, {"prompt": NULL})
    networks.base.double()
    for seed, role in enumerate(roles.values()):
        for weight in role.network.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator(seed), dtype=weight.dtype)
    return config, networks, roles


@pytest.mark.parametrize(("architecture", "stage"), CASES)
def test_the_weights_that_learn_are_the_sheet(tiny, architecture, stage):
    _, _, roles = built(tiny, architecture, stage)
    for row in facts("learns", architecture=architecture, stage=stage):
        named = [name for name, weight in roles[row["role"]].network.named_parameters() if weight.requires_grad]
        named = [re.sub(r"^network\.(blocks\.\d+\.)?", "", name) for name in named]
        adapters = {name.partition(".lora_")[0] for name in named if ".lora_" in name}
        whole = {name for name in named if ".lora_" not in name}
        assert adapters == {*row["lora"]}
        assert whole == {f"{layer}.{half}" for layer in row["whole"] for half in ("weight", "bias")}


G, REAL, DELTA, SHIFT = 3.0, 4.0, 5e-3, 5.0
NULL = torch.randn(1, 32, 32, generator=generator(9), dtype=torch.float64)
T = torch.tensor([0.9, 0.3, 0.9, 0.998, 0.5, 0.404, 0.7, 0.6], dtype=torch.float64)  # t + delta > 1, t - delta < r
R = torch.tensor([0.9, 0.3, 0.2, 0.1, 0.0, 0.4, 0.7, 0.2], dtype=torch.float64)
DROPPED = torch.tensor([False, True, False, False, True, False, False, False])
LENGTHS, STEP = torch.tensor([2, 2, 2, 8, 16, 50, 50, 50]), torch.tensor([0, 1, 1, 3, 15, 0, 20, 49])


def shifted(s):
    return SHIFT * s / (1 + (SHIFT - 1) * s)


def wide(times):
    return times[:, None, None, None, None]


def normal(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def batch_of():
    x, eps, noise, score_eps = normal(1, 4, 8, 5, 16, 8, 8)
    prompt = normal(2, 8, 32, 32)
    batch = {"x": x, "eps": eps, "t": T, "r": R, "dropped": DROPPED, "objective_draw": torch.full((8,), 0.5)}
    batch |= {"noise": noise, "score_eps": score_eps, "lengths": LENGTHS, "step": STEP}
    batch |= {"score_t": shifted(torch.linspace(0.1, 0.9, 8, dtype=torch.float64)), "fake_t": shifted(T)}
    return batch | {"condition": {"prompt": torch.where(DROPPED[:, None, None], NULL, prompt)}}, prompt


def flow_matching(u, x, eps, t, prompt, **condition):
    return (u(x + wide(t) * (eps - x), t, t, prompt=prompt, **condition) - (eps - x)).square().flatten(1).mean(1)


def as_it_is(times):
    return times


def flow_map(u, x, eps, prompt, inside=True, rounded=as_it_is, **context):
    """The forward loss: guidance and derivative over g in every row, t sqrt(1 - t), rows r < t to the mean of r = t.

    inside: whether differences stay in [r, 1]. rounded: what becomes of their times.
    """
    t, r, v, z = T, R, eps - x, x + wide(T) * (eps - x)
    later, earlier = ((T + DELTA).clamp(max=1), torch.maximum(T - DELTA, R)) if inside else (T + DELTA, T - DELTA)
    with torch.no_grad():
        ahead = u(z + wide(later - t) * v, rounded(later), r, prompt=prompt, **context)
        behind = u(z - wide(t - earlier) * v, rounded(earlier), r, prompt=prompt, **context)
        du = (ahead - behind) / wide(later - earlier)
        null = u(z, t, r, prompt=NULL.expand_as(prompt), **context)
    guided = (u(z, t, r, prompt=prompt, **context) - (1 - G) * null) / G
    error = (guided - (v - wide(t - r) * du / G)).square().flatten(1).mean(1)
    grid = shifted(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    loss = t * (1 - t).sqrt() / (grid * (1 - grid).sqrt()).mean() * error
    return torch.where(t == r, loss, loss / loss.detach() * loss[t == r].detach().mean())


def simulated(u, noise, prompt, **context):
    """The jumps 1 -> t_g -> t_{g+1} -> 0; those of length zero change nothing."""
    z, s = noise, [torch.ones(8), (LENGTHS - STEP) / LENGTHS, (LENGTHS - STEP - 1) / LENGTHS, torch.zeros(8)]
    for t, r in pairwise(shifted(times.float()).double() for times in s):
        z = z - wide(t - r) * u(z, t, r, prompt=prompt, **context)
    return z


def rolled_out(architecture, u, noise, prompt):
    """Whole clips; of a causal student chunk by chunk, 1, 2 and 2 frames, after earlier ones without gradient."""
    if architecture == "bidirectional":
        return simulated(u, noise, prompt)
    x = simulated(u, noise[:, :1], prompt, cache=())
    for chunk in (noise[:, 1:3], noise[:, 3:]):
        with torch.no_grad():
            cache = u(x, None, None, prompt=prompt, fill_cache=True)
        x = torch.cat([x, simulated(u, chunk, prompt, cache=cache)], 1)
    return x


def matched(x, real, fake, batch, prompt):
    t, eps = batch["score_t"], batch["score_eps"]
    with torch.no_grad():
        z = (1 - wide(t)) * x + wide(t) * eps
        null = real(z, t, t, prompt=NULL.expand_as(prompt))
        x_real = z - wide(t) * (null + REAL * (real(z, t, t, prompt=prompt) - null))
        x_fake = z - wide(t) * fake(z, t, t, prompt=prompt)
        gradient = (x_fake - x_real) / wide((x - x_real).abs().flatten(1).mean(1))
    return (x - (x - gradient).detach()).square().flatten(1).mean(1)


def gradient(loss, role):
    """Of a mean loss, one vector; NaN for weights that it does not reach."""
    weights = [weight for weight in role.network.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss.mean(), weights, allow_unused=True)
    pairs = zip(weights, found, strict=True)
    return torch.cat([(weight * torch.nan if each is None else each).detach().flatten() for weight, each in pairs])


def gradient_error(loss, role, expected):
    """Relative, of the gradient; infinite if the losses reach other weights."""
    ours, by_hand = gradient(loss, role), gradient(expected, role)
    alike = torch.equal(ours.isnan(), by_hand.isnan())
    return float((ours - by_hand).nan_to_num().norm() / by_hand.nan_to_num().norm()) if alike else torch.inf


def agree(loss, role, expected):
    """Losses and gradients of a role to 1e-6."""
    assert torch.allclose(loss, expected, rtol=1e-6, atol=0)
    assert gradient_error(loss, role, expected) <= 1e-6


CUTS = {
    "bidirectional": [None],
    "causal": [((1, 2, 2), False), ((1, 2), False), ((1, 2, 2), True)],
}  # chunks, whole clips
FORWARD = [(architecture, cut) for architecture in ARCHITECTURES for cut in CUTS[architecture]]


def cut_up(batch, cut, t=None):
    """A batch cut to the frames that learn, and their condition: compressed chunks and clean copies."""
    if cut is None:
        return batch, {}
    (partition, whole), old = cut, sum(cut[0][:-2])
    end = sum(partition)
    part = teacher_forcing_batch(batch, partition, 2)
    context = {"clean": batch["x"][:, old:end]} | ({"past": batch["x"][:, :old]} if old else {})
    return (add_whole_clips(part, batch, t) if whole else part), context


@pytest.mark.parametrize(("architecture", "cut"), FORWARD)
@pytest.mark.parametrize("stage", PUBLISHED[:2])
def test_the_forward_losses_are_those_by_hand(tiny, architecture, cut, stage):
    """Null rows, both edges of the interval, compressed chunks, and the whole clips that are added."""
    _, _, roles = built(tiny, architecture, stage)
    role, (batch, _) = roles["student"], batch_of()
    u, clip, t = role.network, batch, shifted(T.flip(0))
    batch, context = cut_up(batch, cut, t)
    x, eps, prompt = batch["x"], batch["eps"], batch["condition"]["prompt"]
    if stage == "teacher":
        batch = batch | {"r": T}
        expected = flow_matching(u, x, eps, T, prompt, **context)
    else:
        expected = flow_map(u, x, eps, prompt, **context)
    if cut and cut[1]:
        single, z = {"single_chunk": torch.zeros(8)}, clip["x"] + wide(t) * (clip["eps"] - clip["x"])
        added = flow_matching(u, clip["x"], clip["eps"], t, prompt, **single)
        if stage != "teacher":
            with torch.no_grad():
                null = u(z, t, t, prompt=NULL.expand_as(prompt), **single)
            guided = (u(z, t, t, prompt=prompt, **single) - (1 - G) * null) / G
            added = (guided - (clip["eps"] - clip["x"])).square().flatten(1).mean(1)
        expected = expected + added
    agree(role.loss(u, batch)[0], role, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_on_policy_losses_are_those_by_hand(tiny, architecture):
    """The student's and the fake score's, at both ends of N and g; null prompts in the forward loss alone."""
    _, networks, roles = built(tiny, architecture, "on_policy-published")
    student, fake, (batch, prompt) = roles["student"], roles["fake"], batch_of()
    batch = batch | {"rollout_condition": {"prompt": prompt}}
    x = rolled_out(architecture, student.network, batch["noise"], prompt)
    agree(
        fake.loss(fake.network, batch)[0],
        fake,
        flow_matching(fake.network, x.detach(), batch["score_eps"], batch["fake_t"], prompt),
    )
    expected = matched(x, networks.teacher(whole=True), fake.network, batch, prompt)
    part, context = cut_up(batch, CUTS[architecture][0])
    forward = flow_map(student.network, part["x"], part["eps"], batch["condition"]["prompt"], **context)
    agree(student.loss(student.network, part)[0], student, expected + forward)


FAULTS = {  # of AnyFlow's difference quotient: (options of flow_map, least error of the gradient)
    "past the edges": ({"inside": False}, 0.12),
    "times in bfloat16": ({"rounded": lambda t: (1000 * t).bfloat16().double() / 1000}, 0.1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_not_copied_moves_the_gradient(tiny, fault):
    """Sizes: docs/wan.md. Of these eight rows two lie at an edge."""
    _, _, roles = built(tiny, "bidirectional", "forward-published")
    role, (batch, _), (options, least) = roles["student"], batch_of(), FAULTS[fault]
    given = role.network, batch["x"], batch["eps"], batch["condition"]["prompt"]
    assert gradient_error(flow_map(*given, **options), role, flow_map(*given)) > least
