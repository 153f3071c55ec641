"""Out to diffusers: any network trained here as a pipeline folder that stock diffusers loads and samples.

A WanNetwork becomes an AnyFlowPipeline, a CausalNetwork an AnyFlowFARPipeline. A pipeline has its latents the other way
round, channels first: (B, C, F, H, W).
"""

import copy
import json
from itertools import count
from pathlib import Path

import diffusers
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, FlowMapEulerDiscreteScheduler

from minianyflow.networks.causal import CausalNetwork
from minianyflow.networks.causal_attention import CausalAttention, chunk_partition
from minianyflow.networks.wan import PROMPT_LENGTH, WanNetwork
from minianyflow.support.errors import InputError
from minianyflow.support.files import new_folder
from minianyflow.times import time_grid

FRAMES = 5  # latent frames of a clip of 17
BLOBS = {"height": 16, "width": 16, "num_frames": 17, "max_sequence_length": PROMPT_LENGTH}
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
{causal}{notes}{provenance}"""
IMPORTS = "from minianyflow.networks.causal_attention import CausalAttention\n"
ATTENTION = """for block in pipeline.transformer.blocks:
    block.attn1.set_processor(CausalAttention())
"""
CAUSAL = """
Without minianyflow leave out its import and the loop over blocks: diffusers' own attention then pads the keys of a
chunk with zeros and lets the chunk see them, which the network was not trained with.
"""


def save_pipeline(folder, network, codec, text, shift=1.0, made=None, stage="forward"):
    """Write a complete pipeline to `folder`, which must not exist or be empty; whole or not at all.

    network: WanNetwork or CausalNetwork. codec: Codec. text: TextEncoder. shift: the time shift it samples with.
    made: its provenance, as `weights.read_weights` returns it, for the README. stage: "teacher" for a velocity alone,
    which our scripts then follow by Euler's method.
    Raises InputError for a folder with something in it, or parts that do not fit together.
    """
    time_grid(1, shift)  # says what is wrong with a shift
    pipeline = _assemble(network, codec, text, _scheduler(network, shift))
    known = {"stage": stage, "clip": {"frames": 17, "height": 16, "width": 16, "length": PROMPT_LENGTH}}
    files = {"minianyflow.json": json.dumps(known, indent=1) + "\n"}
    what = "A flow map u(z, t, r) for 16 x 16 videos of 17 frames"
    write_pipeline(folder, pipeline, what, "two balls", BLOBS, made, files=files)


def write_pipeline(folder, pipeline, what, prompt, options, made=None, notes="", files=None):
    """Write a pipeline of diffusers to `folder`, with a README that loads it; whole or not at all.

    what: one line on what it makes. prompt, options: of the call in the README. notes: what else there is to say there.
    files: {name: text} to be put beside. Raises InputError as `save_pipeline`.
    """
    with new_folder(folder) as inside:
        pipeline.save_pretrained(inside)
        for name, text in (files or {}).items():
            (inside / name).write_text(text)
        name, kind = Path(folder).name, type(pipeline).__name__
        (inside / "README.md").write_text(_readme(name, kind, what, prompt, options, made, notes))


def load_pipeline(folder):
    """The stock pipeline in `folder`; a causal one with our attention, which has no padded keys."""
    folder, known = Path(folder), {each.__name__: each for each in (AnyFlowPipeline, AnyFlowFARPipeline)}
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"no model_index.json in {folder}; expected a folder that save_pipeline wrote")
    try:
        name = json.loads(index.read_text()).get("_class_name")
        if name not in known:
            raise InputError(f"{folder} holds a {name}; expected {' or '.join(known)}")
        pipeline = known[name].from_pretrained(folder, local_files_only=True)
    except InputError:
        raise
    except Exception as problem:  # what diffusers and transformers raise for a broken folder is anything
        why = str(problem).strip().partition("\n")[0]
        raise InputError(f"{folder} does not load ({why}); save it again with save_pipeline") from None
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
    for what, given, expected in (
        ("latent channels", config.in_channels, codec.vae.config.z_dim),
        ("wide prompt embeddings", config.text_dim, text.encoder.config.d_model),
    ):
        if given != expected:
            raise InputError(f"a transformer for {given} {what}; expected {expected}, as the codec and text have")
    parts = {"tokenizer": text.tokenizer, "text_encoder": text.encoder, "vae": codec.vae, "scheduler": scheduler}
    if isinstance(network, WanNetwork):
        return AnyFlowPipeline(transformer=network.transformer, **parts)
    return AnyFlowFARPipeline(transformer=_in_chunks(network), **parts)


def _in_chunks(network):
    """The transformer with the network's own chunks in its configuration: a pipeline reads them there."""
    transformer, first, rest = network.transformer, network.first, network.rest
    frames = next(each for each in count(max(FRAMES, first)) if (each - first) % rest == 0)
    partition = chunk_partition(frames, first, rest)
    if tuple(transformer.config.chunk_partition) == tuple(partition):
        return transformer
    transformer = copy.deepcopy(transformer)
    transformer.register_to_config(chunk_partition=tuple(partition))
    return transformer


def _readme(name, pipeline, what, prompt, options, made, notes):
    causal = pipeline == AnyFlowFARPipeline.__name__
    options = {"height": None, "width": None, "num_frames": None, "num_inference_steps": 4} | options
    return README.format(
        name=name,
        pipeline=pipeline,
        what=what,
        version=diffusers.__version__,
        prompt=json.dumps(prompt, ensure_ascii=False),
        options=", ".join(f"{option}={value}" for option, value in options.items()),
        imports=IMPORTS if causal else "",
        attention=ATTENTION if causal else "",
        causal=CAUSAL if causal else "",
        notes=f"\n{notes}\n" if notes else "",
        provenance=f"\nHow it was made:\n\n```json\n{json.dumps(made, indent=1)}\n```\n" if made else "",
    )
