"""Trained networks as files: NAME.safetensors in half precision, and NAME.json, which says what made it.

Nothing is ever unpickled. The metadata of the file says which format and kind it is and how to build the module:
    wan, causal     the transformer's configuration and `timesteps`; for causal also `first` and `rest`
    dense           the configuration of a Dense that puts out the clean clip
    codec           the configuration of the AutoencoderKLWan
    role            rank, alpha and targets of a LoRA adapter, and the transformer's class; in float32, without a .json
Own code, since huggingface_hub's PyTorchModelHubMixin has one folder per network, writes in place, and rebuilds a
module only from plain arguments; and since diffusers' save_lora_adapter writes keys that pipelines silently ignore.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import TypedDict

from minianyflow.networks.causal import CausalNetwork
from minianyflow.networks.codec import Codec
from minianyflow.networks.dense import Dense, FromClean
from minianyflow.networks.lora_roles import Adapter, add_role, remove_role, role_options, roles_of
from minianyflow.networks.wan import WanNetwork
from minianyflow.support.checks import check_finite
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import check_json, read_json, regular, staging_folder

FORMAT = "minianyflow 1"
KINDS = ("wan", "causal", "dense", "codec")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAMPLED = 256  # values at either end of a tensor that its fingerprint reads


class Provenance(TypedDict):
    """The fields that are read of the JSON beside weights."""

    seeds: list[int]
    cost: dict[str, float]
    figures: dict


PROVENANCE = ("command", *Provenance.__annotations__)


def save_weights(path: str | Path, state: dict[str, Tensor], provenance: dict) -> None:
    """Write a state dict to `path` and its provenance beside it; both whole, or neither.

    state: of a network that `describe` knows; floats are written in half precision. provenance: "kind" and
    "config", as `describe` gives them; the "command" that made it, "seeds", "cost" (forwards, backwards, seconds),
    "figures" measured, and anything else; the versions of torch and diffusers are added.
    Raises InputError if any of these is missing, or a weight is not finite in half precision.
    """
    missing = [name for name in ("kind", "config", *PROVENANCE) if name not in provenance]
    if missing:
        raise InputError(f"weights without {', '.join(missing)}; expected kind, config, {', '.join(PROVENANCE)}")
    beside = {"format": FORMAT} | {name: value for name, value in provenance.items() if name != "config"}
    beside["versions"] = {package: version(package) for package in ("torch", "diffusers")}
    state = {name: _half(name, value) for name, value in state.items()}
    _write(path, state, provenance["kind"], provenance["config"], beside)


def read_weights(path: str | Path, *kinds: str) -> tuple[dict[str, Tensor], dict, dict]:
    """What `save_weights` wrote: (state dict in float32, configuration, provenance).

    kinds: those expected. The provenance is {} where there is no .json.
    Raises InputError for no such file, one cut short or not safetensors, another format or kind.
    """
    path = _checked(path)
    if not path.is_file():
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.safetensors"))) or "none"
        raise InputError(f"no weights {path.name} in {path.parent}; those there are: {others}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as problem:
        whole = f"{path}, {path.stat().st_size} bytes, is cut short or no safetensors file"
        raise InputError(f"{whole} ({problem}): fetch or make it again") from None
    if metadata.get("format") != FORMAT or not {"kind", "config"} <= set(metadata):
        raise InputError(f"{path} has format {metadata.get('format', 'unknown')!r}; expected {FORMAT!r}: make it again")
    if metadata["kind"] not in kinds:
        raise InputError(f"{path} holds weights of kind {metadata['kind']!r}; expected {' or '.join(map(repr, kinds))}")
    beside = path.with_suffix(".json")
    provenance = read_json(beside, f"expected the provenance of {path}", Provenance) if beside.exists() else {}
    try:
        config = check_json(json.loads(metadata["config"]), dict, path, "make it again")
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{path}: its configuration cannot be read ({problem}); make it again") from None
    state = {name: value.float() if value.dtype in FLOATS.values() else value for name, value in state.items()}
    for name, value in state.items():
        if value.dtype == torch.float32:
            check_finite(f"{name} in {path}", value, "fetch or make it again")
    return state, config, provenance


def describe(module: nn.Module) -> dict:
    """The kind and configuration of a WanNetwork, CausalNetwork, FromClean or Codec, for `save_weights`."""
    if isinstance(module, Codec):
        return {"kind": "codec", "config": _public(module.vae.config)}
    if isinstance(module, CausalNetwork):
        options = {"timesteps": module.timesteps, "first": module.first, "rest": module.rest}
        return {"kind": "causal", "config": _public(module.transformer.config) | options}
    if isinstance(module, WanNetwork):
        return {"kind": "wan", "config": _public(module.transformer.config) | {"timesteps": module.timesteps}}
    if isinstance(module, FromClean):
        return {"kind": "dense", "config": module.network.config}
    raise InputError(f"a {type(module).__name__}; expected a WanNetwork, CausalNetwork, FromClean or Codec")


def load_codec(path: str | Path) -> Codec:
    """The Codec in the file `path`, frozen and in eval mode."""
    state, config, _ = read_weights(path, "codec")
    return _rebuilt(lambda: Codec(AutoencoderKLWan(**config)), state, path)


def load_network(path: str | Path) -> WanNetwork | CausalNetwork | FromClean:
    """The network in the file `path`, frozen and in eval mode."""
    state, config, _ = read_weights(path, "wan", "causal", "dense")
    if "inner" in config:
        return _rebuilt(lambda: FromClean(Dense(**config)), state, path)
    options = {name: config.pop(name) for name in ("timesteps", "first", "rest") if name in config}
    if "first" not in options:
        return _rebuilt(lambda: WanNetwork(AnyFlowTransformer3DModel(**config), **options), state, path)
    return _rebuilt(lambda: CausalNetwork(AnyFlowFARTransformer3DModel(**config), **options), state, path)


def load_into(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict that was read from `path`. InputError names one too few, too many or of another shape."""
    states = (module.state_dict(), state)
    expected, found = ({name: tuple(value.shape) for name, value in weights.items()} for weights in states)
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if wrong:
        name, kind = wrong[0], type(module).__name__
        shapes = f"{found.get(name, 'no weights')}; expected {expected.get(name, 'none of that name')}"
        raise InputError(f"{path} has for {name} {shapes}: not the weights of this {kind} ({len(wrong)} do not fit)")
    for name, value in state.items():
        if value.dtype != (expected := states[0][name].dtype) and value.dtype not in FLOATS.values():
            raise InputError(f"{path} has {name} in {value.dtype}; expected {expected}: fetch or make it again")
    module.load_state_dict(state)


def save_role(path: str | Path, transformer: nn.Module, role: str) -> None:
    """Write the weights of one adapter to `path`, a .safetensors file, and in its metadata what rebuilds it."""
    choose("role", role, roles_of(transformer))
    state = {name: value.cpu().contiguous() for name, value in Adapter(transformer, role).state_dict().items()}
    _write(path, state, "role", role_options(transformer, role) | {"transformer": type(transformer).__name__})


def load_role(path: str | Path, transformer: nn.Module, role: str, from_bidirectional: bool = False) -> None:
    """Load what `save_role` wrote as the adapter `role`, which is added if the transformer does not have it.

    from_bidirectional: a causal transformer also takes the role of a bidirectional one, all of whose layers it has.
    Raises InputError for no such file or one cut short, and for weights of another architecture, size, rank, alpha or
    targets; a transformer without the adapter is then left without it.
    """
    state, config, _ = read_weights(path, "role")
    config = {"whole": []} | config  # a file of before there were such layers
    kind, added = config.pop("transformer"), role not in roles_of(transformer)
    if kind != type(transformer).__name__ and not (from_bidirectional and kind == AnyFlowTransformer3DModel.__name__):
        raise InputError(f"{path} is a role of an {kind}; expected one of an {type(transformer).__name__}")
    if added:
        add_role(transformer, role, **config)
    try:
        for name, value in role_options(transformer, role).items():
            if config[name] != value:
                raise InputError(f"{path} has {name} {config[name]}; expected {value}, as role {role!r} has it")
        load_into(Adapter(transformer, role), state, path)
    except InputError:
        if added:
            remove_role(transformer, role)
        raise


def _rebuilt(build, state, path):
    """The module; the caller's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        try:
            module = build()
        except (TypeError, ValueError) as problem:  # a configuration of another version
            raise InputError(f"{path} does not say how to build what it holds ({problem}); make it again") from None
    load_into(module, state, path)
    return module.eval().requires_grad_(False)


def _public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _half(name, value):
    dtype = torch.float16 if value.is_floating_point() else value.dtype
    half = value.detach().to("cpu", dtype, copy=True).contiguous()
    if not bool(half.isfinite().all()):
        raise InputError(f"{name} is not finite in half precision; expected trained weights below 65504")
    return half


def _checked(path):
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path.name} is not a .safetensors file; expected one: nothing is ever unpickled here")
    return path


def _write(path, state, kind, config, provenance=None):
    """Tensors and provenance, whole or not at all."""
    path = _checked(path)
    with staging_folder(path.parent) as folder:
        data = save(state, {"format": FORMAT, "kind": kind, "config": json.dumps(config)})
        (folder / path.name).write_bytes(data)  # safetensors' save_file would let nobody else read the file
        if provenance:
            (folder / path.name).with_suffix(".json").write_text(json.dumps(provenance, indent=1) + "\n")


def check_floats(folder: str | Path) -> None:
    """Raise InputError if a safetensors file in a folder has other numbers than floats: int8, float8, complex.

    Loading would make floats of them in silence, without the scales that they lack.
    """
    for file in sorted(Path(folder).glob("[!.]*.safetensors")):
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        for name, kind in found.items():
            if kind not in FLOATS:
                raise InputError(f"{name} in {file} is {kind}; expected {', '.join(FLOATS)}: fetch weights of floats")


def fingerprint(source: str | Path) -> str:
    """A short text that identifies weights, wherever they lie and however they are spread over files.

    source: a safetensors file, a folder of them or a pipeline's; a name on the hub is its own fingerprint. It reads the
    name, dtype and shape of every tensor and a few values at either end, which any training moves, so it is quick.
    Raises InputError for files that cannot be read.
    """
    path = Path(source)
    if not path.exists():
        return str(source)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    digest, tensors = hashlib.sha256(), {}
    files = sorted(folder.glob("[!.]*.safetensors")) if folder.is_dir() else [folder]
    try:
        for file in map(regular, files):
            opened = safe_open(file, "pt")
            tensors |= dict.fromkeys(opened.keys(), opened)
        if (folder / "config.json").is_file():
            config = _public(read_json(folder / "config.json", "fetch or make it again"))
            config.pop("transformers_version", None)  # who saved a model changes nothing
            digest.update(json.dumps(config, sort_keys=True).encode())
        for name, opened in sorted(tensors.items()):
            tensor = opened.get_tensor(name)
            flat, ends = tensor.reshape(-1).view(torch.uint8), SAMPLED * tensor.element_size()
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(torch.cat([flat[:ends], flat[-ends:]]).numpy().tobytes())
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError) as problem:
        raise InputError(f"the weights in {source} cannot be read ({problem}); fetch or make them again") from None
    return f"weights {digest.hexdigest()[:12]}" if tensors else str(source)
