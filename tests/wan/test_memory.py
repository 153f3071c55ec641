"""Options that save memory change nothing that is computed: gradients, evaluations; what a run chooses by itself."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from minianyflow.batch import part_of
from minianyflow.networks.int8 import quantise
from minianyflow.planner.report import on_one_gpu
from minianyflow.support.install import ROOT
from minianyflow.training import accumulate_gradient
from minianyflow.wan.config import load_config
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.guard import Preempted
from minianyflow.wan.memory import choose_memory
from minianyflow.wan.run_networks import RunNetworks
from minianyflow.wan.shapes import SHAPES, latent_shape
from minianyflow.wan.stages import STAGES, distil, draws
from tests.refused import refused


@pytest.fixture(scope="module")
def settings(tiny):
    """`settings(architecture, *changes)`: the configuration of a tiny on-policy run."""
    where = [f"base={tiny}", f"data={tiny}/latents", "log.tracker=none", "samples.every=0"]

    def configuration(architecture, *changes):
        config = load_config([architecture, "on_policy", "tiny"], [*where, *changes])
        return replace(config, student=None, teacher=None)  # as if they were there

    return configuration


def gradient_and_counts(config, whole=False):
    """The gradients of both roles, and what was evaluated; whole: one backward of the sum of a loss's terms."""
    data = LatentSet(config.data)
    networks, null = RunNetworks(config, data.shape[0]), {"prompt": data.null}
    roles = STAGES[config.stage](config, networks, null)
    torch.manual_seed(1)
    for weight in [weight for role in roles.values() for weight in role.network.parameters() if weight.requires_grad]:
        weight.data += 0.05 * torch.randn_like(weight)  # adapters that do something
    batch, gradients = draws(config, data)(3), []
    for role in roles.values():
        if whole:
            role.loss(role.network, part_of(batch, 0, 1))[0].mean().backward()
        else:
            accumulate_gradient(role, batch)
        gradients += [w.grad.flatten() for w in role.network.parameters() if w.grad is not None]
    return torch.cat(gradients), networks.counts()


PLANS = json.loads((ROOT / "docs/plan/plans.json").read_text())
ON_H100 = on_one_gpu(PLANS, "14B causal on_policy", "h100").run  # how the plan fits 14B on one GPU of 80 GB
OFFLOADED = [
    ("bidirectional", "auto", "states"),
    pytest.param("bidirectional", "auto", "blocks base", marks=pytest.mark.long),
    pytest.param("bidirectional", "auto", "blocks halves", marks=pytest.mark.slow),
    pytest.param("causal", "auto", "states blocks base", marks=pytest.mark.slow),
    pytest.param("causal", ON_H100["memory"], " ".join(ON_H100["offload"]), marks=pytest.mark.slow),
]
FAST, SLOW = ("bidirectional", "lora", "bf16"), ("causal", "lora", "fp32")
CASES = [
    pytest.param(*case, marks=() if case == FAST else pytest.mark.slow if case == SLOW else pytest.mark.long)
    for case in product(("bidirectional", "causal"), ("lora", "full"), ("fp32", "bf16"))
]


@pytest.mark.parametrize(("architecture", "trained", "precision"), CASES)
def test_memory_schedules_have_the_gradient_of_one_backward(settings, architecture, trained, precision):
    """And a repeated evaluation counts once. Read: at most 8e-8; small has bitwise the gradient of fast."""
    config = settings(architecture, f"trained={trained}", f"precision={precision}")
    config.on_policy.context_gradient = precision == "fp32"
    plain, counts = gradient_and_counts(config, whole=True)
    gradients = []
    for schedule in ("fast", "small"):
        gradient, counted = gradient_and_counts(replace(config, memory=schedule))
        assert float((gradient - plain).norm() / plain.norm()) < 1e-6
        assert counted == counts
        gradients.append(gradient)
    assert torch.equal(*gradients)


def student_of(config, folder, minutes=None):
    """The average and the last weights (2, numbers) of a run; minutes: it is stopped after a step, and goes on."""
    name = f"{config.memory}-{len(config.offload)}-{minutes}"
    config = replace(config, output=f"{folder}/{name}", steps=3, warmup=1, ema_after=1)
    if minutes is not None:
        with pytest.raises(Preempted):
            distil(config, minutes)
    distil(config)
    files = [load_file(f"{config.output}/student{last}.safetensors") for last in ("", "-last")]
    return torch.stack([torch.cat([weights[name].flatten() for name in sorted(weights)]) for weights in files])


@pytest.mark.parametrize(("architecture", "memory", "moved"), OFFLOADED)
def test_what_rests_in_cpu_memory_trains_the_same_weights(settings, tmp_path, architecture, memory, moved):
    """To the bit, in a run that is stopped and goes on."""
    config = settings(architecture)
    plain = student_of(config, tmp_path)
    assert not torch.equal(*plain)
    moved = replace(config, memory=memory, offload=moved.split())
    assert torch.equal(student_of(moved, tmp_path, minutes=0), plain)


@pytest.mark.parametrize(("architecture", "free", "chosen"), [("bidirectional", 80, "small"), ("causal", 200, "fast")])
def test_auto_keeps_rollouts_where_they_fit(monkeypatch, architecture, free, chosen):
    """14B, one clip at a time; free: GB of GPU memory beside the base."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e9 * free, 1e9 * free))
    config = load_config(["wan-14b", architecture, "on_policy"], ["accumulate=16"])
    memory, why = choose_memory(config, SHAPES["14b"], latent_shape(), torch.device("cuda"))
    assert memory == chosen
    assert f"{free}.0 are free" in why


@pytest.mark.slow
def test_an_int8_base_changes_gradients_a_little_and_moves_like_any_other(settings):
    """Read: .2% to .3%, seeds 0 to 2; computing in bfloat16 changes them by .5%."""
    plain, exact, moved = (
        gradient_and_counts(settings("bidirectional", *options))[0]
        for options in ((), ("base_dtype=int8",), ("base_dtype=int8", "offload=[base]"))
    )
    assert torch.equal(exact, moved)
    assert 1e-4 < float((exact - plain).norm() / plain.norm()) < 0.1


def test_int8_rounds_each_weight_by_half_a_step_at_most():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(16, 8), torch.randn(4, 16)
    weight, out = layer.weight.detach().clone(), layer(x)
    blocks = torch.nn.ModuleList([layer])
    error = quantise(blocks)
    rounded = layer.weight * layer.scale
    assert layer.weight.dtype == torch.int8
    assert bool(((rounded - weight).abs() <= 0.5001 * layer.scale).all())
    assert float(error) == pytest.approx(float((rounded - weight).norm() / weight.norm()))
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, rounded, layer.bias))
    assert not torch.equal(layer(x), out)


def test_one_process_has_none_to_share_its_base_with(settings):
    with refused("shard_base=true in one process; start several, or set offload="):
        distil(settings("bidirectional", "shard_base=true", "on_policy.shared_rollout=true"))


def test_a_host_without_room_is_said_before_training(settings, monkeypatch):
    config = settings("bidirectional", "offload=[states,blocks,base]", "steps=2", "warmup=1", "ema_after=1")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e5))
    with refused("offload=\\[states,blocks,base\\] needs .* GB of CPU memory, and 0.0001 are free; leave out"):
        distil(config)
