"""Wan2.1 in the folder layout of diffusers, from a folder or the hub; and a tiny one of the same layout, for tests.

Wan and released AnyFlow weights load into the two-time classes. Weights that Wan does not have, the embedder of the
target time and a causal model's coarse patches, start as copies, so that at r = t nothing changes. Weights are read
from safetensors alone: nothing is unpickled. Shapes:
    video      (B, T, 3, H, W) in [0, 1], T = 4 n + 1 frames
    latents    (B, F, C, H / 8, W / 8), F = n + 1, normalised by mean and spread from the codec's configuration
"""

import contextlib
import inspect
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NotRequired

import diffusers
import ftfy  # noqa: F401  without it diffusers cleans prompts otherwise than Wan's own code
import torch
import transformers
from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoTokenizer, ByT5Tokenizer, PretrainedConfig, UMT5Config, UMT5EncoderModel
from typing_extensions import TypedDict

from minianyflow.networks.causal import coarse_patches
from minianyflow.networks.patches import StreamDecoder
from minianyflow.networks.weights import check_floats
from minianyflow.support.checks import check_finite
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import new_folder, read_json
from minianyflow.times import generator
from minianyflow.wan.data.latents import write_latents
from minianyflow.wan.data.write_video import write_clip

LENGTH = 512  # tokens of a prompt, in Wan's pipelines and its training
CLASSES = {"bidirectional": AnyFlowTransformer3DModel, "causal": AnyFlowFARTransformer3DModel}
SOURCES = {"WanTransformer3DModel": "Wan"} | {kind.__name__: name for name, kind in CLASSES.items()}
PIPELINES = {"WanPipeline": "Wan", "AnyFlowPipeline": "bidirectional", "AnyFlowFARPipeline": "causal"}
RENAMED = {  # names that AnyFlow's first releases have in their metadata; the weights are those of diffusers' classes
    "WanAnyFlowPipeline": "AnyFlowPipeline",
    "FARWanAnyFlowPipeline": "AnyFlowFARPipeline",
    "FlowMapDiscreteScheduler": "FlowMapEulerDiscreteScheduler",
}
SCHEDULERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
SCHEDULERS += ("FlowMatchEulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler")
RENAMED_TRANSFORMER = "FAR_Wan_Transformer3DModel"  # of either architecture


class Index(TypedDict):
    """The fields of model_index.json that are read here."""

    _class_name: NotRequired[str]
    transformer: NotRequired[list[str | None] | None]


TEXT_ENCODERS = ("UMT5EncoderModel", "T5EncoderModel")
NEW_TIME, NEW_PATCH = "condition_embedder.delta_embedder.", "far_patch_embedding."
PARTS = {
    "tokenizer": AutoTokenizer,
    "text_encoder": UMT5EncoderModel,
    "vae": AutoencoderKLWan,
    "scheduler": UniPCMultistepScheduler,  # or the class that its configuration names
}


# Loading


def load_transformer(
    source: str | Path,
    architecture: str,
    dtype: torch.dtype | None = None,
    full_chunk_limit: int | None = None,
    partition: tuple[int, ...] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The transformer in `source`, of the class with two times for `architecture`, in eval mode.

    source: a pipeline folder, a transformer's own or a name on the hub, of Wan2.1 text to video or AnyFlow. dtype: of
    the weights; those that the class keeps in float32 stay so, and the target time's embedder with its twin.
    full_chunk_limit, partition: of a causal one; None takes the source's, or what AnyFlow published.
    Raises InputError for another architecture (Wan and bidirectional weights may become causal, nothing else changes),
    for weights that lack or add more than a new embedder and coarse patches, and for files that contradict each other.
    """
    kind, place = choose("architecture", architecture, CLASSES), _place(source, "transformer")
    config = _transformer_config(source)
    name = class_name(config)
    if config.get("image_dim"):
        raise InputError(f"{source} takes an image beside the text; expected a text-to-video model")
    source_kind = SOURCES[name]
    _check_neighbours(Path(source), config)
    if source_kind == "causal" != architecture:
        raise InputError(f"{source} is causal; expected Wan or a bidirectional one: set architecture=causal")
    if architecture == "causal":  # older configurations have none
        default = inspect.signature(kind.__init__).parameters["chunk_partition"].default
        partition = partition or config.get("chunk_partition") or default
    chunks = {"full_chunk_limit": full_chunk_limit, "chunk_partition": partition} if architecture == "causal" else {}
    options = {name: value for name, value in chunks.items() if value is not None} | {"torch_dtype": dtype, **place}
    new = (NEW_TIME,) * (source_kind == "Wan") + (NEW_PATCH,) * (architecture == "causal" != source_kind)
    transformer = _load_whole(source, "transformer", kind, options, name, new)
    _start_new(transformer, new)
    # Options of Wan that the class does not take go, and so does the folder it was loaded from: folders are passed on.
    options = {*inspect.signature(kind.__init__).parameters, "_class_name", "_diffusers_version"}
    transformer._internal_dict = FrozenDict({k: value for k, value in transformer.config.items() if k in options})
    return transformer.to(device) if device else transformer


def _transformer_config(source):
    place = _place(source, "transformer")
    config = configuration(source, "transformer", lambda: WanTransformer3DModel.load_config(**place))
    if class_name(config) not in SOURCES:
        raise InputError(f"{source} holds a {class_name(config)}; expected one of {', '.join(SOURCES)}")
    return config


def base_class(source: str | Path) -> str:
    """What the transformer in `source` is: "Wan", "bidirectional" or "causal"."""
    return SOURCES[class_name(_transformer_config(source))]


def class_name(config: Mapping) -> str | None:
    """The class that a configuration of diffusers names, an older name of AnyFlow's as that of today."""
    name = config.get("_class_name")
    if name == RENAMED_TRANSFORMER:
        causal = config.get("init_far_model") or config.get("chunk_partition")
        return CLASSES["causal" if causal else "bidirectional"].__name__
    return RENAMED.get(name, name)


def _check_neighbours(folder, config):
    """Raise InputError, which names both files, if a file beside a transformer contradicts its configuration."""
    files = [folder / name for name in ("model_index.json", "vae/config.json", "text_encoder/config.json")]
    schemas, again = (Index, dict, dict), "fetch or make it again"
    index, vae, text = (read_json(f, again, s) if f.is_file() else {} for f, s in zip(files, schemas, strict=True))
    own = class_name(config)
    of_index = class_name(config | {"_class_name": (index.get("transformer") or [None, config["_class_name"]])[1]})
    for file, found, key, mine, fits in (
        (files[0], index, "_class_name", "_class_name", PIPELINES.get(class_name(index)) in (None, SOURCES[own])),
        (files[0], index, "transformer", "_class_name", of_index == own),
        (files[1], vae, "z_dim", "in_channels", vae.get("z_dim") in (None, config.get("in_channels"))),
        (files[2], text, "d_model", "text_dim", text.get("d_model") in (None, config.get("text_dim"))),
    ):
        if not fits:
            said = f"{file} has {key} {found[key]}, {folder}/transformer/config.json {mine} {config.get(mine)}"
            raise InputError(f"{said}; expected parts of one pipeline: fetch or make it again")


@torch.no_grad()
def _start_new(transformer, new):
    """Give weights that a source does not have their start; they hold no numbers until then."""
    start = {}
    if NEW_TIME in new:
        embedder = transformer.condition_embedder.time_embedder.state_dict()
        dtype = transformer.patch_embedding.weight.dtype  # the class does not keep it in float32 as it does its twin
        start = {NEW_TIME + name: value.to(dtype, copy=True) for name, value in embedder.items()}
    if NEW_PATCH in new:
        start |= coarse_patches(transformer.patch_embedding, tuple(transformer.config.compressed_patch_size))
    transformer.load_state_dict(start, strict=False, assign=True)


def load_parts(source: str | Path, *names: str, dtype: torch.dtype | None = None) -> list:
    """The named parts of a pipeline, in that order: tokenizer, text_encoder, vae, scheduler.

    dtype: of the text encoder; the codec is always float32, as Wan's is. Modules are frozen and in eval mode.
    """
    return [_load_part(source, name, dtype) for name in names]


def _load_part(source, name, dtype):
    kind, place = choose("part", name, PARTS), _place(source, name, bare=False)
    if name == "scheduler":
        found = class_name(configuration(source, name, lambda: kind.load_config(**place)))
        if found not in SCHEDULERS:
            raise InputError(f"the scheduler in {source} is a {found}, which is no scheduler of Wan's or AnyFlow's")
        return load(source, name, lambda: getattr(diffusers, found).from_pretrained(**place))
    if name == "tokenizer":
        return load(source, name, lambda: kind.from_pretrained(**place, trust_remote_code=False))
    if name == "text_encoder":
        kind = _text_encoder_class(source)
        found = configuration(source, name, lambda: PretrainedConfig.get_config_dict(**place)[0])
        _check_no_code(found, f"{source}/{name}")
    options = {"torch_dtype": torch.float32} if name == "vae" else {"dtype": dtype or torch.float32}
    return _load_whole(source, name, kind, options | place, kind.__name__).eval().requires_grad_(False)


def _check_no_code(content, path):
    for key in ("_attn_implementation", "attn_implementation", "auto_map", "kernel_config", "quantization_config"):
        if content.get(key) not in (None, "eager", "sdpa"):
            found = f"{path} names {key} {content[key]}, which is not loaded"
            raise InputError(f"{found}; expected Wan2.1 or AnyFlow without own code")


def _text_encoder_class(source):
    """The class that model_index.json names; where there is no such file, Wan's."""
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        return UMT5EncoderModel
    index = load(source, "pipeline", lambda: diffusers.DiffusionPipeline.load_config(source))
    found = str((index.get("text_encoder") or [None, UMT5EncoderModel.__name__])[1])
    if found not in TEXT_ENCODERS:
        raise InputError(f"the text_encoder in {source} is a {found}; expected {' or '.join(TEXT_ENCODERS)}")
    return getattr(transformers, found)


def codec_factor(source: str | Path) -> int:
    """Pixels per side of a latent, from the configuration of a source's codec; its weights are not loaded."""
    place = _place(source, "vae", bare=False)
    found = configuration(source, "vae", lambda: AutoencoderKLWan.load_config(**place))
    return found.get("scale_factor_spatial", 8)


def _load_whole(source, name, kind, options, class_name, new=()):
    """A module from its finite weights. Raises InputError if any lack but those that start with `new`, or are more."""
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    module, info = load(source, name, lambda: kind.from_pretrained(**options))
    for key, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"{key} {tuple(found)}, but {tuple(expected)} by its config.json"
        raise InputError(f"the weights of the {name} in {source} have {shapes}; fetch or make both again")
    if is_folder(place := options["pretrained_model_name_or_path"]):
        check_floats(place)
    weights = module.state_dict()
    hollow = {key for key, weight in weights.items() if weight.is_meta}  # an index names a file without them
    lacking = [name for name in hollow | {*info["missing_keys"]} if not name.startswith(tuple(new))]
    for verb, names in (("lack", lacking), ("add", info["unexpected_keys"])):
        if names:
            what = f"{verb} {min(names)} ({len(names)} in all)"
            raise InputError(f"the weights in {source} {what}; expected those of a {class_name}")
    for key, weight in weights.items():
        if key not in info["missing_keys"] and not weight.is_meta:
            check_finite(f"{key} of the {name} in {source}", weight, "fetch or make it again")
    return module


def _place(source, name, bare=True):
    """The place of a part for from_pretrained. bare: a folder of the part alone will do."""
    folder = Path(source)
    if not is_folder(source):
        return {"pretrained_model_name_or_path": str(source), "subfolder": name}
    if (folder / name).is_dir():
        return {"pretrained_model_name_or_path": str(folder / name)}
    if bare and (folder / "config.json").is_file():
        return {"pretrained_model_name_or_path": str(folder)}
    folders = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no folders"
    raise InputError(f"no {name} in {source}; expected a pipeline folder, which has it beside others; found {folders}")


def is_folder(source: str | Path, expected="a pipeline folder, or a name on the hub like owner/model") -> bool:
    """Whether `source` is a folder, and not a name on the hub like owner/model. Raises InputError for anything else."""
    if Path(source).is_dir():
        return True
    if Path(source).exists() or str(source).count("/") != 1 or str(source)[0] in "./~":
        raise InputError(f"no folder {source}; expected {expected}")
    return False


def load(source: str | Path, name: str, action: Callable):
    """action(), quiet; what diffusers, transformers and the hub raise for a broken source becomes one line."""
    try:
        with quiet():
            return action()
    except Exception as problem:
        why = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        cause = problem
        while cause := cause.__cause__ or cause.__context__:  # diffusers says that the hub lacks a file
            if isinstance(cause, LocalEntryNotFoundError):
                why = "the hub is not reached, and it was not fetched before"
        todo = "fetch or make it again" if Path(source).is_dir() else "check the name and the network, or give a folder"
        raise InputError(f"the {name} of {source} does not load ({why}); {todo}") from None


def configuration(source: str | Path, name: str, action: Callable) -> dict:
    """`load` of a configuration, which other libraries take as it is: InputError unless it has names and values."""
    found = load(source, name, action)
    if not isinstance(found, dict):
        raise InputError(f"the configuration of the {name} of {source} is {found!r}; expected {{name: value}}")
    return found


@contextlib.contextmanager
def quiet():
    """No warnings, logs and bars of libraries: missing weights and unknown options are checked after it."""
    before, bars = logging.root.manager.disable, transformers.utils.logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()


# Text and video to and from what the transformer sees


@torch.no_grad()
def encode_prompts(tokenizer: Callable, text_encoder: nn.Module, prompts: list[str], length: int = LENGTH) -> Tensor:
    """Embeddings (B, length, D) as Wan's pipelines make them: cleaned, cut at `length` tokens, zero beyond the end."""
    if not prompts or isinstance(prompts, str):
        raise InputError(f"prompts {prompts!r}; expected a list of at least one text")
    tokens = tokenizer(
        [prompt_clean(prompt) for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    return text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask[..., None]


def count_tokens(tokenizer: Callable, prompt: str) -> int:
    """The tokens that a prompt takes, as `encode_prompts` cuts them."""
    return len(tokenizer(prompt_clean(prompt)).input_ids)


def embed(source: str | Path, prompts: list[str], length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`encode_prompts` by the parts of `source`, which do not stay in memory: UMT5 is larger than the 1.3B model."""
    tokenizer, text_encoder = load_parts(source, "tokenizer", "text_encoder", dtype=dtype)
    return encode_prompts(tokenizer, text_encoder.to(device), prompts, length)


@torch.no_grad()
def encode_video(vae: nn.Module, video: Tensor) -> Tensor:
    """Video (B, T, 3, H, W) in [0, 1] to normalised latents (B, F, C, h, w), clip by clip."""
    shape, factor = video.shape, vae.config.scale_factor_spatial
    if len(shape) != 5 or shape[2] != 3 or shape[1] % 4 != 1 or shape[3] % factor or shape[4] % factor:
        expected = f"(B, T, 3, H, W) with T = 4 n + 1, H and W multiples of {factor}"
        raise InputError(f"video {tuple(shape)}; expected {expected}")
    clips = (2 * video - 1).transpose(1, 2).to(vae.dtype).split(1)
    latents, (mean, std) = torch.cat([vae.encode(clip).latent_dist.mode() for clip in clips]), _scale(vae)
    return ((latents - mean) / std).transpose(1, 2).contiguous()


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: Tensor, batch: int = 1) -> Tensor:
    """Normalised latents (B, F, C, h, w) to video (B, T, 3, H, W), clipped to [0, 1], `batch` clips at a time."""
    mean, std = _scale(vae)
    clips = [vae.decode(clip.transpose(1, 2).to(mean) * std + mean).sample for clip in latents.split(batch)]
    return ((torch.cat(clips) + 1) / 2).clamp(0, 1).transpose(1, 2)


def stream_decoder(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """`decode_latents` for clips that come in pieces: each call goes on where the one before stopped."""
    (mean, std), decoder = _scale(vae), StreamDecoder(vae)
    return lambda latents: ((decoder(latents.transpose(1, 2).to(mean) * std + mean) + 1) / 2).transpose(1, 2)


def _scale(vae):
    """Mean and spread of raw latents, (1, C, 1, 1, 1) each."""
    return mean_and_spread(vae.config).to(vae.device, vae.dtype).view(2, 1, -1, 1, 1, 1)


def mean_and_spread(config: dict) -> Tensor:
    """Mean and spread of raw latents in a codec's configuration, (2, C). Raises InputError where they are not."""
    count = config.get("z_dim", 16)
    for name in ("latents_mean", "latents_std"):
        numbers = config.get(name)
        if not isinstance(numbers, (list, tuple)) or len(numbers) != count:
            found = f"{len(numbers)} numbers" if isinstance(numbers, (list, tuple)) else json.dumps(numbers)
            raise InputError(f"{name} in the codec's config.json is {found}; expected {count}: fetch it again")
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise InputError(f"{name} in the codec's config.json holds {numbers}; expected numbers: fetch it again")
    return torch.tensor([config["latents_mean"], config["latents_std"]], dtype=torch.float64)


# A tiny Wan, of random weights

TINY_LENGTH = 32  # tokens of a prompt
TINY_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2}
TINY_TEXT = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 1, "dropout_rate": 0.0}
TINY_TEXT |= {"vocab_size": 304}  # ByT5 takes 259
TINY_CODEC = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}  # 16 channels and all factors are Wan's
WAN22_CODEC = {"z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}
WAN22_CODEC |= {"decoder_base_dim": 8, "scale_factor_spatial": 16, "scale_factor_temporal": 4}
COLOURS = {"red": (1, 0.2, 0.2), "green": (0.2, 1, 0.2), "blue": (0.2, 0.2, 1), "yellow": (1, 1, 0.2)}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def make_tiny_wan(
    folder: str | Path, seed: int = 0, clips: int = 16, null: str = "", videos: bool = False, wan22: bool = False
) -> None:
    """Write a pipeline folder in Wan2.1's layout, tiny and random, and `latents/` in it: `clips` captioned clips.

    wan22: with the codec and the channels of Wan2.2-TI2V-5B. Every caption works; TINY_LENGTH is the prompt length of
    the latents. null: the text of the null prompt, which for Wan itself is its long negative prompt. videos: the clips
    as mp4 files, too, in `videos/`, and `captions.jsonl`.
    `folder` must not exist or be empty; whole or not at all.
    """
    with new_folder(folder) as inside, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        captions, video = moving_shapes(clips, generator(seed))
        tokenizer = ByT5Tokenizer(extra_ids=0)  # a token per byte
        text_encoder = UMT5EncoderModel(UMT5Config(**TINY_TEXT)).eval()
        codec = TINY_CODEC | (WAN22_CODEC if wan22 else {})
        channels = codec.get("z_dim", 16)
        vae = AutoencoderKLWan(**codec, latents_mean=[0.0] * channels, latents_std=[1.0] * channels).eval()
        raw = encode_video(vae, video)
        mean, std = raw.mean((0, 1, 3, 4)), raw.std((0, 1, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        latents = (raw - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        sizes = TINY_TRANSFORMER | {"in_channels": channels, "out_channels": channels}
        transformer = WanTransformer3DModel(text_dim=TINY_TEXT["d_model"], freq_dim=64, **sizes)
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        with quiet():
            parts = tokenizer, text_encoder, vae, scheduler, transformer
            WanPipeline(*parts, expand_timesteps=wan22).save_pretrained(inside)
        prompts = encode_prompts(tokenizer, text_encoder, [*captions, null], TINY_LENGTH)
        write_latents(inside / "latents", latents, prompts[:-1], prompts[-1:], captions, null)
        if videos:
            (inside / "videos").mkdir()
            lines = [{"file": f"{number:02}.mp4", "caption": caption} for number, caption in enumerate(captions)]
            (inside / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            for line, clip in zip(lines, video, strict=True):
                write_clip(inside / "videos" / line["file"], clip)


def moving_shapes(count: int, source: torch.Generator, frames: int = 17, size: int = 64) -> tuple[list[str], Tensor]:
    """Captions, and videos (count, frames, 3, size, size) of a square or a disc that crosses a grey picture."""
    kind, colour, way = (torch.randint(n, (count,), generator=source).tolist() for n in (2, len(COLOURS), len(WAYS)))
    start = torch.rand(count, 2, generator=source) * 0.4 - 0.2
    pixel = torch.linspace(-1, 1, size)
    captions, videos = [], []
    for number in range(count):
        name, step = list(WAYS.items())[way[number]]
        shade, paint = list(COLOURS.items())[colour[number]]
        path = start[number] + torch.linspace(-0.5, 0.5, frames)[:, None] * torch.tensor(step)  # (T, 2)
        apart = (pixel - path[..., None]).abs()  # (T, 2, size)
        x, y = apart[:, 0, None, :], apart[:, 1, :, None]
        reach = (x.square() + y.square()).sqrt() if kind[number] else torch.maximum(x, y)
        inside = (20 * (0.35 - reach)).sigmoid()[:, None]  # (T, 1, size, size), soft at the edge
        videos.append(0.3 + inside * (torch.tensor(paint).view(3, 1, 1) - 0.3))
        captions.append(f"a {shade} {('square', 'disc')[kind[number]]} moves {name}")
    return captions, torch.stack(videos)
