"""One frozen base, three roles: student, teacher and fake score as LoRA adapters on one transformer of diffusers.

Three copies of Wan2.1 14B are 86 GB in bfloat16; one base and three adapters do the same, if switching between them
cannot fail in silence. RoleNetwork binds the role to the forward itself, and a checkpointed block (blocks.py) is
recomputed under the role of its forward. Binding never touches requires_grad: peft's own `set_adapter` does, and a
backward after it leaves the gradient None. Outside a bound forward no adapter is active: the transformer is the base.

    u = W x + (alpha / rank) B A x      W frozen, of any dtype; A (rank, in), B (out, rank) float32, B = 0 at first

(LoRA, arXiv 2106.09685.) A role may also train a layer whole: then it has its own copy of it. Adapters keep their
weights in float32 and compute in the dtype of their input, except those of the times' embedders.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from minianyflow.networks.patches import RoleLayer, active_adapter, compute_in_input_dtype, set_active_adapter
from minianyflow.support.errors import InputError, choose

# Whole names of layers, as regular expressions; add up those that a stage trains.
TARGETS = (r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)", r"blocks\.\d+\.ffn\.net\.(0\.proj|2)")
EMBEDDERS = (r"condition_embedder\.(time|delta)_embedder\.linear_[12]",)  # from the forward stage on
COARSE_PATCHES = ("far_patch_embedding",)  # causal; AnyFlow trains it whole: 256 numbers in, so rank 256 saves nothing


def add_role(
    transformer: nn.Module,
    name: str,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    start: str | None = None,
    whole: Sequence[str] = (),
) -> None:
    """Put an adapter called `name` on a transformer: trainable, in float32; all of the base is frozen.

    alpha: of LoRA, `rank` if None. targets: regular expressions of whole names of layers. start: the name of a role of
    the same rank and alpha; layers that it has start as copies of its layers, all others without effect. whole: names
    of 3-D convolutions with bias that the role trains whole.
    Raises InputError for a name that is taken, targets that name no layer, or a start that does not fit.
    """
    alpha, pattern = rank if alpha is None else alpha, "|".join(targets)
    _check_new(transformer, name, rank, (*targets, *whole))
    origin = {} if start is None else _start_weights(transformer, start, rank, alpha, pattern, whole)
    if not roles_of(transformer):
        transformer.requires_grad_(False)
    with _keep_requires_grad(transformer), torch.random.fork_rng(devices=[], enabled=start is not None):
        options = {"target_modules": pattern, "modules_to_save": list(whole) or None}
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, **options), name)
    weights = Adapter(transformer, name).float().requires_grad_(True)
    for key, layer in _role_layers(transformer).items():
        # the embedders of times stay in float32; peft has no such switch for the adapter of a convolution
        own = _modules_of(layer, name)
        convolution = isinstance(own.get(".lora_A"), nn.Conv3d)
        if own and not convolution and not key.startswith("condition_embedder."):
            compute_in_input_dtype(layer, name)
    weights.load_state_dict(origin, strict=False)


def remove_role(transformer: nn.Module, name: str) -> None:
    """Take an adapter off a transformer."""
    choose("role", name, roles_of(transformer))
    with _keep_requires_grad(transformer):
        transformer.delete_adapters(name)
        for key, layer in _whole_layers(transformer).items():
            layer.delete_adapter(name, None)
            if not layer.modules_to_save:
                transformer.set_submodule(key, layer.original_module)


def roles_of(transformer: nn.Module) -> dict[str, LoraConfig]:
    """The adapters of a transformer, {name: peft's configuration}."""
    return getattr(transformer, "peft_config", {})


def role_options(transformer: nn.Module, role: str) -> dict:
    """The options of `add_role` that made a role: rank, alpha and targets."""
    config = roles_of(transformer)[role]
    options = {"rank": config.r, "alpha": config.lora_alpha, "targets": [config.target_modules]}
    return options | {"whole": sorted(config.modules_to_save or [])}


class Adapter(nn.Module):
    """The weights of one adapter and nothing else, by the names of the transformer's layers."""

    def __init__(self, transformer: nn.Module, role: str | None):
        super().__init__()
        for name, layer in _role_layers(transformer).items():
            for half, module in _modules_of(layer, role).items():
                *path, last = f"{name}{half}".split(".")
                parent = self
                for part in path:
                    parent = parent._modules.setdefault(part, nn.Module())
                parent.add_module(last, module)


class RoleNetwork(Adapter):
    """`network`, a WanNetwork or CausalNetwork, with one adapter of its transformer active; role None: the bare base.

    Its parameters, state dict and `to` are those of the adapter alone: move the transformer itself to its device. A
    deep copy is a new adapter on the same base, so that an average costs only adapter weights.
    """

    def __init__(self, network: nn.Module, role: str | None):
        if role is not None:
            choose("role", role, roles_of(network.transformer))
        super().__init__(network.transformer, role)
        self.role = role
        object.__setattr__(self, "network", network)  # unregistered: its weights are the base's

    @property
    def transformer(self) -> nn.Module:
        """The transformer that all roles share."""
        return self.network.transformer

    def forward(self, *arguments: Tensor | None, **condition: Any) -> Tensor | tuple:
        """The output of `network` under this role. Raises InputError if the transformer has lost the adapter."""
        if self.role is not None:
            choose("role", self.role, roles_of(self.transformer))
        with bind_role(self.transformer, self.role):
            return self.network(*arguments, **condition)

    def __deepcopy__(self, memo):
        if self.role is None:
            return RoleNetwork(self.network, None)
        names = (f"{self.role} copy {number}" for number in count(1))
        name = next(name for name in names if name not in roles_of(self.transformer))
        add_role(self.transformer, name, **role_options(self.transformer, self.role), start=self.role)
        other = RoleNetwork(self.network, name).train(self.training)
        for weight, copied in zip(self.parameters(), other.parameters(), strict=True):
            copied.data = copied.data.to(weight)  # peft made it on the device of the base
            copied.requires_grad_(weight.requires_grad)
        return other


@contextlib.contextmanager
def bind_role(module: nn.Module, role: str | None) -> Iterator[None]:
    """Inside, exactly the adapter `role` is active in all of `module`, or none for None; then what was before."""
    before = [(layer, active_adapter(layer)) for layer in _role_layers(module).values()]
    try:
        _activate(module, role)
        yield
    finally:
        for layer, state in before:
            set_active_adapter(layer, *state)


def active_role(module: nn.Module) -> str | None:
    """The role that `module` would run under now, None for the base. Raises RuntimeError if its layers disagree."""
    layers = _role_layers(module).values()
    active = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}
    if len(active) > 1 or len(max(active, default=())) > 1:
        raise RuntimeError(f"layers of one block under the roles {sorted(active)}; expected one for all of them")
    return next((role for roles in active for role in roles), None)


@torch.no_grad()
def merge_role(transformer: nn.Module, role: str) -> None:
    """Add an adapter to the base's weights and take all adapters off: for export.

    The sum is rounded to the base's dtype. RoleNetworks of this transformer are void afterwards.
    """
    choose("role", role, roles_of(transformer))
    whole = _whole_layers(transformer)
    for layer in _role_layers(transformer).values():
        if layer in whole.values() and _modules_of(layer, role):
            layer.original_module.load_state_dict(layer.modules_to_save[role].state_dict())
        elif _modules_of(layer, role):
            layer.get_base_layer().weight += layer.get_delta_weight(role)
    transformer.unload_lora()
    for key, layer in whole.items():
        transformer.set_submodule(key, layer.original_module)


def storages(*modules: nn.Module) -> tuple[int, int]:
    """Memory behind the weights and buffers of `modules`, each storage counted once: (bytes, how many).

    A RoleNetwork counts with its whole transformer: base, its adapter, and the others on it.
    """
    parts = [part for module in modules for part in module.modules()]
    parts = [*modules, *(part.network for part in parts if isinstance(part, RoleNetwork))]
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    found = {(tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in found.values()), len(found)


def _role_layers(module):
    """The layers of a module that roles change, {name: layer}."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, RoleLayer)}


def _whole_layers(module):
    return {name: layer for name, layer in _role_layers(module).items() if isinstance(layer, ModulesToSaveWrapper)}


def _modules_of(layer, role):
    """What a role has in a layer, {suffix of the name: module}: the halves of an adapter, a copy, or nothing."""
    if isinstance(layer, ModulesToSaveWrapper):
        return {"": layer.modules_to_save[role]} if role in layer.modules_to_save else {}
    return {f".{half}": getattr(layer, half)[role] for half in ("lora_A", "lora_B") if role in getattr(layer, half)}


def _activate(module, role):
    for layer in _role_layers(module).values():
        set_active_adapter(layer, [] if role is None else [role], role is None)


@contextlib.contextmanager
def _keep_requires_grad(transformer):
    """While adapters come and go: requires_grad of all others stays, no adapter is active afterwards."""
    before = [(weight, weight.requires_grad) for weight in transformer.parameters()]
    _activate(transformer, None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the purpose
            yield
    finally:
        for weight, trainable in before:
            weight.requires_grad_(trainable)
        _activate(transformer, None)


def _check_new(transformer, name, rank, targets):
    taken = roles_of(transformer)
    if name in taken or not name or "." in name or hasattr(nn.ModuleDict, name):
        expected = "a new name without a full stop that is no method of torch's modules"
        raise InputError(f"role {name!r}; expected {expected} (roles so far: {', '.join(taken) or 'none'})")
    if rank < 1:
        raise InputError(f"role {name!r} of rank {rank}; expected at least 1")
    layers = [key for key, module in transformer.named_modules() if not isinstance(module, nn.Identity)]
    for target in targets:
        if not any(re.fullmatch(target, key) for key in layers):
            layer = f"layer of this {type(transformer).__name__}"
            raise InputError(f"target {target!r} is no {layer}; expected names as in TARGETS")


def _start_weights(transformer, start, rank, alpha, pattern, whole):
    """The weights of the role that another starts from."""
    choose("role", start, roles_of(transformer))
    options, weights = role_options(transformer, start), Adapter(transformer, start).state_dict()
    if (options["rank"], options["alpha"]) != (rank, alpha):
        has = f"rank {options['rank']} and alpha {options['alpha']}"
        asked = f"{rank} and {alpha}, as the role that starts from it"
        todo = f"in a run, set rank={options['rank']} alpha={options['alpha']:g}"
        raise InputError(f"role {start!r}, the run that is started from, has {has}; expected {asked}: {todo}")
    adapters, copies = ({n for n in weights if (".lora_" in n) == adapted} for adapted in (True, False))
    lost = [name for name in adapters if not re.fullmatch(pattern, name.rsplit(".lora_", 1)[0])]
    lost += [name for name in copies if name.rpartition(".")[0] not in whole]
    if lost:
        whole = any(COARSE_PATCHES[0] in name for name in lost)
        todo = "set causal.coarse_patches=whole" if whole else "use targets that cover it, as its own run did"
        raise InputError(f"role {start!r}, the run that is started from, trains {min(lost)}, this one does not: {todo}")
    return weights
