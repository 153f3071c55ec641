"""How blocks run: what is kept is not computed again, and compiled blocks are the same under all roles."""

from functools import partial

import pytest
import torch
from jaxtyping import config
from torch._dynamo.utils import counters

from minianyflow.networks.blocks import checkpoint_blocks, compile_blocks
from minianyflow.networks.patches import use_per_frame_modulation
from minianyflow.planner.forward_cost import ShapeNetworks
from minianyflow.planner.gpu_check import TINY, Request, settings
from minianyflow.wan import run as runs
from minianyflow.wan import run_networks
from minianyflow.wan.stages import STAGES, draws
from minianyflow.wan.trainer import train_run
from tests.networks.inputs import SHAPE, Watch, adapted, distance, network, output_and_gradient


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_attention_that_is_kept_is_not_computed_again(architecture):
    found, attended = [], []
    for keep in (None, False, True):
        transformer = use_per_frame_modulation(adapted(architecture))
        if keep is not None:
            checkpoint_blocks(transformer, keep)
        with Watch() as watch:
            found.append(output_and_gradient(network(transformer)))
        attended.append(watch.attended)
    layers = SHAPE["num_layers"]
    assert attended == [2 * layers, 4 * layers, 3 * layers]  # of the text, a few tokens, it is computed again
    assert all(torch.equal(part, first) for other in found[1:] for part, first in zip(other, found[0], strict=True))


@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_a_block_in_halves_has_its_gradient_and_no_more_attention(architecture):
    whole, halves = (use_per_frame_modulation(adapted(architecture)) for _ in range(2))
    checkpoint_blocks(halves, offload=True, halves=True)
    with Watch() as watch:
        found = output_and_gradient(network(halves))
    assert watch.attended == 4 * SHAPE["num_layers"]  # to itself and to the text, twice
    assert all(map(torch.equal, found, output_and_gradient(network(whole))))


# ---- compiled


@pytest.fixture
def untyped():
    """Without the check of types: dynamo traces the functions themselves."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("architecture", ["bidirectional", pytest.param("causal", marks=pytest.mark.long)])
def test_compiled_blocks_are_the_same_under_every_role(architecture):
    """Traced by dynamo and autograd; the kernels that a GPU gets are not made here."""
    torch.compiler.reset()
    counters.clear()
    transformer = use_per_frame_modulation(adapted(architecture))
    checkpoint_blocks(transformer, keep_attention=architecture == "bidirectional")
    compile_blocks(transformer, backend="aot_eager")
    for role in ("student", "fake", "student"):
        ours, theirs = (output_and_gradient(network(u, role)) for u in (transformer, adapted(architecture)))
        assert distance(ours, theirs) < 1e-5
    assert counters["stats"]["unique_graphs"] >= 2  # one a role, at least
    assert not counters["graph_break"]


@pytest.mark.long
@pytest.mark.usefixtures("untyped")
def test_a_compiled_on_policy_run_has_the_losses_of_one_that_is_not(tmp_path, monkeypatch):
    """Three roles on one base, rollouts under gradient, an average: all through `trainer.train_run`."""
    monkeypatch.setattr(run_networks, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    histories = []
    for compiled in ("false", "true"):
        torch.compiler.reset()
        (tmp_path / compiled).mkdir()
        options = (f"compiled={compiled}", f"keep_attention={compiled}")
        request = Request(("tiny",), ("bidirectional",), ("on_policy",), steps=1, device="cpu", options=options)
        torch.manual_seed(0)
        config, _ = settings(request, ("tiny", "bidirectional", "on_policy"), tmp_path / compiled)
        accelerator, data, _ = runs.prepare(config)
        torch.manual_seed(0)
        networks = ShapeNetworks(config, data.shape[0], TINY, "cpu")
        roles = STAGES[config.stage](config, networks, {"prompt": data.null})
        histories.append(train_run(roles, draws(config, data), 2, 2, accelerator, progress=False, log_every=1))
    assert len(histories[0]) == 2
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
