"""One frozen base, three roles: student, teacher and fake score as LoRA adapters on one transformer of diffusers.

Three copies of Wan2.1 14B are 86 GB in bfloat16; one base and three adapters do the same, if three silent failures are
closed. The role is bound to the forward itself, by `RoleNetwork`, and a checkpointed block works under the role of its
forward again when its backward recomputes it. Binding never touches requires_grad: peft's own `set_adapter` does, and a
backward after it leaves the gradient None. Outside a bound forward no adapter is active: the transformer is the base.

    u = W x + (alpha / rank) B A x      W frozen, of any dtype; A (rank, in), B (out, rank) float32, B = 0 at first

Adapters keep their weights in float32 and compute in the dtype of what comes in, but for those of the times' embedders.
"""

import contextlib
import json
import re
import warnings
from pathlib import Path

import torch
from diffusers import AnyFlowTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minianyflow.networks.weights import FORMAT, load_into, read_weights
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder

# Names of layers, whole, as regular expressions; add up what a stage trains.
TARGETS = (r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)", r"blocks\.\d+\.ffn\.net\.(0\.proj|2)")
EMBEDDERS = (r"condition_embedder\.(time|delta)_embedder\.linear_[12]",)  # from the forward stage on
COARSE_PATCHES = ("far_patch_embedding",)  # causal: its input has 256 numbers in Wan, so rank 256 is all of it
ATTENTION = tuple(  # kernels of scaled_dot_product_attention
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)


def add_role(transformer, name, rank, alpha=None, targets=TARGETS, start=None):
    """Put an adapter called `name` on a transformer; its weights learn, are float32, and all of the base is frozen.

    alpha: of LoRA, `rank` if None. targets: layers, regular expressions of their whole names. start: the name of a
    role of the same rank and alpha; layers that it has start as they are there, all others without effect.
    Raises InputError for a name that is taken, targets that name no layer, or a start that does not fit.
    """
    alpha, pattern = rank if alpha is None else alpha, "|".join(targets)
    _check_new(transformer, name, rank, targets)
    origin = None if start is None else _start(transformer, start, rank, alpha, pattern)
    if not roles_of(transformer):
        transformer.requires_grad_(False)
    with _undisturbed(transformer), torch.random.fork_rng(devices=[], enabled=start is not None):
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern), name)
    weights = Adapter(transformer, name).float().requires_grad_(True)
    _compute_low(transformer, name)
    if origin is not None:
        weights.load_state_dict(origin, strict=False)


def remove_role(transformer, name):
    """Take an adapter off a transformer."""
    choose("role", name, roles_of(transformer))
    with _undisturbed(transformer):
        transformer.delete_adapters(name)


def roles_of(transformer):
    """The adapters of a transformer, {name: peft's configuration}."""
    return getattr(transformer, "peft_config", {})


class Low(nn.Linear):
    """A linear layer without bias that computes in the dtype of what comes in, whatever it keeps its weight in."""

    def forward(self, x):
        """As nn.Linear."""
        return functional.linear(x, self.weight.to(x.dtype))


class Adapter(nn.Module):
    """The weights of one adapter and nothing else, by the names of the transformer's layers."""

    def __init__(self, transformer, role):
        super().__init__()
        for name, layer in transformer.named_modules():
            if isinstance(layer, LoraLayer) and role in layer.lora_A:
                self._put(f"{name}.lora_A", layer.lora_A[role])
                self._put(f"{name}.lora_B", layer.lora_B[role])

    def _put(self, name, module):
        *path, last = name.split(".")
        place = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]
        place.add_module(last, module)


class RoleNetwork(Adapter):
    """`network`, a WanNetwork or CausalNetwork, with one adapter of its transformer active; role None: the bare base.

    Its parameters, state dict and `to` are those of the adapter alone: move the transformer itself to its device. A
    deep copy is a new adapter on the same base, so that an average costs only adapter weights.
    """

    def __init__(self, network, role):
        if role is not None:
            choose("role", role, roles_of(network.transformer))
        super().__init__(network.transformer, role)
        self.role = role
        object.__setattr__(self, "network", network)  # unregistered: its weights are the base's

    @property
    def transformer(self):
        """The one that all roles share."""
        return self.network.transformer

    def forward(self, *arguments, **condition):
        """What `network` returns under this role. Raises InputError if the transformer has lost the adapter."""
        if self.role is not None:
            choose("role", self.role, roles_of(self.transformer))
        with bound(self.transformer, self.role):
            return self.network(*arguments, **condition)

    def __deepcopy__(self, memo):
        if self.role is None:
            return RoleNetwork(self.network, None)
        taken, number = roles_of(self.transformer), 1
        while f"{self.role} copy {number}" in taken:
            number += 1
        name, role = f"{self.role} copy {number}", _config(self.transformer, self.role)
        add_role(self.transformer, name, role["rank"], role["alpha"], role["targets"], start=self.role)
        other = RoleNetwork(self.network, name).train(self.training)
        for mine, its in zip(self.parameters(), other.parameters(), strict=True):
            its.data = its.data.to(mine)  # peft made it on the device of the base
            its.requires_grad_(mine.requires_grad)
        return other


@contextlib.contextmanager
def bound(module, role):
    """Inside, exactly the adapter `role` is active in all of `module`, or none for None; then what was before."""
    # set_adapter and enable_adapters of peft would flip requires_grad
    layers = _lora_layers(module)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        _activate(layers, role)
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def active_role(module):
    """The role that `module` would work under now, None for the base. Raises RuntimeError if its layers disagree."""
    active = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in _lora_layers(module)}
    if len(active) > 1 or len(max(active, default=())) > 1:
        raise RuntimeError(f"layers of one block under the roles {sorted(active)}; expected one for all of them")
    return next((role for each in active for role in each), None)


def checkpoint_blocks(transformer, keep_attention=False):
    """Keep only what goes into each block, and work through it again in its backward, under its forward's role.

    keep_attention: what self-attention made is kept as well, (B, N, D) a block, where it is fused: most of the work.
    The backward raises RuntimeError if the recomputation finds another role: its gradient would be wrong, silently.
    """

    def again(block, *arguments):
        role = active_role(block)

        def run(*arguments):
            try:
                return block(*arguments)
            finally:  # however it ends: a recomputation stops by an exception once it has what it needs
                _check_role(block, role)

        def contexts():
            if not keep_attention:
                return contextlib.nullcontext(), bound(block, role)
            keeping, reading = create_selective_checkpoint_contexts(_keep_attention)
            return keeping, _both(bound(block, role), reading)

        # nothing in a block draws random numbers
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    transformer.enable_gradient_checkpointing(again)


def _keep_attention(context, operation, *arguments, **options):
    # not where text is seen, a few tokens: as much to keep, and little to compute
    keep = operation in ATTENTION and arguments[1].shape[2] >= arguments[0].shape[2]
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _both(outer, inner):
    with outer, inner:
        yield


def save_role(path, transformer, role):
    """Write the weights of one adapter to `path`, a .safetensors file, with what makes it again in its metadata."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file; expected one: nothing is ever unpickled here")
    choose("role", role, roles_of(transformer))
    config = _config(transformer, role) | {"transformer": type(transformer).__name__}
    state = {name: value.cpu().contiguous() for name, value in Adapter(transformer, role).state_dict().items()}
    with staging_folder(path.parent) as folder:
        data = save(state, {"format": FORMAT, "kind": "role", "config": json.dumps(config)})
        (folder / path.name).write_bytes(data)


def load_role(path, transformer, role, widen=False):
    """Load what `save_role` wrote as the adapter `role`, which is made if the transformer does not have it.

    widen: a role of a bidirectional transformer will do for a causal one, which has all of its layers.
    Raises InputError for no such file or one cut short, and for weights of another architecture, size, rank, alpha or
    targets; a transformer without the adapter is then left without it.
    """
    state, config, _ = read_weights(path, "role")
    kind = config.pop("transformer")
    if kind != type(transformer).__name__ and not (widen and kind == AnyFlowTransformer3DModel.__name__):
        raise InputError(f"{path} is a role of an {kind}; expected one of an {type(transformer).__name__}")
    made = role not in roles_of(transformer)
    if made:
        add_role(transformer, role, config["rank"], config["alpha"], config["targets"])
    try:
        for name, value in _config(transformer, role).items():
            if config[name] != value:
                raise InputError(f"{path} has {name} {config[name]}; expected {value}, as role {role!r} has it")
        load_into(Adapter(transformer, role), state, path)
    except InputError:
        if made:
            remove_role(transformer, role)
        raise


@torch.no_grad()
def merge_role(transformer, role):
    """Fold an adapter into the base's weights and take all adapters off: for export.

    The sum is rounded to the base's dtype. RoleNetworks of this transformer are void afterwards.
    """
    choose("role", role, roles_of(transformer))
    for layer in _lora_layers(transformer):
        if role in layer.lora_A:
            layer.get_base_layer().weight += layer.get_delta_weight(role)
    transformer.unload_lora()


def storages(*modules):
    """Memory behind the weights and buffers of `modules`, each storage counted once: (bytes, how many).

    A RoleNetwork counts with its whole transformer: base, its adapter, and the others on it.
    """
    found = {}
    for module in modules:
        inside = [each.network for each in module.modules() if isinstance(each, RoleNetwork)]
        for each in (module, *inside):
            for tensor in (*each.parameters(), *each.buffers()):
                storage = tensor.untyped_storage()
                found[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(found.values()), len(found)


def _compute_low(transformer, role):
    """Spare the copies in float32 that peft makes of what goes into every layer."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer) and role in layer.lora_A and not name.startswith("condition_embedder."):
            halves = layer.lora_A[role], layer.lora_B[role]
            if {type(half) for half in halves} == {nn.Linear}:  # coarse patches, a convolution, stay as they are
                layer.cast_input_dtype_enabled = False
                for half in halves:
                    half.__class__ = Low


def _lora_layers(module):
    return [each for each in module.modules() if isinstance(each, LoraLayer)]


def _activate(layers, role):
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = ([] if role is None else [role]), role is None


@contextlib.contextmanager
def _undisturbed(transformer):
    """While adapters come and go: requires_grad of all others stays, no adapter is active afterwards."""
    before = [(weight, weight.requires_grad) for weight in transformer.parameters()]
    _activate(_lora_layers(transformer), None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
            yield
    finally:
        for weight, learns in before:
            weight.requires_grad_(learns)
        _activate(_lora_layers(transformer), None)


def _check_role(block, role):
    found = active_role(block)
    if found != role:
        raise RuntimeError(
            f"a block of role {role!r} is worked through again under {found!r}: its gradient would be wrong; "
            "leave the active adapter to RoleNetwork"
        )


def _config(transformer, role):
    config = roles_of(transformer)[role]
    return {"rank": config.r, "alpha": config.lora_alpha, "targets": [config.target_modules]}


def _check_new(transformer, name, rank, targets):
    if name in roles_of(transformer) or not name or "." in name or hasattr(nn.ModuleDict, name):
        taken = ", ".join(roles_of(transformer)) or "none"
        expected = f"a name without a full stop that is no method of torch's modules and not taken (so far: {taken})"
        raise InputError(f"a new role {name!r}; expected {expected}")
    if rank < 1:
        raise InputError(f"role {name!r} of rank {rank}; expected at least 1")
    layers = [key for key, module in transformer.named_modules() if not isinstance(module, nn.Identity)]
    for target in targets:
        if not any(re.fullmatch(target, key) for key in layers):
            kind = type(transformer).__name__
            raise InputError(f"target {target!r} is no layer of this {kind}; expected names as in TARGETS")


def _start(transformer, start, rank, alpha, pattern):
    """The weights of the role that another starts from."""
    choose("role", start, roles_of(transformer))
    config, weights = _config(transformer, start), Adapter(transformer, start).state_dict()
    if (config["rank"], config["alpha"]) != (rank, alpha):
        has = f"rank {config['rank']} and alpha {config['alpha']}"
        raise InputError(f"role {start!r} has {has}; expected {rank} and {alpha}, as the role that starts from it")
    lost = [name for name in weights if not re.fullmatch(pattern, name.rsplit(".lora_", 1)[0])]
    if lost:
        raise InputError(f"role {start!r} trains {lost[0]}; expected targets that keep what a role starts from")
    return weights
