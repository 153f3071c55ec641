"""Export to diffusers: a network trained here as a pipeline folder that stock diffusers loads and samples.

A WanNetwork becomes an AnyFlowPipeline, a CausalNetwork an AnyFlowFARPipeline. Their latents are channels first:
(B, C, F, H, W).
"""

import copy
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from shutil import copyfile

import diffusers
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
)
from huggingface_hub import ModelCardData
from torch import nn

from minianyflow.networks import far_pipeline
from minianyflow.networks.causal import CausalNetwork
from minianyflow.networks.causal_attention import chunk_partition
from minianyflow.networks.codec import Codec
from minianyflow.networks.wan import PROMPT_LENGTH, TextEncoder, WanNetwork
from minianyflow.networks.weights import check_floats
from minianyflow.support.checks import check_finite
from minianyflow.support.errors import InputError
from minianyflow.support.files import new_folder
from minianyflow.times import time_grid

FRAMES = 5  # latent frames of a clip of 17
BLOBS = {"height": 16, "width": 16, "num_frames": 17, "num_inference_steps": 4, "max_sequence_length": PROMPT_LENGTH}
README = """# {name}

{what}, trained with minianyflow: any number of steps will do. It needs nothing of it:

```sh
pip install "diffusers>={version}" torch transformers accelerate ftfy imageio imageio-ffmpeg{peft}
```

```python
{lines}
```

`video=` takes first frames to start from, (1, T, 3, H, W) in [0, 1]. `minianyflow sample --seed 0` makes these latents.
{padding}"""
LINES = """import torch
from diffusers import {imports}
from diffusers.utils import export_to_video
{before}
pipeline = {loader}.from_pretrained({source}, torch_dtype={dtype}{custom})
{after}pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
video = pipeline(
    {prompt}, {options}, generator=torch.Generator().manual_seed(0)
).frames[0]
export_to_video(video, "video.mp4", fps={fps})"""
PADDING = """
`pipeline.py` is part of this folder: diffusers' own attention pads the keys of a chunk with zeros and lets the chunk
see them, which the network was not trained with. For another `num_frames` give `chunk_partition=` of its latents.
"""


def save_pipeline(
    folder: str | Path,
    network: WanNetwork | CausalNetwork,
    codec: Codec,
    text: TextEncoder,
    shift: float = 1.0,
    provenance: dict | None = None,
    stage: str = "forward",
) -> None:
    """Write a complete pipeline to `folder`, which must not exist or be empty; whole or not at all.

    shift: the time shift that it samples with. provenance: as `weights.read_weights` returns it, for the README.
    stage: "teacher" for a velocity without target time, which `minianyflow sample` follows by Euler's method.
    Raises InputError for a folder with something in it, or parts that do not fit together.
    """
    time_grid(1, shift)  # says what is wrong with a shift
    pipeline = _assemble(network, codec, text, _scheduler(network, shift))
    clip = {"frames": 17, "height": 16, "width": 16, "length": PROMPT_LENGTH}
    files = {"minianyflow.json": json.dumps({"stage": stage, "clip": clip}, indent=1) + "\n"}
    what = "A flow map u(z, t, r) for 16 x 16 videos of 17 frames"
    write_pipeline(folder, pipeline, what, "two balls", BLOBS, provenance, files=files)


def write_pipeline(
    folder: str | Path,
    pipeline: DiffusionPipeline,
    what: str,
    prompt: str,
    options: dict,
    provenance: dict | None = None,
    notes: str = "",
    files: dict[str, str] | None = None,
    fps: int = 16,
    **card: object,
) -> None:
    """Write a pipeline of diffusers to `folder`, with a README that loads it; whole or not at all.

    what: one line on what it generates. prompt, options: of the call in the README. notes: more text for the README.
    files: {name: text} to write beside. card: as `write_readme` takes it. Raises InputError as `save_pipeline`.
    """
    with new_folder(folder) as inside:
        pipeline.save_pretrained(inside)
        for name, text in (files or {}).items():
            (inside / name).write_text(text, "utf-8")
        kind, name = type(pipeline), Path(folder).name
        dtype = str(pipeline.transformer.dtype)
        write_readme(
            inside, kind, what, stock_lines(kind, name, prompt, options, dtype, fps=fps), notes, provenance, **card
        )


def stock_lines(
    kind: type,
    name: str,
    prompt: str,
    options: dict,
    dtype: str,
    before: str = "",
    imports: Sequence[str] = (),
    fps: int = 16,
) -> str:
    """The lines that sample the export `name`, an AnyFlow(FAR)Pipeline as `kind` says, in diffusers alone.

    options: of the call. before: of a LoRA, lines that make `transformer` and `scheduler` of its `base`.
    """
    causal = kind is AnyFlowFARPipeline
    loader = "DiffusionPipeline" if causal else kind.__name__
    return LINES.format(
        imports=", ".join(sorted([loader, *imports])),
        before=before,
        loader=loader,
        source="base, transformer=transformer, scheduler=scheduler" if before else json.dumps(name),
        dtype=dtype if dtype == "torch.float32" else f'{{"default": {dtype}, "vae": torch.float32}}',
        custom=f', custom_pipeline="{name}", trust_remote_code=True' if causal else "",
        after=f'pipeline.load_lora_weights("{name}")\n' if before else "",
        prompt=json.dumps(prompt, ensure_ascii=False),
        options=", ".join(f"{option}={value}" for option, value in options.items()),
        fps=fps,
    )


def write_readme(
    folder: Path,
    kind: type,
    what: str,
    lines: str,
    notes: str = "",
    provenance: dict | None = None,
    sheet: Path | None = None,
    **card: object,
) -> None:
    """Write README.md, a model card, and what its lines load.

    lines: `stock_lines`. sheet: a picture of samples. card: its metadata, as huggingface_hub.ModelCardData takes it.
    """
    causal = kind is AnyFlowFARPipeline
    if causal:
        copyfile(far_pipeline.__file__, folder / "pipeline.py")
    text = README.format(
        name=folder.name,
        what=what,
        version=diffusers.__version__,
        peft=" peft" if "load_lora" in lines else "",
        lines=lines,
        padding=PADDING if causal else "",
    )
    made = f"How it was made:\n\n```json\n{json.dumps(provenance, indent=1)}\n```" if provenance else ""
    if sheet:
        copyfile(sheet, folder / "sheet.png")
    picture = "![Samples: a block per prompt, a row per number of steps](sheet.png)" if sheet else ""
    parts = filter(None, (text.strip(), picture, notes, made))
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-video", **card)
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n", "utf-8")


def load_lora(transformer: nn.Module, folder: str | Path) -> None:
    """Put the adapter in `folder` on a transformer, as diffusers does. Raises InputError for one that does not fit."""
    kind = AnyFlowFARPipeline if isinstance(transformer, AnyFlowFARTransformer3DModel) else AnyFlowPipeline
    try:
        kind(None, None, transformer, None, None).load_lora_weights(folder, use_safetensors=True, local_files_only=True)
    except Exception as problem:  # diffusers and peft raise any kind of error for a file they cannot use
        why = " ".join(str(problem).split())[:200]
        raise InputError(f"the adapter in {folder} does not load ({why}); name the base that it was made for") from None
    check_floats(folder)
    for name, weight in transformer.named_parameters():
        if "lora_" in name:
            check_finite(f"{name} in {folder}", weight, "fetch or make it again")


def _scheduler(network, shift):
    """A scheduler that counts time as the network does."""
    timesteps = getattr(network, "timesteps", 1000)
    if timesteps != int(timesteps):
        raise InputError(f"time counted to {timesteps}; expected a whole number, which is what a scheduler can hold")
    return FlowMapEulerDiscreteScheduler(int(timesteps), float(shift))


def _assemble(network, codec, text, scheduler):
    """The pipeline in memory, of parts that fit."""
    if not isinstance(network, WanNetwork | CausalNetwork):
        raise InputError(f"a {type(network).__name__}; expected a WanNetwork or a CausalNetwork, not wrapped")
    config = network.transformer.config
    for what, found, expected in (
        ("latent channels", config.in_channels, codec.vae.config.z_dim),
        ("wide prompt embeddings", config.text_dim, text.encoder.config.d_model),
    ):
        if found != expected:
            raise InputError(f"a transformer for {found} {what}; expected {expected}, as the codec and text have")
    parts = {"tokenizer": text.tokenizer, "text_encoder": text.encoder, "vae": codec.vae, "scheduler": scheduler}
    if isinstance(network, WanNetwork):
        return AnyFlowPipeline(transformer=network.transformer, **parts)
    return AnyFlowFARPipeline(transformer=_in_chunks(network), **parts)


def _in_chunks(network):
    """The transformer with the network's own chunks in its configuration: a pipeline reads them there."""
    transformer, first, rest = network.transformer, network.first, network.rest
    frames = next(number for number in count(max(FRAMES, first)) if (number - first) % rest == 0)
    partition = chunk_partition(frames, first, rest)
    if tuple(transformer.config.chunk_partition) == tuple(partition):
        return transformer
    transformer = copy.deepcopy(transformer)
    transformer.register_to_config(chunk_partition=tuple(partition))
    return transformer
