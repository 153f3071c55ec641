"""Export of a run: a whole pipeline folder for stock diffusers, or its LoRA adapter alone, each with a README."""

import json
from pathlib import Path

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, FlowMapEulerDiscreteScheduler
from torch import Tensor

from minianyflow.networks.causal_attention import chunk_partition
from minianyflow.networks.lora_roles import Adapter, RoleNetwork, remove_role, roles_of
from minianyflow.networks.pipelines import write_pipeline, write_readme
from minianyflow.networks.weights import load_role
from minianyflow.support.errors import InputError
from minianyflow.support.files import new_folder
from minianyflow.times import generator
from minianyflow.wan.config import Config
from minianyflow.wan.data.options import DTYPES
from minianyflow.wan.folders import load_parts, quiet
from minianyflow.wan.run import load_run, read_run
from minianyflow.wan.run_networks import network_of, transformer_of, weights_in
from minianyflow.wan.sampler import sample

PIPELINES = {"bidirectional": AnyFlowPipeline, "causal": AnyFlowFARPipeline}
TEACHER = """It is a teacher: it learnt r = t alone, so `use_mean_velocity=False` keeps the pipeline to its velocity.
Give it many steps, and guidance."""
LORA = """# {name}

A LoRA adapter of rank {rank} on {config.base}, for the {config.architecture} network with two times; trained with
minianyflow.
That network starts as the base does, so minianyflow builds it; the pipeline is diffusers' own:

```python
from diffusers import {pipeline}, FlowMapEulerDiscreteScheduler
from minianyflow.wan.folders import load_parts, load_transformer

base = {base}
tokenizer, text_encoder, vae = load_parts(base, "tokenizer", "text_encoder", "vae")
transformer = load_transformer(base, "{config.architecture}"{chunks})
pipeline = {pipeline}(tokenizer, text_encoder, transformer, vae, FlowMapEulerDiscreteScheduler(1000, {config.shift}))
pipeline.load_lora_weights("{name}")
```
"""


def export_pipeline(run: str | Path, output: str | Path, role: str = "student", precision: str | None = None) -> None:
    """Write an AnyFlow(FAR)Pipeline with the run's weights, adapters merged. precision: None takes the run's."""
    config, report = read_run(run)
    clip, teacher, dtype = report["clip"], config.stage == "teacher", DTYPES[precision or config.precision]
    transformer, _ = load_run(run, role, dtype)
    if config.architecture == "causal":  # the pipeline reads its chunks there
        partition = chunk_partition((clip["frames"] - 1) // 4 + 1, config.causal.first, config.causal.rest, ragged=True)
        transformer.register_to_config(chunk_partition=partition)
    tokenizer, text_encoder, vae = load_parts(config.base, "tokenizer", "text_encoder", "vae", dtype=dtype)
    scheduler = FlowMapEulerDiscreteScheduler(1000, config.shift)
    options = {"height": clip["height"], "width": clip["width"], "num_frames": clip["frames"]}
    options |= {"num_inference_steps": 50 if teacher else 4, "max_sequence_length": clip["length"]}
    write_pipeline(
        output,
        PIPELINES[config.architecture](tokenizer, text_encoder, transformer, vae, scheduler),
        f"The {role} of a run ({config.stage} stage, {config.architecture}) on {config.base}",
        next(iter(config.samples.prompts), "A red panda eats bamboo."),
        options | ({"use_mean_velocity": False} if teacher else {}),
        provenance(config, report, role),
        notes(config),
        {"minianyflow.json": json.dumps({"stage": config.stage, "clip": clip}, indent=1) + "\n"},
    )


def export_lora(run: str | Path, output: str | Path, role: str = "student") -> None:
    """Write `pytorch_lora_weights.safetensors` for `load_lora_weights`, and check that it does there what it does here.

    In float32, as it was trained. Raises InputError for a run without an adapter, or with one that does nothing.
    """
    config, report = read_run(run)
    if config.trained != "lora":
        raise InputError(f"{run} trained all weights, and has no adapter; export a whole pipeline instead")
    if config.architecture == "causal" and config.causal.coarse_patches == "whole":
        raise InputError(f"{run} trained a layer whole, which no LoRA file holds; export a whole pipeline instead")
    pipeline = PIPELINES[config.architecture]
    transformer = transformer_of(config, config.base)
    load_role(weights_in(run, role), transformer, role)
    state = {name: value.contiguous() for name, value in Adapter(transformer, role).state_dict().items()}
    metadata = {"r": roles_of(transformer)[role].r, "lora_alpha": roles_of(transformer)[role].lora_alpha}
    metadata["target_modules"] = sorted({name.rsplit(".lora_", 1)[0] for name in state})
    network = network_of(transformer, config)
    plain, expected = (_probe(config, RoleNetwork(network, name)) for name in (None, role))
    remove_role(transformer, role)
    transformer.unload_lora()
    with new_folder(output) as inside:
        pipeline.save_lora_weights(inside, state, transformer_lora_adapter_metadata=metadata)  # without: alpha = rank
        try:
            with quiet():  # what diffusers warns of is found by check_same
                pipeline(None, None, transformer, None, None).load_lora_weights(inside)
        except Exception as problem:  # diffusers and peft raise any kind of error for a file they cannot use
            why = str(problem).strip().partition("\n")[0][:200]
            raise InputError(f"the adapter written of {run} does not load ({why}); export a pipeline instead") from None
        check_same(_probe(config, network), expected, plain, run)
        text = LORA.format(
            name=Path(output).name,
            rank=metadata["r"],
            config=config,
            base=json.dumps(config.base),
            pipeline=pipeline.__name__,
            chunks=f", full_chunk_limit={config.causal.full_chunks}" if config.architecture == "causal" else "",
        )
        write_readme(inside, text, notes(config), provenance(config, report, role))


def check_same(loaded: Tensor, expected: Tensor, plain: Tensor, run: str | Path) -> None:
    """Raise InputError unless samples of what diffusers loaded are the role's, and the role's are not the base's."""
    if bool((expected == plain).all()):
        raise InputError(f"the adapter of {run} changes nothing; expected one that was trained for a step or more")
    apart, scale = float((loaded - expected).abs().max()), max(1.0, float(expected.abs().max()))
    if not apart <= 1e-5 * scale:
        todo = "try other versions of diffusers and peft, or export a pipeline instead"
        raise InputError(f"what diffusers loads of {run} is {apart:.1e} off; expected 1e-5: {todo}")


def _probe(config, network):
    """A small sample that uses every layer, those for old chunks too."""
    frames, size = config.causal.first + config.causal.rest * config.causal.full_chunks, network.transformer.config
    noise = torch.randn(1, frames, size.in_channels, 8, 8, generator=generator(0))
    prompt = torch.randn(1, 4, size.text_dim, generator=generator(1))
    return sample(config, network, noise, prompt, 2)


def provenance(config: Config, report: dict, role: str) -> dict:
    """What the README says of a run: run.json without the losses, and what the run started from."""
    starts = {name: getattr(config, name) for name in ("base", "student", "teacher", "objective", "seed")}
    return {"role": role} | starts | {name: value for name, value in report.items() if name != "history"}


def notes(config: Config) -> str:
    """The licence, in one line, and how a teacher is sampled."""
    apache = " (Apache 2.0)" if config.base.startswith("Wan-AI/") else ""
    licence = f"The weights stand under the licence of {config.base}{apache}."
    if any(name.startswith("nvidia/") for name in _origins(config)):
        licence = "The released AnyFlow weights that it stands on carry a non-commercial licence, which holds here too."
    return f"{TEACHER}\n\n{licence}" if config.stage == "teacher" else licence


def _origins(config, seen=frozenset()):
    """All that a run started from, its base included, as far as its folders are there; each once."""
    yield config.base
    for name in {config.student, config.teacher} - {None, *seen}:
        yield name
        if (Path(name) / "config.yaml").is_file():
            yield from _origins(read_run(name)[0], seen | {name})
