"""Out of a run: a whole pipeline folder for stock diffusers, or its LoRA adapter alone, each with a README."""

import json
import warnings
from pathlib import Path

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, FlowMapEulerDiscreteScheduler
from diffusers.utils import logging

from minianyflow.networks.causal_attention import chunk_partition
from minianyflow.networks.lora_roles import Adapter, RoleNetwork, remove_role, roles_of
from minianyflow.networks.pipelines import write_pipeline
from minianyflow.networks.weights import load_role
from minianyflow.support.errors import InputError
from minianyflow.support.files import new_folder
from minianyflow.times import generator
from minianyflow.wan.folders import load_parts
from minianyflow.wan.run import load_run, read_run
from minianyflow.wan.run_networks import network_of, transformer_of, weights_in
from minianyflow.wan.sampler import sample

TEACHER = """It is a teacher: it learnt r = t alone, so `use_mean_velocity=False` keeps the pipeline to its velocity.
Give it many steps, and guidance."""
LORA = """# {name}

A LoRA adapter of rank {rank} on {base}, for the {architecture} network with two times; trained with minianyflow.
That network starts as the base does, so minianyflow builds it; the pipeline is diffusers' own:

```python
from diffusers import {pipeline}, FlowMapEulerDiscreteScheduler
from minianyflow.wan.folders import load_parts, load_transformer

base = {base_name}
tokenizer, text_encoder, vae = load_parts(base, "tokenizer", "text_encoder", "vae")
transformer = load_transformer(base, "{architecture}"{chunks})
pipeline = {pipeline}(tokenizer, text_encoder, transformer, vae, FlowMapEulerDiscreteScheduler(1000, {shift}))
pipeline.load_lora_weights("{name}")
```

{notes}
How it was made:

```json
{made}
```
"""


def export_pipeline(run, output, role="student", dtype=None):
    """Write an AnyFlow(FAR)Pipeline with the run's weights, adapters merged; in the run's dtype, or `dtype`."""
    config, made = read_run(run)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype or config.precision]
    transformer, _ = load_run(run, role, dtype)
    names = ("tokenizer", "text_encoder", "vae")
    parts = dict(zip(names, load_parts(config.base, *names, dtype=dtype), strict=True))
    parts["scheduler"] = FlowMapEulerDiscreteScheduler(1000, config.shift)
    clip, causal = made["clip"], config.architecture == "causal"
    if causal:  # the pipeline reads its chunks there
        partition = chunk_partition((clip["frames"] - 1) // 4 + 1, config.causal.first, config.causal.rest, ragged=True)
        transformer.register_to_config(chunk_partition=partition)
    kind, teacher = AnyFlowFARPipeline if causal else AnyFlowPipeline, config.stage == "teacher"
    options = {"height": clip["height"], "width": clip["width"], "num_frames": clip["frames"]}
    options |= {"num_inference_steps": 50 if teacher else 4, "max_sequence_length": clip["length"]}
    write_pipeline(
        output,
        kind(transformer=transformer, **parts),
        f"The {role} of a run ({config.stage} stage, {config.architecture}) on {config.base}",
        next(iter(config.samples.prompts), "A red panda eats bamboo."),
        options | ({"use_mean_velocity": False} if teacher else {}),
        provenance(config, made, role),
        f"{TEACHER}\n\n{licence(config)}" if teacher else licence(config),
        {"minianyflow.json": json.dumps({"stage": config.stage, "clip": clip}, indent=1) + "\n"},
    )


def export_lora(run, output, role="student"):
    """Write `pytorch_lora_weights.safetensors` for `load_lora_weights`, and see that it does there what it does here.

    In float32, as it was trained. Raises InputError for a run without an adapter, or one that does nothing.
    """
    config, made = read_run(run)
    if config.trained != "lora":
        raise InputError(f"{run} trained all weights, and has no adapter; leave out --lora to export a pipeline")
    causal = config.architecture == "causal"
    kind = AnyFlowFARPipeline if causal else AnyFlowPipeline
    transformer = transformer_of(config, config.base)
    load_role(weights_in(run, role), transformer, role)
    state = {name: value.contiguous() for name, value in Adapter(transformer, role).state_dict().items()}
    rank, alpha = roles_of(transformer)[role].r, roles_of(transformer)[role].lora_alpha
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in state})
    network = network_of(transformer, config)
    plain, expected = (_probe(config, RoleNetwork(network, each)) for each in (None, role))
    remove_role(transformer, role)
    transformer.unload_lora()
    with new_folder(output) as inside:
        told = {"r": rank, "lora_alpha": alpha, "target_modules": layers}  # without it diffusers takes alpha for rank
        kind.save_lora_weights(inside, state, transformer_lora_adapter_metadata=told)
        load_quietly(kind(None, None, transformer, None, None), inside, run)
        check_same(_probe(config, network), expected, plain, run)
        (inside / "README.md").write_text(
            LORA.format(
                name=Path(output).name,
                rank=rank,
                base=config.base,
                base_name=json.dumps(config.base),
                architecture=config.architecture,
                pipeline=kind.__name__,
                chunks=f", full_chunk_limit={config.causal.full_chunks}" if causal else "",
                shift=config.shift,
                notes=f"{TEACHER}\n{licence(config)}\n" if config.stage == "teacher" else f"{licence(config)}\n",
                made=json.dumps(provenance(config, made, role), indent=1),
            )
        )


def load_quietly(pipeline, folder, run):
    """pipeline.load_lora_weights(folder); what diffusers warns of is seen by `check_same`, or is one line here."""

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            pipeline.load_lora_weights(folder)
    except Exception as problem:  # what diffusers and peft raise for a file they cannot use is anything
        why = str(problem).strip().partition("\n")[0][:200]
        raise InputError(f"what was written of {run} does not load ({why}); export without --lora") from None
    finally:
        logging.set_verbosity(level)


def check_same(loaded, expected, plain, run):
    """Raise InputError unless what diffusers loaded does what the role does, and not what the base does."""
    if bool((expected == plain).all()):
        raise InputError(f"the adapter of {run} changes nothing; expected one that was trained for a step or more")
    apart, scale = float((loaded - expected).abs().max()), max(1.0, float(expected.abs().max()))
    if not apart <= 1e-5 * scale:
        why = "differs from the base by" if not bool((loaded == plain).all()) else "is the base, which differs by"
        far = float((expected - plain).abs().max())
        raise InputError(
            f"what diffusers loads of {run} is {apart:.1e} off ({why} {far:.1e}); expected 1e-5: try other versions of "
            "diffusers and peft, or export without --lora"
        )


def _probe(config, network):
    """A small sample that works every layer, those for old chunks too."""
    frames, size = config.causal.first + config.causal.rest * config.causal.full_chunks, network.transformer.config
    noise = torch.randn(1, frames, size.in_channels, 8, 8, generator=generator(0))
    prompt = torch.randn(1, 4, size.text_dim, generator=generator(1))
    return sample(config, network, noise, prompt, 2)


def provenance(config, made, role):
    """What run.json says but the curve, and what it stood on."""
    given = {name: getattr(config, name) for name in ("base", "student", "teacher", "objective", "seed")}
    return {"role": role} | given | {name: value for name, value in made.items() if name != "history"}


def licence(config):
    """One line on whose licence holds."""
    names = [config.base, *origins(config)]
    if any(name.startswith("nvidia/") for name in names):
        return "The released AnyFlow weights that it stands on carry a non-commercial licence, which holds here too."
    known = " (Apache 2.0)" if config.base.startswith("Wan-AI/") else ""
    return f"The weights stand under the licence of {config.base}{known}."


def origins(config):
    """All that a run began from, as far as its folders are there."""

    for name in filter(None, (config.student, config.teacher)):
        yield name
        if (Path(name) / "config.yaml").is_file():
            before, _ = read_run(name)
            yield before.base
            yield from origins(before)
