"""Blocks that copy less: what comes out is that of stock, what is kept is not computed again, compiled or not."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from minianyflow.networks.blocks import checkpoint_blocks, compile_blocks
from minianyflow.networks.causal import CausalNetwork, causal_rollout
from minianyflow.networks.lora_roles import EMBEDDERS, TARGETS, Adapter, RoleNetwork, add_role
from minianyflow.networks.patches import use_per_frame_modulation
from minianyflow.networks.wan import WanNetwork
from minianyflow.objectives import eulerian_target
from minianyflow.planner.forward_cost import ShapeNetworks
from minianyflow.planner.gpu_check import TINY, Request, settings
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.wan import run as runs
from minianyflow.wan.config import load_config
from minianyflow.wan.shapes import SHARED, build_transformer
from minianyflow.wan.stages import STAGES, draws
from minianyflow.wan.trainer import train_run

SHAPE = SHARED | {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2}
SHAPE |= {"text_dim": 32, "freq_dim": 64}
BOTH = ["bidirectional", "causal"]
T, R = torch.tensor([0.9, 0.5]), torch.tensor([0.3, 0.5])


def adapted(architecture, dtype=torch.float32, start=None):
    """A random transformer with an adapter that does something; start: one to take the weights of."""
    torch.manual_seed(0)
    limit = {"full_chunk_limit": 2} if architecture == "causal" else {}
    transformer = build_transformer(SHAPE, architecture, "cpu", dtype, **limit)
    for number, role in enumerate(("student", "fake")):
        add_role(transformer, role, 8, targets=TARGETS + EMBEDDERS)
        for weight in Adapter(transformer, role).parameters():
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator(number))
    if start is not None:
        transformer.load_state_dict({name: value.to(dtype) for name, value in start.state_dict().items()})
    return transformer


def network(transformer, role="student"):
    causal = "FAR" in type(transformer).__name__
    return RoleNetwork(CausalNetwork(transformer, 1, 2, ragged=True) if causal else WanNetwork(transformer), role)


def asked(net):
    """The average velocity and its gradient: of a causal network under teacher forcing, with old chunks coarse."""
    z, clean = torch.randn(2, 2, 9, 16, 8, 8, generator=generator(3))
    prompt, condition = torch.randn(2, 6, 32, generator=generator(4)), {}
    if isinstance(net.network, CausalNetwork):
        condition, z = {"clean": clean[:, 5:], "past": clean[:, :5]}, z[:, 5:]
    u = net(z, T, R, prompt=prompt, **condition)
    u.square().mean().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in net.parameters()])
    net.zero_grad()
    return u.detach(), gradient


def apart(a, b):
    return max(float((one - other).detach().norm() / other.detach().norm()) for one, other in zip(a, b, strict=True))


class Watch(TorchDispatchMode):
    """Bytes that operations write, and how often fused attention runs forward."""

    def __init__(self):
        super().__init__()
        self.written, self.attended = 0, 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        out = operation(*arguments, **(options or {}))
        self.attended += "attention" in str(operation) and "backward" not in str(operation)
        if not operation.is_view:
            every = out if isinstance(out, tuple | list) else [out]
            self.written += sum(each.nbytes for each in every if isinstance(each, torch.Tensor))
        return out


# ---- what comes out


@pytest.mark.parametrize("architecture", BOTH)
def test_lean_blocks_are_those_of_stock(architecture):
    assert (
        apart(asked(network(use_per_frame_modulation(adapted(architecture)))), asked(network(adapted(architecture))))
        < 1e-6
    )


@pytest.mark.parametrize("architecture", BOTH)
def test_in_bfloat16_the_output_of_lean_blocks_is_bitwise_that_of_stock(architecture):
    ours, _ = asked(network(use_per_frame_modulation(adapted(architecture, torch.bfloat16))))
    theirs, _ = asked(network(adapted(architecture, torch.bfloat16)))
    assert torch.equal(ours, theirs)


def test_times_that_differ_from_frame_to_frame():
    z, prompt = torch.randn(2, 5, 16, 8, 8, generator=generator(3)), torch.randn(2, 6, 32, generator=generator(4))
    t = torch.rand(2, 5, generator=generator(5))
    ours, theirs = (
        network(each)(z, t, 0.5 * t, prompt=prompt)
        for each in (use_per_frame_modulation(adapted(BOTH[0])), adapted(BOTH[0]))
    )
    assert apart([ours], [theirs]) < 1e-6


def test_a_rollout_through_the_cache_is_that_of_stock():
    noise, prompt = torch.randn(2, 9, 16, 8, 8, generator=generator(3)), torch.randn(2, 6, 32, generator=generator(4))
    times = torch.tensor([1.0, 0.4, 0.0])
    with torch.no_grad():
        ours, theirs = (
            causal_rollout(network(each), noise, times, prompt, 1, 2)
            for each in (use_per_frame_modulation(adapted(BOTH[1])), adapted(BOTH[1]))
        )
    assert apart([ours], [theirs]) < 1e-6


# ---- what an adapter computes in


@pytest.mark.parametrize("architecture", BOTH)
def test_adapters_in_the_dtype_of_the_base_are_as_near_float32_as_the_base_is(architecture):
    """bfloat16 rounds in every block anyway: output, gradient and the derivative in time lose nothing more."""
    low = adapted(architecture, torch.bfloat16)
    assert all(weight.dtype == torch.float32 for weight in Adapter(low, "student").parameters())
    high = adapted(architecture, torch.bfloat16)
    for layer in high.modules():  # as peft has it: everything that goes in, in float32
        if hasattr(layer, "lora_A"):
            layer.cast_input_dtype_enabled = True
    exact = asked(network(adapted(architecture, start=low)))
    u_low, gradient_low = (apart([one], [other]) for one, other in zip(asked(network(low)), exact, strict=True))
    u_high, gradient_high = (apart([one], [other]) for one, other in zip(asked(network(high)), exact, strict=True))
    assert u_low < 0.01 > u_high
    assert u_low < 1.1 * u_high
    assert gradient_low < 1.5 * gradient_high < 0.01


def test_the_derivative_in_time_loses_nothing_to_adapters_in_bfloat16():
    low = adapted("bidirectional", torch.bfloat16)
    z, v = torch.randn(2, 2, 5, 16, 8, 8, generator=generator(3))
    prompt = torch.randn(2, 6, 32, generator=generator(4))

    def derivative(transformer):
        u = partial(network(transformer), prompt=prompt)
        return eulerian_target(u, z, T, 0.2 * T, v, delta=5e-3) - v

    exact = derivative(adapted("bidirectional", start=low))
    off = apart([derivative(low)], [exact])
    for layer in low.modules():
        if hasattr(layer, "lora_A"):
            layer.cast_input_dtype_enabled = True
    assert off < 1.05 * apart([derivative(low)], [exact])


# ---- what is copied, kept, computed again


def test_lean_blocks_write_less_and_keep_less():
    written, kept = [], []
    for lighter in (False, True):
        transformer = adapted("bidirectional", torch.bfloat16)
        net = network(use_per_frame_modulation(transformer) if lighter else transformer)
        own, saved = {each.untyped_storage().data_ptr() for each in transformer.parameters()}, {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
            return tensor

        with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(torch.randn(2, 5, 16, 16, 16), T, R, prompt=torch.randn(2, 6, 32))
        written.append(watch.written)
        kept.append(sum(each.untyped_storage().nbytes() for place, each in saved.items() if place not in own))
    assert written[1] < 0.8 * written[0]
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("architecture", BOTH)
def test_attention_that_is_kept_is_not_computed_again(architecture):
    found, attended = [], []
    for keep in (None, False, True):
        transformer = use_per_frame_modulation(adapted(architecture))
        if keep is not None:
            checkpoint_blocks(transformer, keep)
        with Watch() as watch:
            found.append(asked(network(transformer)))
        attended.append(watch.attended)
    layers = SHAPE["num_layers"]
    assert attended == [2 * layers, 4 * layers, 3 * layers]  # of the text, a few tokens, it is computed again
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(each, found[0], strict=True))


def test_keeping_attention_needs_checkpointing():
    with pytest.raises(InputError, match="keep_attention=True, checkpointing=False"):
        load_config(["bidirectional", "forward"], ["keep_attention=true", "checkpointing=false"])


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "keep"), [("bidirectional", True), ("causal", False)])
def test_compiled_blocks_are_the_same_under_every_role(architecture, keep):
    """Traced by dynamo and autograd; the kernels that a GPU gets are not made here."""
    torch.compiler.reset()
    counters.clear()
    transformer = use_per_frame_modulation(adapted(architecture))
    checkpoint_blocks(transformer, keep)
    compile_blocks(transformer, backend="aot_eager")
    for role in ("student", "fake", "student"):
        ours, theirs = asked(network(transformer, role)), asked(network(adapted(architecture), role))
        assert apart(ours, theirs) < 1e-5
    assert counters["stats"]["unique_graphs"] >= 2  # one a role, at least
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_on_policy_run_has_the_losses_of_one_that_is_not(tmp_path, monkeypatch):
    """Three roles on one base, rollouts under gradient, an average: all through `training.train`."""
    monkeypatch.setattr(runs, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    histories = []
    for compiled in ("false", "true"):
        torch.compiler.reset()
        (tmp_path / compiled).mkdir()
        options = (f"compiled={compiled}", f"keep_attention={compiled}")
        request = Request(("tiny",), ("bidirectional",), ("on_policy",), steps=1, device="cpu", options=options)
        torch.manual_seed(0)
        config, _ = settings(request, request.cases()[0], tmp_path / compiled)
        accelerator, data, _ = runs.prepare(config)
        torch.manual_seed(0)
        networks = ShapeNetworks(config, data.shape[0], TINY, "cpu")
        roles = STAGES[config.stage](config, networks, {"prompt": data.null})
        histories.append(train_run(roles, draws(config, data), 2, 2, accelerator, progress=False, log_every=1))
    assert len(histories[0]) == 2
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
