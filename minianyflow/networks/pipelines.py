"""Export to diffusers: a network trained here as a pipeline folder that stock diffusers loads and samples.

A WanNetwork becomes an AnyFlowPipeline, a CausalNetwork an AnyFlowFARPipeline. Their latents are channels first:
(B, C, F, H, W).
"""

import copy
import json
from itertools import count
from pathlib import Path

import diffusers
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, DiffusionPipeline, FlowMapEulerDiscreteScheduler

from minianyflow.networks.causal import CausalNetwork
from minianyflow.networks.causal_attention import CausalAttention, chunk_partition
from minianyflow.networks.codec import Codec
from minianyflow.networks.wan import PROMPT_LENGTH, TextEncoder, WanNetwork
from minianyflow.support.errors import InputError
from minianyflow.support.files import new_folder
from minianyflow.times import time_grid

FRAMES = 5  # latent frames of a clip of 17
BLOBS = {"height": 16, "width": 16, "num_frames": 17, "num_inference_steps": 4, "max_sequence_length": PROMPT_LENGTH}
README = """# {name}

{what}, trained with minianyflow: any number of steps will do.
It is a complete `{pipeline}`: diffusers ({version} or newer) loads it as it is.

```python
from diffusers import {pipeline}
{imports}
pipeline = {pipeline}.from_pretrained("{name}")
{attention}video = pipeline(
    {prompt}, {options}
).frames[0]
```
{causal}"""
CAUSAL = {  # what the README of a causal pipeline adds
    "imports": "from minianyflow.networks.causal_attention import CausalAttention\n",
    "attention": """for block in pipeline.transformer.blocks:
    block.attn1.set_processor(CausalAttention())
""",
    "causal": """
Without minianyflow leave out its import and the loop over blocks: diffusers' own attention then pads the keys of a
chunk with zeros and lets the chunk see them, which the network was not trained with.
""",
}


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
) -> None:
    """Write a pipeline of diffusers to `folder`, with a README that loads it; whole or not at all.

    what: one line on what it generates. prompt, options: of the call in the README. notes: more text for the README.
    files: {name: text} to write beside. Raises InputError as `save_pipeline`.
    """
    with new_folder(folder) as inside:
        pipeline.save_pretrained(inside)
        for name, text in (files or {}).items():
            (inside / name).write_text(text, "utf-8")
        kind = type(pipeline).__name__
        text = README.format(
            name=Path(folder).name,
            pipeline=kind,
            what=what,
            version=diffusers.__version__,
            prompt=json.dumps(prompt, ensure_ascii=False),
            options=", ".join(f"{name}={value}" for name, value in options.items()),
            **(CAUSAL if kind == AnyFlowFARPipeline.__name__ else dict.fromkeys(CAUSAL, "")),
        )
        write_readme(inside, text, notes, provenance)


def write_readme(folder: Path, text: str, notes: str = "", provenance: dict | None = None) -> None:
    """Write README.md: the text, the notes, and how it was made."""
    made = f"How it was made:\n\n```json\n{json.dumps(provenance, indent=1)}\n```" if provenance else ""
    (folder / "README.md").write_text("\n\n".join(filter(None, (text.strip(), notes, made))) + "\n")


def load_pipeline(folder: str | Path) -> AnyFlowPipeline | AnyFlowFARPipeline:
    """The stock pipeline in `folder`; a causal one with our attention, which has no padded keys.

    Raises InputError for a folder without a pipeline, with another one, or with one that diffusers cannot load.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as problem:  # diffusers and transformers raise anything for a broken folder
        why = str(problem).strip().partition("\n")[0]
        raise InputError(f"{folder} does not load ({why}); expected a folder that save_pipeline wrote") from None
    if not isinstance(pipeline, AnyFlowPipeline | AnyFlowFARPipeline):
        kind = type(pipeline).__name__
        raise InputError(f"{folder} holds a {kind}; expected an AnyFlowPipeline or an AnyFlowFARPipeline")
    if isinstance(pipeline, AnyFlowFARPipeline):
        for block in pipeline.transformer.blocks:
            block.attn1.set_processor(CausalAttention())
    return pipeline


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
