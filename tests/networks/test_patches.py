"""Private parts of diffusers and peft: they are there under these names, and patched transformers compute the same."""

import inspect
from functools import partial

import pytest
import torch
from diffusers.models.transformers import transformer_anyflow as bidirectional
from diffusers.models.transformers import transformer_anyflow_far as causal
from peft.tuners.lora import LoraLayer

from minianyflow.networks.causal import causal_rollout
from minianyflow.networks.lora_roles import Adapter
from minianyflow.networks.patches import InputDtypeLinear, active_adapter, set_active_adapter, use_per_frame_modulation
from minianyflow.objectives import eulerian_target
from tests.networks.inputs import R, T, Watch, adapted, distance, draw, network, output_and_gradient

BOTH = ["bidirectional", "causal"]
Z, PROMPT = draw(2, 9, 16, 8, 8, seed=3), draw(2, 6, 32, seed=4)


def lora_layers(transformer):
    return [layer for layer in transformer.modules() if isinstance(layer, LoraLayer)]


def test_the_library_still_has_the_parts_that_are_patched():
    for module, suffix, layout in ((bidirectional, "", "layout_cfg"), (causal, "Causal", "far_cfg")):
        block = inspect.signature(module.AnyFlowTransformerBlock.forward).parameters
        names = ["hidden_states", "encoder_hidden_states", "temb", "rotary_emb", "attention_mask"]
        assert list(block) == ["self", *names, "kv_cache", "kv_cache_flag"]
        embedder = getattr(module, f"AnyFlowDualTimestepTextImageEmbedding{suffix}")
        times = ["timestep", "delta_timestep", "encoder_hidden_states", "token_per_frame"]
        assert list(inspect.signature(embedder.forward_timestep).parameters) == ["self", *times]
        rope = getattr(module, f"AnyFlow{suffix}RotaryPosEmbed")
        assert list(inspect.signature(rope.forward).parameters)[:3] == ["self", layout, "device"]
    layer = lora_layers(adapted("bidirectional"))[0]
    assert vars(layer).keys() >= {"_active_adapter", "_disable_adapters", "cast_input_dtype_enabled"}


def test_the_active_adapter_is_what_peft_says_it_is():
    """Through peft's own properties, and as peft's own switch leaves it."""
    for layer in lora_layers(adapted("bidirectional")):
        assert layer.disable_adapters
        set_active_adapter(layer, ["fake"], False)
        assert (layer.active_adapters, layer.disable_adapters) == (["fake"], False)
        layer.set_adapter("student")
        layer.enable_adapters(True)
        assert active_adapter(layer) == ("student", False) or active_adapter(layer) == (["student"], False)


def test_a_layer_computes_in_the_dtype_of_its_input():
    layer, x = InputDtypeLinear(4, 3, bias=False), draw(2, 4)
    assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-6)
    assert (layer(x.bfloat16()).dtype, layer.weight.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_blocks_are_those_of_stock(architecture, dtype):
    ours = output_and_gradient(network(use_per_frame_modulation(adapted(architecture, dtype))))
    theirs = output_and_gradient(network(adapted(architecture, dtype)))
    if dtype == torch.float32:
        assert distance(ours, theirs) < 1e-5
    assert distance(ours[:1], theirs[:1]) < (1e-5 if dtype == torch.float32 else 1e-3)


@torch.no_grad()
def test_times_of_each_frame_and_rollouts_through_the_cache_are_those_of_stock():
    t, times = torch.rand(2, 9, generator=torch.Generator().manual_seed(5)), torch.tensor([1.0, 0.4, 0.0])
    for run, kind in (
        (lambda u: u(Z, t, 0.5 * t, prompt=PROMPT), "bidirectional"),
        (lambda u: causal_rollout(u, Z, times, PROMPT, 1, 2), "causal"),
    ):
        ours, theirs = (
            run(network(transformer)) for transformer in (use_per_frame_modulation(adapted(kind)), adapted(kind))
        )
        assert distance([ours], [theirs]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BOTH)
def test_adapters_in_the_dtype_of_the_base_are_as_near_float32_as_the_base_is(architecture):
    """bfloat16 rounds in every block anyway: output, gradient and the derivative in time lose little more."""
    low, high = adapted(architecture, torch.bfloat16), adapted(architecture, torch.bfloat16)
    assert all(weight.dtype == torch.float32 for weight in Adapter(low, "student").parameters())
    assert any(isinstance(layer, InputDtypeLinear) for layer in low.modules())
    for layer in lora_layers(high):  # as peft has it: all inputs in float32
        layer.cast_input_dtype_enabled = True
    v = draw(2, 9, 16, 8, 8, seed=6)

    def results(transformer):
        u, gradient = output_and_gradient(network(transformer))
        if architecture == "causal":
            return u, gradient
        jump = partial(network(transformer), prompt=PROMPT)
        return u, gradient, eulerian_target(jump, Z, T, 0.2 * T, v, delta=5e-3) - v

    exact = results(adapted(architecture, start=low))
    for lower, higher, truth in zip(results(low), results(high), exact, strict=True):
        assert distance([lower], [truth]) < 2 * distance([higher], [truth])
    assert distance(results(low)[:2], exact[:2]) < 0.03


@pytest.mark.slow
def test_patched_blocks_write_less_and_keep_less():
    written, kept = [], []
    for patch in (lambda transformer: transformer, use_per_frame_modulation):
        transformer = adapted("bidirectional", torch.bfloat16)
        own, saved = {weight.untyped_storage().data_ptr() for weight in transformer.parameters()}, {}
        u = network(patch(transformer))

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
            return tensor

        with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            u(draw(2, 5, 16, 16, 16), T, R, prompt=PROMPT)
        written.append(watch.written)
        kept.append(sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own))
    assert written[1] < 0.8 * written[0]
    assert kept[1] < 0.8 * kept[0]
