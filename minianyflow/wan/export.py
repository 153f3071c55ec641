"""Export of a run: a whole pipeline folder for stock diffusers, or its LoRA adapter alone, each with a README."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, FlowMapEulerDiscreteScheduler
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from torch import Tensor

from minianyflow.networks.causal_attention import chunk_partition
from minianyflow.networks.lora_layouts import to_layout
from minianyflow.networks.lora_roles import Adapter, RoleNetwork, remove_role, roles_of
from minianyflow.networks.pipelines import load_lora, stock_lines, write_pipeline, write_readme
from minianyflow.networks.weights import load_role
from minianyflow.support.errors import InputError
from minianyflow.support.files import new_folder
from minianyflow.times import generator
from minianyflow.wan.config import Config, identity
from minianyflow.wan.data.options import DTYPES, fps_of
from minianyflow.wan.folders import NEW_PATCH, NEW_TIME, base_class, load_parts, quiet
from minianyflow.wan.run import load_run, read_run
from minianyflow.wan.run_networks import network_of, transformer_of, weights_in
from minianyflow.wan.sampler import sample

PIPELINES = {"bidirectional": AnyFlowPipeline, "causal": AnyFlowFARPipeline}
TEACHER = """It is a teacher: it learnt r = t alone, so `use_mean_velocity=False` keeps the pipeline to its velocity.
Give it many steps, and guidance."""
LORA = """
base = {base}
transformer = {transformer}.from_pretrained(base, subfolder="transformer", torch_dtype={dtype}{chunks})
{new}scheduler = FlowMapEulerDiscreteScheduler(1000, {shift})"""
START = {  # what a base lacks, and its start: a copy of what it has
    NEW_TIME: """embedder = transformer.condition_embedder
embedder.delta_embedder = copy.deepcopy(embedder.time_embedder).to(transformer.dtype)
""",
    NEW_PATCH: """patch, coarse = transformer.patch_embedding, transformer.config.compressed_patch_size
coarse = torch.nn.functional.interpolate(patch.weight.float(), size=tuple(coarse), mode="trilinear").to(patch.weight)
transformer.far_patch_embedding.load_state_dict({"weight": coarse, "bias": patch.bias.clone()}, assign=True)
""",
}
LAYOUT = """`{layout}/lora.safetensors` is the same adapter by the names that {tools} read.
`minianyflow.networks.lora_layouts.from_layout` gives those of diffusers back. A tool without a target time knows no
layers `delta_embedding`: it can follow the velocity, r = t, as it follows that of the base, in many steps; it cannot
jump, and few steps are then as bad as the base's."""
TOOLS = {"wan": "the original Wan code and ComfyUI", "kohya": "kohya's tools, such as musubi-tuner,"}


def export_pipeline(run: str | Path, output: str | Path, role: str = "student", precision: str | None = None) -> None:
    """Write an AnyFlow(FAR)Pipeline with the run's weights, adapters merged. precision: None takes the run's."""
    config, report = read_run(run)
    clip, dtype = report["clip"], DTYPES[precision or config.precision]
    transformer, _ = load_run(run, role, dtype)
    transformer.register_to_config(**_chunks(config, clip))  # the pipeline reads them there
    tokenizer, text_encoder, vae = load_parts(config.base, "tokenizer", "text_encoder", "vae", dtype=dtype)
    scheduler = FlowMapEulerDiscreteScheduler(1000, config.shift)
    write_pipeline(
        output,
        PIPELINES[config.architecture](tokenizer, text_encoder, transformer, vae, scheduler),
        f"The {role} of a run ({config.stage} stage, {config.architecture}) on {config.base}",
        *_call(config, clip),
        provenance(config, report, role),
        notes(config),
        {"minianyflow.json": json.dumps({"stage": config.stage, "clip": clip}, indent=1) + "\n"},
        fps_of(transformer.config.in_channels),
        **card(config),
    )


def export_lora(run: str | Path, output: str | Path, role: str = "student", layout: str | None = None) -> None:
    """Write `pytorch_lora_weights.safetensors` for `load_lora_weights`, and check that it does there what it does here.

    In float32, as it was trained. layout: of a second file, see networks/lora_layouts.py. Raises
    InputError for a run without an adapter, or with one that does nothing.
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
        with quiet():  # what diffusers warns of is found by check_same
            load_lora(transformer, inside)
        check_same(_probe(config, network), expected, plain, run)
        if layout:
            (inside / layout).mkdir()
            save_file(to_layout(state, layout, metadata["lora_alpha"]), inside / layout / "lora.safetensors")
        about = {"stage": config.stage, "clip": report["clip"], "lora_of": config.base, "shift": config.shift}
        about |= {"architecture": config.architecture, "causal": asdict(config.causal)}
        (inside / "minianyflow.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        chunks, kind = _chunks(config, report["clip"]), type(transformer).__name__
        base_kind = base_class(config.base)
        new = [NEW_TIME] * (base_kind == "Wan") + [NEW_PATCH] * (config.architecture == "causal" != base_kind)
        before = LORA.format(
            base=json.dumps(config.base),
            transformer=kind,
            dtype=DTYPES[config.precision],
            chunks="".join(f", {name}={value}" for name, value in chunks.items()),
            new="".join(START[part] for part in new),
            shift=config.shift,
        )
        fps = fps_of(transformer.config.in_channels)
        lines, imports = (Path(output).name, *_call(config, report["clip"])), (kind, "FlowMapEulerDiscreteScheduler")
        lines = stock_lines(pipeline, *lines, str(DTYPES[config.precision]), before, imports, fps)
        lines = "import copy\n\n" * (NEW_TIME in new) + lines
        what = f"A LoRA adapter of rank {metadata['r']} ({config.stage} stage, {config.architecture}) on {config.base}"
        words = [LAYOUT.format(layout=layout, tools=TOOLS[layout])] if layout else []
        words = "\n\n".join([*words, notes(config)])
        write_readme(inside, pipeline, what, lines, words, provenance(config, report, role), **card(config, ["lora"]))


def check_hub_name(name: str) -> None:
    """Raise InputError unless `name` is one that a model can have on the hub: owner/model."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if "/" not in name:
        raise InputError("--push takes owner/model, letters, digits and -_. alone, as the hub does")


def push_to_hub(folder: str | Path, name: str, dry_run: bool = False) -> None:
    """Upload an export to the hub as `name`; dry_run: print the card's metadata and all files, without the network.

    Raises InputError for what the hub answers.
    """
    data = ModelCard.load(Path(folder) / "README.md").data.to_dict()
    if dry_run:
        print(f"dry run, nothing is uploaded; {name} would have this card, {json.dumps(data)}, and these files:")
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            print(f"{path.stat().st_size / 1e6:12.3f} MB  {path.relative_to(folder)}")
        return
    try:
        HfApi().create_repo(name, exist_ok=True, private=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as problem:  # the hub, its client and the network have errors of many kinds
        why = " ".join(str(problem).split())[:200]
        raise InputError(
            f"cannot push to {name} ({why}); log in with `hf auth login`, or look at the network"
        ) from None


def _call(config, clip):
    """Prompt and options of the call in a README."""
    teacher = config.stage == "teacher"
    options = {"height": clip["height"], "width": clip["width"], "num_frames": clip["frames"]}
    options |= {"num_inference_steps": 50 if teacher else 4, "max_sequence_length": clip["length"]}
    prompt = next(iter(config.samples.prompts), "A red panda eats bamboo.")
    return prompt, options | ({"use_mean_velocity": False} if teacher else {})


def _chunks(config, clip):
    """What a causal transformer's configuration says of chunks."""
    if config.architecture == "bidirectional":
        return {}
    chunks = config.causal
    partition = chunk_partition((clip["frames"] - 1) // 4 + 1, chunks.first, chunks.rest, ragged=True)
    return {"full_chunk_limit": chunks.full_chunks, "chunk_partition": partition}


def card(config: Config, tags: Sequence[str] = ()) -> dict[str, object]:
    """The metadata of an export's model card, and the last sheet of samples, if there is one."""
    made = {"tags": ["anyflow", "flow-map", "few-step", config.architecture, *tags]}
    if any(name.startswith("nvidia/") for name in _origins(config)):
        made |= {"license": "other", "license_name": "non-commercial"}
    elif config.base.startswith("Wan-AI/"):
        made["license"] = "apache-2.0"
    if not Path(config.base).exists():  # a name on the hub
        made["base_model"] = config.base
    sheets = sorted(Path(config.output).glob("samples/*/sheet.png"))
    return made | {"sheet": sheets[-1] if sheets else None}


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
    """What the README says of a run: what it started from, run.json with its first and last losses, and its recipe."""
    starts = {name: getattr(config, name) for name in ("base", "student", "teacher")}
    recipe = {name: value for name, value in identity(config).items() if name not in ("data", *starts)}
    losses = {when: report["history"][place] for when, place in (("first", 0), ("last", -1)) if report["history"]}
    figures = {name: value for name, value in report.items() if name != "history"} | {"losses": losses}
    return {"role": role} | starts | figures | {"recipe": recipe}


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
