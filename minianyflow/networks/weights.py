"""How trained networks are kept: NAME.safetensors in half precision, beside it NAME.json, which says where it is from.

Nothing is ever unpickled. The metadata of the file says which format and kind it is and how to build the module:
    wan, causal     the transformer's configuration, and what time 1 is counted as; for causal `first` and `rest`, too
    codec           the configuration of the AutoencoderKLWan
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from minianyflow.networks.causal import CausalNetwork
from minianyflow.networks.codec import Codec
from minianyflow.networks.wan import WanNetwork
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder

FORMAT = "minianyflow 1"
KINDS = ("wan", "causal", "codec")
SAMPLED = 256  # values at either end of a tensor that its fingerprint looks at
PROVENANCE = ("command", "seeds", "cost", "figures")


def save_weights(path, state, made):
    """Write a state dict to `path` and its provenance beside it; both whole, or neither.

    state: of a WanNetwork, CausalNetwork or Codec; floats are kept in half precision. made: "kind" and "config", as
    `describe` gives them, and the provenance: "command" that made it, "seeds", "cost" (forwards, backwards, seconds),
    "figures" measured, and what else is worth keeping; the versions of torch and diffusers are added.
    Raises InputError if any of these is missing, or a weight is not finite in half precision.
    """
    path = _checked(path)
    missing = [name for name in ("kind", "config", *PROVENANCE) if name not in made]
    if missing:
        raise InputError(f"weights without {', '.join(missing)}; expected kind, config, {', '.join(PROVENANCE)}")
    if made["kind"] not in KINDS:
        raise InputError(f"weights of kind {made['kind']!r}; expected one of {', '.join(KINDS)}")
    metadata = {"format": FORMAT, "kind": made["kind"], "config": json.dumps(made["config"])}
    provenance = {"format": FORMAT} | {name: value for name, value in made.items() if name != "config"}
    provenance["versions"] = {package: version(package) for package in ("torch", "diffusers")}
    with staging_folder(path.parent) as folder:
        data = save({name: _half(name, value) for name, value in state.items()}, metadata)
        (folder / path.name).write_bytes(data)  # save_file would let nobody else read it
        (folder / path.name).with_suffix(".json").write_text(json.dumps(provenance, indent=1) + "\n")


def read_weights(path, *kinds):
    """What `save_weights` wrote: (state dict in float32, configuration, provenance).

    kinds: those expected. The provenance is {} where the weights came without it.
    Raises InputError for no such file, one cut short or not safetensors, another format or kind.
    """
    metadata, state = _read(path)
    if metadata["kind"] not in kinds:
        expected = " or ".join(map(repr, kinds))
        raise InputError(f"{path} holds weights of kind {metadata['kind']!r}; expected {expected}")
    beside = Path(path).with_suffix(".json")
    try:
        provenance = json.loads(beside.read_text()) if beside.exists() else {}
    except ValueError as problem:
        raise InputError(f"{beside} is not JSON ({problem}); expected the provenance of {path}") from None
    return state, json.loads(metadata["config"]), provenance


def describe(module):
    """What rebuilds a WanNetwork, CausalNetwork or Codec: {"kind", "config"}, for `save_weights`."""
    if isinstance(module, Codec):
        return {"kind": "codec", "config": _public(module.vae.config)}
    if isinstance(module, CausalNetwork):
        options = {"timesteps": module.timesteps, "first": module.first, "rest": module.rest}
        return {"kind": "causal", "config": _public(module.transformer.config) | options}
    if isinstance(module, WanNetwork):
        return {"kind": "wan", "config": _public(module.transformer.config) | {"timesteps": module.timesteps}}
    raise InputError(f"a {type(module).__name__}; expected a WanNetwork, a CausalNetwork or a Codec, not wrapped")


def load_codec(path):
    """The Codec kept at `path`, frozen and in eval mode."""
    state, config, _ = read_weights(path, "codec")
    return _rebuilt(lambda: Codec(AutoencoderKLWan(**config)), state, path)


def load_network(path):
    """The WanNetwork or CausalNetwork kept at `path`, frozen and in eval mode."""
    state, config, _ = read_weights(path, "wan", "causal")
    options = {name: config.pop(name) for name in ("timesteps", "first", "rest") if name in config}
    if "first" not in options:
        return _rebuilt(lambda: WanNetwork(AnyFlowTransformer3DModel(**config), **options), state, path)
    return _rebuilt(lambda: CausalNetwork(AnyFlowFARTransformer3DModel(**config), **options), state, path)


def load_into(module, state, path):
    """Load a state dict that was read from `path`; InputError names what is missing, too much or of another shape."""
    wanted = module.state_dict()
    missing, extra = ([name for name in one if name not in other] for one, other in ((wanted, state), (state, wanted)))
    if missing or extra:
        what = [
            f"{verb} {names[0]} ({len(names)} in all)" for verb, names in (("lack", missing), ("add", extra)) if names
        ]
        raise InputError(f"the weights in {path} {' and '.join(what)}; expected those of a {type(module).__name__}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            shapes = f"{tuple(value.shape)}; expected {tuple(wanted[name].shape)}"
            raise InputError(f"{name} in {path} has shape {shapes}: these weights are of another size")
    module.load_state_dict(state)


def _rebuilt(build, state, path):
    """The module, without moving the random numbers of whoever loads it."""
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
    if not value.is_floating_point():
        return value.detach().cpu().clone()
    half = value.detach().to("cpu", torch.float16, copy=True).contiguous()
    if not bool(half.isfinite().all()):
        raise InputError(f"{name} is not finite in half precision; expected trained weights below 65504")
    return half


def _checked(path):
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path.name} is not a .safetensors file; expected one: nothing is ever unpickled here")
    return path


def _read(path):
    """Metadata and tensors of a file that is whole and of our format."""
    path = _checked(path)
    if not path.is_file():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.safetensors"))) or "none"
        raise InputError(f"no weights {path.name} in {path.parent}; those there are: {there}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        size, whole = path.stat().st_size, _whole_size(path)
        expected = f"{whole} bytes, by its own header" if whole else "a safetensors file"
        raise InputError(f"{path} has {size} bytes; expected {expected}: fetch or make it again") from None
    if metadata.get("format") != FORMAT or not {"kind", "config"} <= set(metadata):
        raise InputError(f"{path} has format {metadata.get('format', 'unknown')!r}; expected {FORMAT!r}: make it again")
    return metadata, {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _whole_size(path):
    """The bytes a safetensors file says it has: 8, its header, its tensors; None if it does not say."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length < path.stat().st_size else b"")
            return 8 + length + max(tensor["data_offsets"][1] for name, tensor in header.items() if name[0] != "_")
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def fingerprint(source):
    """Which weights these are, a short text, wherever they lie and whichever files they are spread over.

    source: a safetensors file, a folder of them or a pipeline's; a name on the hub is its own. Of every tensor its
    name, kind, shape and a few values at either end are read, so that it takes no time: any training moves those.
    """
    path = Path(source)
    if not path.exists():
        return str(source)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    digest, tensors = hashlib.sha256(), {}
    try:
        for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
            opened = safe_open(file, "pt")
            tensors |= dict.fromkeys(opened.keys(), opened)
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            digest.update(json.dumps({k: v for k, v in config.items() if k[0] != "_"}, sort_keys=True).encode())
        for name, opened in sorted(tensors.items()):
            tensor = opened.get_tensor(name)
            flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
            ends = SAMPLED * tensor.element_size()
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(torch.cat([flat[:ends], flat[-ends:]]).numpy().tobytes())
    except (SafetensorError, OSError, ValueError) as problem:
        raise InputError(f"the weights in {source} cannot be read ({problem}); fetch or make them again") from None
    return f"weights {digest.hexdigest()[:12]}" if tensors else str(source)
