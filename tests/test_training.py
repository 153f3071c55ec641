"""The small loop and the MLP: repeatable, copies independent, micro-batches equal the batch, failures named."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._pytree import tree_map

from minianyflow.batch import batches, deal, part_of
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.on_policy import OnPolicyLoss
from minianyflow.training import Role, accumulate_gradient, train
from minianyflow.wan.published import Rebalanced
from minianyflow.wan.trainer import train_run
from tests.refused import refused
from toy_data import plane

RING = plane.ring8()


def velocity(z, t, copy=None):
    return RING.velocity(z, t)


def student(seeds=(0,), **options):
    return Role(MLP(seeds=seeds), FlowMapLoss({"eulerian": 0.5, "semigroup": 0.5}, velocity), **options)


def run(role, draw, steps=12, **options):
    history = train({"student": role}, draw, steps, progress=False, **options)
    return history, [weight.detach().clone() for weight in role.network.parameters()]


def same(a, b, tolerance=0.0):
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_of_long_runs_on_one_process_is_this_loop_bit_for_bit(accumulate):
    draw, options = batches(RING.sample, 16), {"accumulate": accumulate, "progress": False, "log_every": 3}
    small, long = (student(clip=0.1, ema_after=2) for _ in range(2))
    small.loss, long.loss = Rebalanced(small.loss), Rebalanced(long.loss)
    history = train({"student": small}, draw, 12, **options)
    found = train_run({"student": long}, draw, 12, accelerator=Accelerator(cpu=True), **options)
    assert [{name: entry[name] for name in own} for entry, own in zip(found, history, strict=True)] == history
    assert same(small.network.parameters(), long.network.parameters())
    assert same(small.average.parameters(), long.average.parameters())


def test_seeds_reproduce_bit_for_bit_and_copies_are_what_they_are_alone():
    together, again = (run(student((3, 4)), batches(RING.sample, 32, (3, 4)))[1] for _ in range(2))
    assert same(together, again)
    for index, seed in enumerate((3, 4)):
        alone = run(student((seed,)), batches(RING.sample, 32, (seed,)))[1]
        assert same([weight[index] for weight in together], [weight[0] for weight in alone], 1e-4)
        assert not same([weight[1 - index] for weight in together], [weight[0] for weight in alone], 1e-3)


@pytest.mark.parametrize("sharp", [False, True])
def test_a_row_is_computed_by_its_copy_in_any_order(sharp):
    network, *alone = (MLP(seeds=seeds, sharp=sharp) for seeds in ((7, 8), (7,), (8,)))
    if sharp:
        nn.init.normal_(network.scale, std=0.3)
        for index, copy in enumerate(alone):
            copy.scale.data[0] = network.scale[index]
    z, t, r = torch.randn(9, 2), torch.rand(9), torch.rand(9) * 0
    copy = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0])  # uneven and out of order
    with torch.no_grad():
        out = network(z, t, r, copy=copy)
        for index in (0, 1):
            rows = copy == index
            assert torch.allclose(out[rows], alone[index](z[rows], t[rows], r[rows]), atol=1e-5)


def test_at_one_pair_of_times_a_sharp_network_is_a_plain_one_with_scaled_columns():
    network, plain = MLP(sharp=True).double(), MLP().double()
    nn.init.normal_(network.scale, std=0.3)
    z, t, r = torch.randn(5, 2, dtype=torch.float64), torch.full((5,), 0.1).double(), torch.full((5,), 0.05).double()
    phase = 2 * torch.pi * torch.tensor([0.125, 0.25, 0.5]) * torch.tensor([[0.1], [0.05]])
    features = torch.cat([phase.sin().flatten(), phase.cos().flatten(), (torch.tensor([0.1, 0.05]) + 0.02).log() / 2])
    turns = 2 * torch.pi * torch.tensor([2.0, 4.0])
    detail, fade = z[:, :, None] * turns, (-((0.1 * turns) ** 2) / 2).exp()
    waves = [(fade * wave).flatten(1) for wave in (detail.sin(), detail.cos())]
    plain.load_state_dict(network.state_dict() | {"weight0": network.weight0[:, :16]}, strict=False)
    for index, scale in enumerate((1 + features.double() @ network.scale[0]).chunk(4)):
        for kind in ("weight", "bias"):
            getattr(plain, f"{kind}{index}").data.mul_(scale)
        if index == 0:
            detail = torch.cat(waves, 1) @ network.weight0[0, 16:]
            plain.bias0.data = plain.bias0 + scale * detail  # (1, rows, width): one per row
    assert torch.allclose(network(z, t, r), plain(z, t, r), atol=1e-5)  # the turns are of float32
    assert not torch.allclose(network(z, t, r), network(z, t, t), atol=1e-2)


def test_micro_batches_make_up_the_batch():
    batch = batches(RING.sample, 6, (0, 1))(0)
    parts = [part_of(batch, index, 3) for index in range(3)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert torch.equal(torch.cat([part["condition"]["copy"] for part in parts]), batch["condition"]["copy"])
    draw, roles = batches(RING.sample, 32), [student(), student()]
    for role, parts in zip(roles, (1, 4), strict=True):  # Adam does not see a gradient's scale
        accumulate_gradient(role, draw(0), parts)
    assert same(*([weight.grad for weight in role.network.parameters()] for role in roles), 1e-4)
    assert same(run(student(), draw)[1], run(student(), draw, accumulate=4)[1], 1e-4)


def together(work, processes):
    """What work(process) returns in as many threads, whose all_reduce adds up."""
    meet, given = threading.Barrier(processes, timeout=60), {}

    def all_reduce(tensor):
        given[threading.get_ident()] = tensor.clone()
        meet.wait()
        tensor.copy_(sum(given.values()))
        meet.wait()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(processes) as pool:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        return [*pool.map(work, range(processes))]


@pytest.mark.parametrize(("processes", "parts"), [(1, 24), (1, 3), (2, 4), (4, 1), (8, 3)])
def test_processes_and_micro_batches_make_up_the_gradient_of_the_step_rebalanced(processes, parts):
    """Half of the rows r = t, then none, then so many that they end inside of a micro-batch."""
    steps = [batches(RING.sample, 24, diagonal=share, end=0.25)(step) for step, share in enumerate((0.5, 0.0, 0.45))]
    steps = [tree_map(lambda value: value.double() if value.is_floating_point() else value, step) for step in steps]
    assert [int((step["t"] == step["r"]).sum()) for step in steps] == [12, 0, 11]

    def gradients(process, processes=processes, parts=parts):
        role = Role(MLP().double(), Rebalanced(FlowMapLoss({"eulerian": 0.5, "semigroup": 0.5})))
        for step in steps:
            accumulate_gradient(role, deal(step, process, processes), parts)
            yield torch.cat([weight.grad.flatten() for weight in role.network.parameters()])
            role.network.zero_grad()

    whole = torch.stack([*gradients(0, 1, 1)])
    mean = torch.stack(together(lambda process: torch.stack([*gradients(process)]), processes)).mean(0)
    assert float(((mean - whole).norm(dim=1) / whole.norm(dim=1)).max()) < 1e-6


def test_the_average_is_the_moving_average_and_may_be_left_out():
    role, weights = student(ema=0.9, ema_after=2), []
    run(role, batches(RING.sample, 16), 6, on_step=lambda step: weights.append(role.network.bias0.detach().clone()))
    expected = weights[2]  # begins after two steps, with the weights of then
    for weight in weights[3:]:
        expected = 0.9 * expected + 0.1 * weight
    assert torch.allclose(role.average.module.bias0, expected, atol=1e-6)
    without = student(ema=None)
    assert without.average is None
    assert torch.equal(run(without, batches(RING.sample, 16), 6)[1][1], weights[-1])  # and training is the same


def test_the_optimiser_stores_its_weights_by_name():
    network = MLP()
    network.bias0.requires_grad_(False)
    (group,) = Role(network).optimizer.param_groups
    assert group["param_names"] == [name for name, _ in network.named_parameters() if name != "bias0"]
    assert all(network.get_parameter(name) is weight for name, weight in zip(group["param_names"], group["params"]))  # noqa: B905
    assert group["fused"]


def test_muon_is_that_of_torch_and_a_stack_is_its_copies_one_by_one(monkeypatch):
    """torch's rounds to bfloat16: here it may not. The other weights are AdamW's."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    network, matrices = nn.ParameterDict({"stack": torch.randn(3, 8, 8), "wide": torch.randn(3, 8, 9)}), []
    network["matrix"] = network["stack"][0].clone()
    role = Role(network, lr=0.01, muon=0.02, warmup=0)
    matrices = [nn.Parameter(matrix.clone()) for matrix in (*network["stack"].detach(), network["matrix"].detach())]
    wide = nn.Parameter(network["wide"].detach().clone())
    muon, adamw = torch.optim.Muon(matrices, weight_decay=0.0), torch.optim.AdamW([wide], weight_decay=0.0)
    for step in range(6):
        gradients = torch.randn(3, 8, 8)
        network["stack"].grad, network["matrix"].grad = gradients.clone(), gradients[0].clone()
        network["wide"].grad = torch.randn(3, 8, 9)
        for matrix, gradient in zip(matrices, (*gradients, gradients[0]), strict=True):
            matrix.grad = gradient.clone()
        wide.grad = network["wide"].grad.clone()
        for optimizer, rate in ((muon, 0.02), (adamw, 0.01)):
            optimizer.param_groups[0]["lr"] = role.schedule(step, 10, rate)
            optimizer.step()
        role.update(step, 10)
        assert same((*network["stack"], network["matrix"]), matrices, 1e-6)
        assert same([network["wide"]], [wide], 1e-6)


def test_learning_rate_warms_up_and_falls_to_zero():
    role = student(lr=1.0, warmup=10)
    assert [role.schedule(step, 100) for step in (0, 4)] == pytest.approx([0.1, 0.5], rel=0.02)
    assert role.schedule(50, 100) == pytest.approx(0.5)
    assert role.schedule(99, 100) < 1e-3
    assert student(lr=1.0, warmup=0, cosine=False).schedule(99, 100) == 1.0
    assert student(lr=1.0, warmup=0, cosine=0.5).schedule(100, 100) == pytest.approx(0.5)


@pytest.mark.slow
def test_training_learns():
    history, _ = run(student(warmup=10), batches(RING.sample, 64), 120, log_every=50)
    assert [entry["step"] for entry in history] == [0, 50, 100, 119]
    assert history[-1]["student/tangent"] < 0.4 * history[0]["student/tangent"]


@pytest.mark.parametrize("wrap", [False, True])
def test_a_loss_saves_and_restores_its_state(wrap):
    inner, value = Rebalanced(FlowMapLoss({})), torch.ones(3)
    loss = OnPolicyLoss(velocity, MLP(), inner) if wrap else inner
    inner.totals = value
    state = loss.state_dict()
    inner.totals = None
    loss.load_state_dict(state)
    assert inner.totals is value


def test_a_weight_without_gradient_is_an_error():
    """Never used, or requires_grad switched off between a forward and its backward: torch leaves None, silently."""
    role = student()
    role.network.unused = torch.nn.Parameter(torch.zeros(2))
    with refused("unused of role 'student' got no gradient"):
        run(role, batches(RING.sample, 8))
    role = student()
    loss, steps = role.loss, []

    def freezing(network, batch):
        losses = loss(network, batch)
        steps.append(len(steps))
        role.network.weight1.requires_grad_(len(steps) < 3)
        return losses

    role.loss = freezing
    with refused(r"weight1 of role 'student' was frozen after .*\(1 weights in all\)"):
        run(role, batches(RING.sample, 8))
    assert len(steps) == 3
