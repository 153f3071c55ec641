"""Stock transformers of diffusers as flow maps: the stock velocity at the start, any-step after the forward stage."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.backbone_toys import TOYS, race
from benchmarks.backbones import CALLS, Backbone, FlowMapBackbone, call_sd3, find_embedder
from minianyflow.networks.wan import TINY
from minianyflow.objectives import eulerian_target
from minianyflow.support.errors import InputError
from minianyflow.training import Role

T, R = torch.tensor([0.95, 0.4]), torch.tensor([0.3, 0.0])


def flux(**changes):
    size = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2}
    widths = {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (8, 12, 12)}
    return FluxTransformer2DModel(in_channels=16, out_channels=16, **size, **widths, **changes)


SHAPES = {"sd3": (1, 4, 4), "flux": (4, 4, 6), "ltx": (4, 4, 1, 1), "wan": (3, 4, 4, 6)}


def stock(family):
    """A tiny transformer of the family with random weights, all of which count, and what conditions it."""
    torch.manual_seed(0)
    makers = {name: lambda make=make: make()[0] for name, make in TOYS.items()}
    makers |= {"flux": flux, "wan": lambda: WanTransformer3DModel(**TINY)}
    transformer = makers[family]()
    for weight in transformer.parameters():
        if not bool(weight.any()):
            nn.init.normal_(weight, std=0.1)
    prompt = torch.randn(2, 3, TINY["text_dim"] if family == "wan" else 8)
    return transformer, {"prompt": prompt} | ({"pooled": torch.randn(2, 8)} if family in ("sd3", "flux") else {})


@pytest.fixture(params=SHAPES)
def made(request):
    """(call, stock transformer, flow map from a copy of it, z, condition)."""
    transformer, condition = stock(request.param)
    call = CALLS[request.param]
    network = FlowMapBackbone(copy.deepcopy(transformer), call)
    z = torch.randn(2, *SHAPES[request.param], generator=torch.Generator().manual_seed(1))
    return call, transformer, network, z, condition


def test_at_the_start_it_is_the_stock_velocity_exactly_for_all_r(made):
    call, transformer, network, z, condition = made
    with torch.no_grad():
        expected = call(transformer, z, 1000 * T, **condition)
        for r in (T, R, torch.zeros(2)):
            assert torch.equal(network(z, T, r, **condition), expected)
            assert torch.equal(Backbone(transformer, call)(z, T, r, **condition), expected)
        assert float(expected.abs().max()) > 0.1
        assert not torch.allclose(network(z, R, R, **condition), expected, atol=1e-3)  # t does count


def test_the_length_of_the_jump_counts_once_it_is_learnt_and_nothing_else_does(made):
    _, _, network, z, condition = made
    torch.manual_seed(0)
    with torch.no_grad():
        network.jump.linear_2.weight.normal_()
        one, other = network(z, T, R, **condition), network(z, T, T, **condition)
        assert float((one - other).abs().max()) > 1e-3
        far = network(z, torch.tensor([0.95, 0.9]), torch.tensor([0.3, 0.9]), **condition)
        assert torch.allclose(far[0], one[0], atol=1e-5)  # rows keep to their own times
        other_prompt = {name: value.flip(0) for name, value in condition.items()}
        assert not torch.allclose(network(z, T, R, **other_prompt), one, atol=1e-5)


def test_stock_weights_keep_their_names_and_gradient_reaches_all(made):
    _, transformer, network, z, condition = made
    assert network.transformer.state_dict().keys() == transformer.state_dict().keys()
    new = {name for name, _ in network.named_parameters() if not name.startswith("transformer.")}
    assert new == {f"jump.linear_{layer}.{what}" for layer in (1, 2) for what in ("weight", "bias")}
    network(z, T, R, **condition).square().mean().backward()
    assert bool(network.jump.linear_2.weight.grad.any())


def test_a_copy_jumps_by_itself(made):
    """An average of the weights is a deep copy: its hook must be its own."""
    _, _, network, z, condition = made
    average = Role(network).average.module
    with torch.no_grad():
        before = network(z, T, R, **condition)
        average.jump.linear_2.weight.normal_()
        assert torch.equal(network(z, T, R, **condition), before)
        assert not torch.allclose(average(z, T, R, **condition), before, atol=1e-3)
        network.jump.linear_2.weight.copy_(average.jump.linear_2.weight)
        assert torch.allclose(network(z, T, R, **condition), average(z, T, R, **condition), atol=1e-5)


def test_both_derivatives_see_the_jump(made):
    _, _, network, z, condition = made
    nn.init.normal_(network.jump.linear_2.weight, std=0.5)
    network.timesteps = 5.0  # slow time, so that a difference is close

    def u(z, t, r):
        return network(z, t, r, **condition)

    v = torch.randn_like(z)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        exact = eulerian_target(u, z, T, R, v, delta=0)
        difference = eulerian_target(u, z, T, R, v, 1e-2)
        network.jump.linear_2.weight.data.zero_()
        without = eulerian_target(u, z, T, R, v, delta=0)
    assert float((difference - exact).norm()) < 0.1 * float((without - exact).norm())


@pytest.mark.long
@pytest.mark.parametrize("family", ["ltx", "sd3"])
def test_the_forward_stage_makes_it_any_step(family):
    """One to four jumps are closer to the truth than the teacher is after four times as many Euler steps."""
    reached, _ = race(family, 0, on_policy=False)
    for nfe in (1, 2, 4):
        assert reached["flow map"][nfe] < reached["teacher"][4 * nfe], (nfe, reached)


@pytest.mark.long
def test_on_policy_training_keeps_what_the_forward_stage_alone_reaches_at_equal_cost():
    reached, costs = race("ltx", 0)
    assert abs(costs["on-policy"] / costs["forward alone"] - 1) < 0.01
    for nfe in (1, 4):
        assert reached["on-policy"][nfe] < 1.1 * reached["forward alone"][nfe], reached


def test_what_it_cannot_take_is_one_line():
    transformer, condition = stock("sd3")
    two = flux(guidance_embeds=True)
    names = "time_text_embed.timestep_embedder, time_text_embed.guidance_embedder"
    with pytest.raises(
        InputError, match=f"FluxTransformer2DModel has 2 embedders of time, {names}; expected one: name"
    ):
        FlowMapBackbone(two, CALLS["flux"])
    with pytest.raises(InputError, match=r"unknown embedder 'timestep_embedder'.*did you mean 'time_text_embed"):
        FlowMapBackbone(two, CALLS["flux"], embedder="timestep_embedder")
    assert find_embedder(two, "time_text_embed.timestep_embedder")[0] is two.time_text_embed.timestep_embedder
    with pytest.raises(InputError, match="Linear has no TimestepEmbedding; expected one"):
        FlowMapBackbone(nn.Linear(1, 1), call_sd3)
    network, z = FlowMapBackbone(transformer, call_sd3), torch.zeros(2, 1, 4, 4)
    with pytest.raises(InputError, match="a flow map already; expected a stock one"):
        FlowMapBackbone(transformer, call_sd3)
    with pytest.raises(InputError, match="called by itself; call the FlowMapBackbone around it"):
        transformer(z, condition["prompt"], condition["pooled"], 1000 * T)
    for t, r in ((T[:1], R), (T, R[:1]), (T[:, None], R[:, None])):
        with pytest.raises(InputError, match=r"for z \(2, 1, 4, 4\); expected \(B,\) for both"):
            network(z, t, r, **condition)
    wrong = FlowMapBackbone(
        stock("sd3")[0], lambda *arguments, **condition: call_sd3(*arguments, **condition)[:, :, 1:]
    )
    with pytest.raises(InputError, match=r"what `call` returns has shape \(2, 1, 3, 4\); expected that of the state"):
        wrong(z, T, R, **condition)
    assert isinstance(transformer, SD3Transformer2DModel)
    assert network.length is None  # also after an error
