"""Roles on one base: what three separate copies give, and an error wherever a role could be taken for another."""

import copy
import json
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointError

from minianyflow.flow_map import velocity
from minianyflow.networks import lora_roles as roles
from minianyflow.networks.blocks import checkpoint_blocks
from minianyflow.networks.causal import CausalNetwork, causal_backward_simulation
from minianyflow.networks.lora_roles import EMBEDDERS, TARGETS, RoleNetwork, active_role, add_role, merge_role, roles_of
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.networks.patches import set_active_adapter
from minianyflow.networks.wan import WanNetwork, tiny_transformer
from minianyflow.networks.weights import load_role, save_role
from minianyflow.objectives import FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, backward_simulation, draw_on_policy
from minianyflow.support.errors import InputError
from minianyflow.times import draw_pairs, generator
from minianyflow.training import Role
from minianyflow.wan.trainer import train_run
from tests.networks.inputs import PROMPT, R, T, clip, close, tiny_causal
from tests.refused import refused

RANK, FAR = 3, roles.COARSE_PATCHES
ROLES = ("student", "teacher", "fake")
Z = clip(5, seed=98)


def base(kind="wan", **changes):
    return {"wan": tiny_transformer, "causal": tiny_causal}[kind](**{"num_layers": 2} | changes)


def targets_of(kind, role):
    """Of the published recipe; a score sees the clip as one chunk, without coarse patches: they would never learn."""
    if role == "teacher":
        return TARGETS
    return TARGETS + EMBEDDERS + (FAR if (kind, role) == ("causal", "student") else ())


def stir(transformer, role, seed):
    """Weights that do something, for those of a new role do not."""
    source = generator(seed)
    for weight in roles.Adapter(transformer, role).parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=source)


def wrap(kind, transformer, role):
    """A causal student goes chunk by chunk, its scores see the whole clip."""
    if kind == "wan":
        return WanNetwork(transformer)
    return CausalNetwork(transformer) if role == "student" else CausalNetwork(transformer, first=5)


def shared(kind="wan", **changes):
    """Three roles on one base: (transformer, {name: RoleNetwork})."""
    transformer = base(kind, **changes)
    for seed, role in enumerate(ROLES):
        add_role(transformer, role, RANK, targets=targets_of(kind, role))
        stir(transformer, role, seed)
    return transformer, {role: RoleNetwork(wrap(kind, transformer, role), role) for role in ROLES}


def separate(kind, transformer):
    """Three copies of the base, each with the one adapter that peft's own calls give it."""
    networks = {}
    for role in ROLES:
        alone = base(kind).requires_grad_(False)
        alone.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules="|".join(targets_of(kind, role))), role)
        weights = {name: value for name, value in transformer.state_dict().items() if f".{role}." in name}
        assert not alone.load_state_dict(weights, strict=False).unexpected_keys
        networks[role] = wrap(kind, alone, role)
    return networks


def draw_batch(count=2):
    source = generator(5)
    x, eps = torch.randn(2, count, 5, 4, 4, 4, generator=source)
    batch = {"x": x, "eps": eps, "condition": {"prompt": PROMPT[:1].repeat(count, 1, 1)}}
    return batch | draw_pairs(count, generator(6)) | draw_on_policy((5, 4, 4, 4), count, source, shift=5.0)


def losses_of(kind, networks):
    """The losses of student and fake score, as the on-policy stage has them."""
    simulate = backward_simulation if kind == "wan" else causal_backward_simulation(context_gradient=True)
    teacher = partial(velocity, networks["teacher"])
    forward = FlowMapLoss({"eulerian": 0.5, "semigroup": 0.5}, teacher) if kind == "wan" else None
    student = OnPolicyLoss(teacher, networks["fake"], forward, shift=5.0, simulate=simulate)
    return {"student": student, "fake": FakeScoreLoss(networks["student"], 5.0, simulate)}


def adapter_gradients(network, role):
    """By the names that all have in common."""
    named = network.named_parameters()
    return {name.replace(f".{role}.", ".").removeprefix("transformer."): w.grad for name, w in named if w.requires_grad}


def gradient(network, z=Z, between=lambda: None):
    """Of a sum of squares, weight by weight; `between` runs before the backward."""
    network.zero_grad()
    loss = network(z, T, R, PROMPT).square().sum()
    between()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters()}


def apart(a, b):
    """The largest difference of two gradients, over the largest of the second."""
    return max(float((a[name] - b[name]).abs().max()) for name in b) / max(float(b[name].abs().max()) for name in b)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["wan", "causal"])
def test_roles_on_one_base_equal_three_separate_copies(kind, checkpointed):
    """Whole on-policy steps, rollout under gradient through the cache, scores and forward loss in between."""
    transformer, ours = shared(kind)
    theirs = separate(kind, transformer)
    if checkpointed:
        checkpoint_blocks(transformer)
    batch = draw_batch()
    steps = [(role, batch, lambda networks, role=role: losses_of(kind, networks)[role]) for role in ("student", "fake")]
    if kind == "causal":  # its forward loss has conditions of its own: clean chunks, the oldest in coarse patches
        forced = {"x": batch["x"][:, 1:], "eps": batch["eps"][:, 1:], "t": T, "r": R}
        forced["condition"] = batch["condition"] | {"clean": batch["x"][:, 1:], "past": batch["x"][:, :1]}
        steps.append(("student", batch | forced, lambda _: FlowMapLoss({"eulerian": 1.0})))
    for role, batch, loss_of in steps:
        results = [loss_of(networks)(networks[role], batch) for networks in (ours, theirs)]
        assert close(results[0][0], results[1][0])
        for loss, _ in results:
            loss.mean().backward()
        mine, its = adapter_gradients(ours[role], role), adapter_gradients(theirs[role], role)
        assert mine.keys() == its.keys()
        for name in its:
            assert close(mine[name], its[name]), name
        assert max(float(grad.abs().max()) for grad in its.values()) > 1e-2  # so 1e-5 says something
        assert not any(weight.grad is not None for weight in ours["teacher"].parameters())
        for network in (*ours.values(), *theirs.values()):
            network.zero_grad()
    assert all(weight.grad is None for weight in transformer.parameters())


def test_a_role_has_its_own_weights_by_the_names_of_the_transformer():
    transformer, networks = shared("causal")
    names = [name for name, _ in networks["student"].named_parameters()]
    blocks = {f"blocks.{n}.attn1.{part}" for n in (0, 1) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    blocks |= {f"blocks.{n}.ffn.net.{part}" for n in (0, 1) for part in ("0.proj", "2")}
    others = {f"condition_embedder.{time}_embedder.linear_{n}" for time in ("time", "delta") for n in (1, 2)}
    for role, layers in (("student", blocks | others | {"far_patch_embedding"}), ("teacher", blocks)):
        assert set(networks[role].state_dict()) == {f"{key}.lora_{half}.weight" for key in layers for half in "AB"}
    assert list(networks["student"].state_dict()) == names
    learning = {id(weight) for weight in transformer.parameters() if weight.requires_grad}
    assert learning == {id(weight) for network in networks.values() for weight in network.parameters()}
    assert not list(RoleNetwork(WanNetwork(transformer), None).parameters())


def test_a_forward_runs_under_its_role_and_leaves_none():
    transformer, networks = shared()
    plain = WanNetwork(base())
    with torch.no_grad():
        out = {role: network(Z, T, R, PROMPT) for role, network in networks.items()}
        bare = WanNetwork(transformer)(Z, T, R, PROMPT)
        assert close(bare, plain(Z, T, R, PROMPT), 0)  # outside it is the base
        assert close(RoleNetwork(WanNetwork(transformer), None)(Z, T, R, PROMPT), bare, 0)
        with roles.bind_role(transformer, "fake"):
            assert close(WanNetwork(transformer)(Z, T, R, PROMPT), out["fake"], 0)
            assert close(networks["student"](Z, T, R, PROMPT), out["student"], 0)
            assert active_role(transformer) == "fake"  # what was active before comes back
            assert close(RoleNetwork(WanNetwork(transformer), None)(Z, T, R, PROMPT), bare, 0)
            assert active_role(transformer) == "fake"
    assert active_role(transformer) is None
    with roles.bind_role(transformer, "teacher"), refused("expected"):
        networks["student"](Z[:, :, :3], T, R, PROMPT)
    assert active_role(transformer) is None  # after an exception too
    states = [*out.values(), bare]
    assert all(not close(a, b, 1e-2) for i, a in enumerate(states) for b in states[:i])


def test_no_forward_and_no_new_role_flips_requires_grad():
    transformer, networks = shared()
    networks["teacher"].requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in transformer.named_parameters()}

    def others():
        with torch.no_grad():
            networks["fake"](Z, T, R, PROMPT)
        networks["teacher"](Z, T, R, PROMPT)
        AveragedModel(networks["student"]).requires_grad_(False)
        add_role(transformer, "another", RANK, targets=TARGETS)
        roles.remove_role(transformer, "another")
        assert active_role(transformer) is None

    expected = gradient(networks["student"])
    assert apart(gradient(networks["student"], between=others), expected) == 0
    after = {name: weight.requires_grad for name, weight in transformer.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    assert sum(before.values()) == sum(len(list(networks[role].parameters())) for role in ("student", "fake"))


def forced(transformer):
    """The mutation: the fake score's adapter is active, whoever asks, as peft would have it."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            set_active_adapter(layer, ["fake"], False)


def test_recomputation_runs_under_the_role_of_its_forward():
    """Another role active at the time of the backward changes nothing; with stock's checkpointing it would."""
    transformer, networks = shared()
    expected = gradient(networks["student"])
    checkpoint_blocks(transformer)
    again = gradient(networks["student"], between=lambda: networks["fake"](Z, T, R, PROMPT).sum().backward())
    assert apart(again, expected) < 1e-5
    assert apart(gradient(networks["student"], between=lambda: forced(transformer)), expected) < 1e-5
    assert active_role(transformer) == "fake"  # and the backward leaves what was there
    transformer.enable_gradient_checkpointing()
    assert apart(gradient(networks["student"]), expected) > 0.1  # the failure that this is about, and no error


def test_backward_under_another_role_raises(monkeypatch):
    transformer, networks = shared()
    checkpoint_blocks(transformer)

    def broken():
        monkeypatch.setattr(roles, "_activate", lambda module, role: None)
        forced(transformer)

    with pytest.raises(RuntimeError, match="role 'student' is recomputed under 'fake'"):
        gradient(networks["student"], between=broken)
    monkeypatch.undo()
    (block, text), hooks = (transformer.blocks[0], transformer.blocks[1].attn2), []
    for part, change, message in (
        (text, lambda *_: forced(transformer), "recomputed under 'fake'"),  # in the middle of a block
        (block.attn1.to_k, lambda key, _: set_active_adapter(key, ["x"], False), "layers of one block under the roles"),
    ):
        breaking = partial(part.register_forward_pre_hook, change)
        with pytest.raises(RuntimeError, match=message):
            gradient(networks["student"], between=lambda breaking=breaking: hooks.append(breaking()))
        hooks.pop().remove()


def test_the_average_is_computed_by_hand_and_shares_the_base():
    transformer, networks = shared()
    counter = EvaluationCounter(networks["student"])
    average = AveragedModel(counter, multi_avg_fn=get_ema_multi_avg_fn(0.9)).requires_grad_(False)
    mean = average.module.network
    assert mean.role == "student copy 1"
    assert mean.transformer is transformer
    assert all(weight.requires_grad for weight in networks["student"].parameters())
    assert not any(weight.requires_grad for weight in mean.parameters())
    expected = None
    for seed in range(4):
        stir(transformer, "student", seed)
        average.update_parameters(counter)
        now = {name: value.clone() for name, value in networks["student"].state_dict().items()}
        expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in now.items()} if expected else now
    for name, value in mean.state_dict().items():
        assert close(value, expected[name], 1e-6), name
    with torch.no_grad():
        averaged, student = average(Z, T, R, prompt=PROMPT), counter(Z, T, R, prompt=PROMPT)
        networks["fake"].load_state_dict(mean.state_dict())  # any role of the same targets takes it
        assert close(averaged, networks["fake"](Z, T, R, PROMPT), 0)
    assert not close(averaged, student, 1e-2)
    second = copy.deepcopy(mean)
    assert second.role == "student copy 1 copy 1"
    assert copy.deepcopy(networks["student"]).role == "student copy 2"
    assert copy.deepcopy(RoleNetwork(WanNetwork(transformer), None)).role is None


def test_a_copy_draws_no_random_numbers():
    transformer, networks = shared()
    before = torch.get_rng_state()
    copy.deepcopy(networks["student"])
    add_role(transformer, "next", RANK, targets=targets_of("wan", "student"), start="teacher")
    assert torch.equal(before, torch.get_rng_state())
    next_role = RoleNetwork(WanNetwork(transformer), "next")
    with torch.no_grad():  # and starts as the same function, embedders included
        assert close(next_role(Z, T, R, PROMPT), networks["teacher"](Z, T, R, PROMPT), 0)
    mine, its = next_role.state_dict(), networks["teacher"].state_dict()
    assert set(its) < set(mine)
    assert all(torch.equal(mine[name], its[name]) for name in its)
    assert not {value.data_ptr() for value in mine.values()} & {value.data_ptr() for value in its.values()}


def test_alpha_scales_what_an_adapter_adds():
    transformer = base()
    add_role(transformer, "one", 4, alpha=4, targets=EMBEDDERS)
    add_role(transformer, "less", 4, alpha=2, targets=EMBEDDERS)
    for role in ("one", "less"):
        stir(transformer, role, 0)
    layer, x = transformer.condition_embedder.time_embedder.linear_2, torch.randn(3, 64)
    outs = []
    for role in (None, "less", "one"):
        with roles.bind_role(transformer, role), torch.no_grad():
            outs.append(layer(x))
    assert close(outs[1] - outs[0], 0.5 * (outs[2] - outs[0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wan", "causal"])
def test_a_bfloat16_base_has_float32_adapters_and_times(kind):
    transformer = base(kind)
    keep = transformer._keep_in_fp32_modules
    for name, weight in transformer.named_parameters():
        if not any(part in name.split(".") for part in keep):
            weight.data = weight.data.bfloat16()
    for seed, role in enumerate(("student", "fake")):
        add_role(transformer, role, RANK, targets=targets_of(kind, role))
        assert {weight.dtype for weight in roles.Adapter(transformer, role).parameters()} == {torch.float32}
        stir(transformer, role, seed)
    student = RoleNetwork(wrap(kind, transformer, "student"), "student")
    seen = []
    transformer.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    checkpoint_blocks(transformer)
    z, prompt = Z[:, :3], PROMPT.bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        out = student(z.to(dtype), T, R, prompt)
        assert out.dtype == dtype
        assert set(seen) == {torch.float32}
        out.float().square().sum().backward()
    grads = {name: weight.grad for name, weight in student.named_parameters() if "far_patch" not in name}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert {weight.dtype for weight in copy.deepcopy(student).parameters()} == {torch.float32}
    if kind == "causal":  # the coarse patches, and three jumps through the cache
        lengths, step = torch.tensor([4, 4]), torch.tensor([1, 1])
        causal_backward_simulation(True)(student, Z, lengths, step, prompt=prompt)[-1].square().sum().backward()
        assert float(student.get_parameter("far_patch_embedding.lora_B.weight").grad.abs().max()) > 0
    with torch.no_grad():
        before = student(z, T, R, prompt)
    merge_role(transformer, "student")
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    with torch.no_grad():
        after = wrap(kind, transformer, "student")(z, T, R, prompt)
    assert float((after - before).abs().max()) < 0.05 * float(before.abs().max())  # rounded twice, not the same


def test_moving_a_role_moves_its_adapter_alone():
    """And a copy is as its original is."""
    transformer, networks = shared()
    assert all(weight.requires_grad for weight in copy.deepcopy(networks["student"]).parameters())
    networks["student"].to(torch.float64)
    dtypes = {name: weight.dtype for name, weight in transformer.named_parameters()}
    assert all((dtype == torch.float64) == (".student." in name) for name, dtype in dtypes.items())
    frozen = copy.deepcopy(networks["student"].requires_grad_(False))
    assert {(weight.dtype, weight.requires_grad) for weight in frozen.parameters()} == {(torch.float64, False)}


@pytest.mark.parametrize("kind", ["wan", "causal"])
def test_a_role_comes_back_bit_for_bit(tmp_path, kind):
    transformer, networks = shared(kind)
    path = tmp_path / "student.safetensors"
    save_role(path, transformer, "student")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert (config["rank"], config["alpha"]) == (RANK, RANK)
    other = base(kind)
    load_role(path, other, "whatever")
    load_role(path, other, "whatever")  # into the one that is there now
    again = RoleNetwork(wrap(kind, other, "student"), "whatever")
    state = again.state_dict()
    assert state.keys() == networks["student"].state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in networks["student"].state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(Z[:, :3], T, R, PROMPT), networks["student"](Z[:, :3], T, R, PROMPT))
    if kind == "wan":
        load_role(path, transformer, "fake")
        assert all(torch.equal(a, b) for a, b in zip(networks["fake"].parameters(), again.parameters(), strict=True))
        assert all(weight.requires_grad for weight in networks["fake"].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_trained_whole_is_a_copy_for_each_role(tmp_path, dtype):
    """AnyFlow's coarse patches: as the base at first, float32, saved, copied and merged with its bias; then gone."""
    transformer, z = base("causal").to(dtype), clip(7, size=8).to(dtype)
    names, plain = [*transformer.state_dict()], copy.deepcopy(transformer)

    def coarse(network):
        return network(z[:, 3:], T, R, PROMPT.to(dtype), clean=z[:, 3:], past=z[:, :3])

    for role, whole in (("student", FAR), ("teacher", ())):
        add_role(transformer, role, RANK, whole=whole)
    student, teacher = (RoleNetwork(CausalNetwork(transformer), role) for role in ("student", "teacher"))
    added = {"far_patch_embedding.weight", "far_patch_embedding.bias"}
    assert set(student.state_dict()) - set(teacher.state_dict()) == added
    before = coarse(CausalNetwork(plain)).detach()
    assert close(coarse(student), before, 0)
    for name in added:
        torch.nn.init.normal_(student.get_parameter(name), std=0.3)
    out = coarse(student)
    out.float().square().sum().backward()
    assert all(float(student.get_parameter(name).grad.abs().max()) > 0 for name in added)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    assert not close(out, before, 1e-2)
    assert close(coarse(teacher), before, 0)
    assert close(coarse(copy.deepcopy(student)), out, 0)
    save_role(tmp_path / "r.safetensors", transformer, "student")
    load_role(tmp_path / "r.safetensors", transformer, "again")
    assert close(coarse(RoleNetwork(CausalNetwork(transformer), "again")), out, 0)
    with pytest.raises(
        InputError, match=r"trains far_patch_embedding\.bias, this one does not: set causal.coarse_patches=whole"
    ):
        add_role(transformer, "s", RANK, targets=TARGETS + FAR, start="student")
    merged = copy.deepcopy(plain)
    load_role(tmp_path / "r.safetensors", merged, "student")
    merge_role(merged, "student")
    assert close(coarse(CausalNetwork(merged)), out, 0.02 if dtype == torch.bfloat16 else 0)
    for role in [*roles_of(transformer)]:
        roles.remove_role(transformer, role)
    transformer.unload_lora()
    assert [*transformer.state_dict()] == [*merged.state_dict()] == names


REFUSED = {
    "has rank 3; expected 5": lambda path: load_role(path, with_role(rank=5), "r"),
    "has alpha 3; expected 1": lambda path: load_role(path, with_role(alpha=1), "r"),
    "has targets": lambda path: load_role(path, with_role(targets=EMBEDDERS), "r"),
    "role of an AnyFlowTransformer3DModel; expected": lambda path: load_role(path, base("causal"), "r"),
    r"\(256, 3\); expected \(128, 3\): not the weights": lambda path: load_role(path, base(ffn_dim=128), "r"),
    r"has for blocks\.2\S* no weights; expected \(3, 64\)": lambda path: load_role(path, base(num_layers=3), "r"),
    r"blocks\.1\S* \(3, 64\); expected none of that name": lambda path: load_role(path, base(num_layers=1), "r"),
    "those there are: .*r": lambda path: load_role(path.with_name("s.safetensors"), base(), "r"),
    r"lora_\S* in .*r.safetensors holds NaN or infinite": lambda path: load_role(ill(path), base(), "r"),
    "is cut short": lambda path: load_role(cut(path), base(), "r"),
    r"not a \.safetensors": lambda path: save_role(path.with_suffix(".pt"), with_role(), "r"),
    "unknown role 'q'": lambda path: save_role(path, with_role(), "q"),
    "known: r; did you mean 'r'": lambda path: RoleNetwork(WanNetwork(with_role()), "rr"),
    "so far: r": lambda path: add_role(with_role(), "r", 2),
    "without a full stop": lambda path: add_role(base(), "a.b", 2),
    "no method of torch": lambda path: add_role(base(), "half", 2),
    "of rank 0; expected at least 1": lambda path: add_role(base(), "r", 0),
    "'far_patch_embedding' is no layer of this AnyFlow": lambda path: add_role(base(), "r", 2, targets=FAR),
    "unknown role 'teacher'": lambda path: add_role(with_role(), "s", 3, start="teacher"),
    "rank 3 and alpha 3; expected 2 and 2": lambda path: add_role(with_role(), "s", 2, start="r"),
    "trains blocks": lambda path: add_role(with_role(), "s", 3, targets=EMBEDDERS, start="r"),
    "unknown role 'x'": lambda path: merge_role(with_role(), "x"),
    "unknown role 'y'": lambda path: roles.remove_role(with_role(), "y"),
    "unknown role 'r'; known: ": lambda path: without_its_role()(Z, T, R, PROMPT),
}


def with_role(rank=RANK, **options):
    transformer = base()
    add_role(transformer, "r", rank, **options)
    return transformer


def ill(path):
    transformer = with_role()
    next(iter(roles.Adapter(transformer, "r").parameters())).data[0] = float("nan")
    (other := path.parent / "ill").mkdir()
    save_role(other / path.name, transformer, "r")
    return other / path.name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("roles") / "r.safetensors"
    save_role(path, with_role(), "r")
    return path


def cut(path):
    short = path.with_name("cut.safetensors")
    short.write_bytes(path.read_bytes()[:-10])
    return short


def without_its_role():
    network = RoleNetwork(WanNetwork(with_role()), "r")
    merge_role(network.transformer, "r")
    return network


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_one_clear_line(saved, line):
    with refused(line):
        REFUSED[line](saved)


def test_a_role_that_does_not_load_is_not_there(saved):
    other = base(ffn_dim=128)
    add_role(other, "first", RANK)
    with refused("not the weights of this Adapter"):
        load_role(saved, other, "r")
    assert set(roles_of(other)) == {"first"}
    assert all(weight.requires_grad for weight in RoleNetwork(WanNetwork(other), "first").parameters())
    assert active_role(other) is None


@pytest.mark.parametrize("kind", ["wan", "causal"])
def test_a_merged_role_is_the_stock_class_with_other_weights(kind):
    transformer, networks = shared(kind)
    z = Z if kind == "wan" else torch.cat([Z, Z[:, :4]], 1)  # nine frames: old ones in coarse patches
    condition = {} if kind == "wan" else {"context": z[:, :7]}
    z = z if kind == "wan" else z[:, 7:]
    with torch.no_grad():
        expected = networks["student"](z, T, R, PROMPT, **condition)
        bare = RoleNetwork(networks["student"].network, None)(z, T, R, PROMPT, **condition)
        merge_role(transformer, "student")
        stock = base(kind)
        assert set(transformer.state_dict()) == set(stock.state_dict())
        assert not any(isinstance(module, LoraLayer) for module in transformer.modules())
        assert not roles_of(transformer)
        stock.load_state_dict(transformer.state_dict())
        merged = wrap(kind, stock, "student")(z, T, R, PROMPT, **condition)
        assert close(merged, expected)
        add_role(transformer, "student", RANK, targets=targets_of(kind, "student"))
        again = RoleNetwork(wrap(kind, transformer, "student"), "student")
        assert active_role(transformer) is None
        assert close(again(z, T, R, PROMPT, **condition), merged, 0)  # a new role is the base
    assert not close(bare, expected, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_switched_adapter_stops_the_training(checkpointed):
    """peft's own switch, between the forward and the backward: without a check, no gradient and no error."""
    transformer, networks = shared()
    if checkpointed:
        checkpoint_blocks(transformer)
    loss, steps = losses_of("wan", networks)["student"], []

    def switching(network, batch):
        losses = loss(network, batch)
        if len(steps) == 2:
            transformer.set_adapter("fake")
        return losses

    def draw(step):
        steps.append(step)
        return draw_batch()

    student = Role(networks["student"], switching, lr=1e-3, warmup=0, clip=1.0)
    error, words = (CheckpointError, "different number") if checkpointed else (InputError, "student' was frozen after")
    with pytest.raises(error, match=words):
        train_run({"student": student}, draw, 5, accelerator=Accelerator(cpu=True), progress=False)
    assert len(steps) == 2
