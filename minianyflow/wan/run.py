"""Runs of scripts/distill.py: the networks that a configuration names, what they draw, and the folder they leave.

With adapters all roles share one frozen base (roles.py); with full weights each has a copy. A run folder holds
    config.yaml, run.json                           what was asked for; costs and losses, the versions it ran with
    student.safetensors, student-last.safetensors   the average and the last weights (all weights: folders)
    fake.safetensors                                on-policy: the last weights of the fake score
    samples/                                        what it made along the way
    checkpoints/                                    until it is finished: what it goes on from
    bad_batch.json                                  if there was one: samples whose loss was not finite
"""

import hashlib
import json
import math
import os
import time
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from minianyflow.batch import part_of
from minianyflow.flow_map import tangent, velocity
from minianyflow.guidance import Guidance, guided
from minianyflow.networks.blocks import checkpoint_blocks, compile_blocks
from minianyflow.networks.causal import CausalNetwork, causal_backward_simulation, causal_rollout
from minianyflow.networks.causal_attention import chunk_partition
from minianyflow.networks.lora_roles import (
    COARSE_PATCHES,
    EMBEDDERS,
    TARGETS,
    RoleNetwork,
    add_role,
    merge_role,
    remove_role,
    roles_of,
)
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.networks.patches import use_per_frame_modulation
from minianyflow.networks.teacher_forcing import TeacherForced, single_chunk_batch, teacher_forcing_batch
from minianyflow.networks.wan import Autocast, WanNetwork
from minianyflow.networks.weights import fingerprint, load_role, save_role
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss, anyflow_weight, sqrt_weight
from minianyflow.on_policy import backward_simulation, draw_on_policy
from minianyflow.samplers import sample_flow_map
from minianyflow.support.errors import InputError
from minianyflow.support.files import remove_leftovers, staging_folder
from minianyflow.times import generator, time_grid
from minianyflow.wan.checkpoints import Checkpoints
from minianyflow.wan.config import as_yaml, find_device, identity, load_config
from minianyflow.wan.data.shards import MANIFEST, LatentShards, data_identity
from minianyflow.wan.data.videos import write_clips
from minianyflow.wan.folders import decode_latents, encode_prompts, load_parts, load_transformer
from minianyflow.wan.guard import Guard, end_trackers, start_trackers
from minianyflow.wan.prefetch import waiting_share

PATIENCE = timedelta(days=1)  # one process samples while the others wait, longer than the ten minutes of NCCL
ROLLOUTS, CONTEXT, SAMPLES = 3, 4, 5  # keys (seed, which, step) of random numbers, beside those of shards.py


class Networks:
    """The networks of a run, each counted: u(z, t, r, prompt). frames: of a clip, in latents.

    One base is loaded, and every role is an adapter on it; with full weights every role loads its own.
    """

    def __init__(self, config, frames, device="cpu"):
        self.config, self.frames, self.device, self.counters = config, frames, device, {}
        self.base = self._load(config.base) if config.trained == "lora" else None

    def trained(self, role, start=None):
        """The network of `role`, to train, from what `start` names or as the base is. A fake score sees whole clips."""
        whole = role == "fake"
        if self.base is None:
            transformer = self._load(weights_in(start, whole=True) if start else self.config.base).requires_grad_(True)
            network = self._wrap(transformer, whole)
            network = Autocast(network) if self.config.precision == "bf16" else network
        else:
            torch.manual_seed(self.config.seed)
            options = {"rank": self.config.rank, "alpha": self.config.alpha, "targets": self._targets()}
            if start:
                load_role(weights_in(start), self.base, "start", from_bidirectional=whole)
            add_role(self.base, role, **options, start="start" if start else None)
            if start:
                remove_role(self.base, "start")
            network = RoleNetwork(self._wrap(self.base, whole), role)
        for name, weight in network.named_parameters():
            weight.requires_grad_(COARSE_PATCHES[0] not in name or (self._compresses() and not whole))
        return self._counted(role, network)

    def teacher(self, whole=False):
        """The frozen teacher, from its run or as the base is. whole: it sees a clip as one chunk."""
        start = self.config.teacher
        if self.base is None:
            transformer = self._load(weights_in(start, whole=True) if start else self.config.base, frozen=True)
            return self._counted("teacher", self._wrap(transformer, whole))
        if start and "teacher" not in roles_of(self.base):
            load_role(weights_in(start), self.base, "teacher", from_bidirectional=whole)
        network = RoleNetwork(self._wrap(self.base, whole), "teacher" if start else None)
        return self._counted("teacher", network.requires_grad_(False))

    def _load(self, source, frozen=False):
        config = self.config
        half = config.precision == "bf16" and (frozen or config.trained == "lora")
        transformer = transformer_of(config, source, torch.bfloat16 if half else torch.float32, self.device)
        return at_work(config, transformer)

    def _compresses(self):
        """Whether a causal student learns from old chunks: clips that long, and a loss whose gradient gets there."""
        if self.config.architecture == "bidirectional":
            return False
        policy, chunks = self.config.on_policy, self.config.causal
        learns = self.config.stage != "on_policy" or policy.forward_weight > 0 or policy.context_gradient
        return learns and len(chunk_partition(self.frames, chunks.first, chunks.rest, True)) > chunks.full_chunks

    def _wrap(self, transformer, whole):
        return network_of(transformer, self.config, self.frames if whole else None)

    def _targets(self):
        embedders = () if self.config.stage == "teacher" else EMBEDDERS
        return TARGETS + embedders + (COARSE_PATCHES if self.config.architecture == "causal" else ())

    def _counted(self, role, network):
        self.counters.setdefault(role, []).append(EvaluationCounter(network))
        return self.counters[role][-1]

    def counts(self):
        """Evaluations so far, {role: (rows, rows with gradient)}; averages made of a network are not counted."""
        return {
            role: tuple(sum(getattr(each, kind) for each in counters) for kind in ("rows", "with_grad"))
            for role, counters in self.counters.items()
        }

    def state_dict(self):
        """What a checkpoint keeps: the counts."""
        return {"counts": self.counts(), "processes": PartialState().num_processes}

    def load_state_dict(self, state):
        """Go on from a checkpoint; rows that other processes counted are shared out among those there are now."""
        share = state["processes"] / PartialState().num_processes
        for role, counters in self.counters.items():
            for index, each in enumerate(counters):
                rows, with_grad = state["counts"][role] if index == 0 else (0, 0)
                each.rows, each.with_grad = round(rows * share), round(with_grad * share)


def transformer_of(config, source, dtype=torch.float32, device="cpu"):
    """The transformer that `source` holds (wan_folders.load_transformer), of the configuration's architecture."""
    limit = config.causal.full_chunks if config.architecture == "causal" else None
    return load_transformer(source, config.architecture, dtype, limit, device=device)


def at_work(config, transformer):
    """A transformer, frozen, as a run works with it: blocks without needless copies, checkpointed, compiled."""
    use_per_frame_modulation(transformer)
    if config.checkpointing:
        checkpoint_blocks(transformer, config.keep_attention)
    if config.compiled:
        compile_blocks(transformer)
    return transformer.requires_grad_(False)


def network_of(transformer, config, whole=None):
    """The network u(z, t, r, prompt) around a transformer of a run. whole: of a clip that is one chunk, its frames."""
    if config.architecture == "bidirectional":
        return WanNetwork(transformer)
    return CausalNetwork(transformer, whole or config.causal.first, config.causal.rest, ragged=True)


class Clock:
    """Seconds of training, those before a checkpoint included."""

    def __init__(self):
        self.before, self.start = 0.0, time.perf_counter()

    @property
    def seconds(self):
        """So far."""
        return self.before + time.perf_counter() - self.start

    def state_dict(self):
        """What a checkpoint keeps."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state):
        """Go on from a checkpoint."""
        self.before, self.start = state["seconds"], time.perf_counter()


def weights_in(source, role="student", whole=False):
    """Where the weights of a role are: the file of an adapter in a run folder or, if `whole`, a transformer's source.

    source: a run folder or, if `whole`, also weights of Wan or AnyFlow as load_transformer takes them.
    """
    folder = Path(source)
    adapter, transformer = folder / f"{role}.safetensors", folder / role
    if whole:
        if adapter.exists():
            raise InputError(f"{source} holds adapters; expected whole weights: set trained=lora, or export it first")
        return transformer if transformer.exists() else source
    if adapter.exists():
        return adapter
    if not folder.is_dir() and (str(source).count("/") != 1 or str(source)[0] in "./~"):
        raise InputError(f"no folder {source}; expected a finished run of distill.py")
    expected = "one of distill.py, finished: name whole weights as base=, or set trained=full"
    raise InputError(f"{source} is no run with an adapter of role {role!r}; expected {expected}")


def optimiser(config, **changes):
    """What `training.Role` takes of a configuration."""
    options = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    options |= {"warmup": config.warmup, "cosine": False, "clip": config.clip}
    return options | {"ema": config.ema, "ema_after": config.ema_after} | changes


def forward_loss(config, networks, null):
    """The loss of the forward stage, or of the teacher; chunk by chunk for a causal student."""
    weight = {"sqrt": sqrt_weight, "anyflow": anyflow_weight(config.shift)}[config.weight]
    teaching = config.stage == "teacher"
    guidance = Guidance(config.guidance.scale, null, config.guidance.published) if config.guidance.scale > 1 else None
    loss = FlowMapLoss(
        {} if teaching else FLOW_MAPS[config.objective],
        velocity=partial(velocity, networks.teacher()) if config.velocity == "base" and not teaching else None,
        guidance=guidance,
        weight=weight,
        adaptive=config.adaptive,
        delta=config.delta,
        rebalance=config.rebalance,
    )
    return TeacherForced(loss) if config.architecture == "causal" else loss


def guided_teacher(config, networks, null):
    """The velocity that distribution matching takes for the real one."""
    return guided(partial(velocity, networks.teacher(whole=True)), null, config.on_policy.real_guidance)


def simulation(config):
    """Backward simulation for the architecture."""
    if config.architecture == "bidirectional":
        return backward_simulation
    chunks = config.causal
    return causal_backward_simulation(config.on_policy.context_gradient, chunks.first, chunks.rest, ragged=True)


def draws(config, data, part=(0, 1)):
    """`draw(step)` for `training.train`: of the batch of that step one process's part, (index, parts)."""
    pairs = {"diagonal": config.diagonal, "end": config.end, "shift": config.shift, "drop": config.drop}
    rollouts = {"steps": tuple(config.on_policy.rollouts), "shift": config.shift}
    rollouts["fake_time"] = config.on_policy.score_time

    def draw(step):
        batch = data.draw(step, config.batch, config.seed, part, **pairs)
        if config.architecture == "causal":
            batch = _cut(batch, config, step)
        if config.stage == "on_policy":
            drawn = draw_on_policy(data.shape, config.batch, generator(config.seed, ROLLOUTS, step), **rollouts)
            batch |= part_of(drawn, *part)
        return batch

    return draw


def _cut(batch, config, step):
    """The batch as a causal student trains on it: with some long context, a short one, or the clip as one chunk."""
    whole, long, where = torch.rand(3, generator=generator(config.seed, CONTEXT, step)).tolist()
    partition = chunk_partition(batch["x"].shape[1], config.causal.first, config.causal.rest, ragged=True)
    if step and whole < config.causal.bidirectional:
        return single_chunk_batch(batch)
    full = config.causal.full_chunks
    if step and long >= config.causal.long_context:
        partition = partition[:full]
    elif step:  # step 0 has the longest: it trains every weight
        partition = partition[: full + 1 + int(where * (len(partition) - full))]
    return teacher_forcing_batch(batch, partition, full)


@torch.no_grad()
def sample(config, network, noise, prompt, steps, prefix=None):
    """Latents (B, F, C, H, W) that `steps` evaluations (a chunk, if causal) make of noise, for prompts (B, L, D).

    A teacher knows no target time: its velocity is followed by Euler's method. prefix (B, P, C, H, W): clean first
    frames to go on from, as `causal_rollout` and diffusers' pipelines have it.
    """
    times = time_grid(steps, config.shift, noise.device)
    u = tangent(network) if config.stage == "teacher" else network
    if config.architecture == "causal":
        chunks = config.causal.first, config.causal.rest
        return causal_rollout(u, noise, times, prompt, *chunks, prefix, ragged=True)[-1]
    if prefix is None:
        return sample_flow_map(u, noise, times, prompt=prompt)[-1]
    made = sample_flow_map(_after(u, prefix), noise, times, prompt=prompt)[-1]
    return torch.cat([prefix, made[:, prefix.shape[1] :]], 1)


def _after(u, prefix):
    """`u` with the first frames known, whatever is in their place: clean, at time 0; r is the step's, as in stock."""
    known = prefix.shape[1]

    def seen(z, t, r, **condition):
        t, r = (each[:, None].repeat(1, z.shape[1]) for each in (t, r))
        t[:, :known] = 0
        return u(torch.cat([prefix, z[:, known:]], 1), t, r, **condition)

    return seen


def told(config, data):
    """What may not change while a run goes on, {name: value}: weights and data by what they hold, not by place."""
    found, full = identity(config), config.trained == "full"
    starts = {name: getattr(config, name) for name in ("student", "teacher")}
    found |= {name: fingerprint(weights_in(start, whole=full)) for name, start in starts.items() if start}
    if (Path(config.data) / MANIFEST).is_file():
        del found["data"]  # the manifest says more
    null = hashlib.sha256(data.null.numpy().tobytes()).hexdigest()[:12]
    found |= {"base": fingerprint(config.base), "the null prompt": null}
    return found | {"what data holds": data_identity(config.data), "rows of data": len(data)}


def prepare(config):
    """The accelerator, the data and the checkpoints of a run.

    Raises InputError for a finished run in its folder, one that was begun with another configuration or is not to be
    gone on with, a folder that cannot be written to, or a missing GPU.
    """
    output = Path(config.output)
    _check_unfinished(output)
    data = LatentShards(config.data, config.data_skip)
    known = told(config, data)
    checkpoints = Checkpoints(output / "checkpoints", config.checkpoints.every, config.checkpoints.keep, known)
    if config.resume == "never" and checkpoints.folders():
        expected = "set resume=auto to go on, name another folder with output=FOLDER, or remove it"
        raise InputError(f"{config.output} holds checkpoints of an unfinished run, and resume=never; {expected}")
    checkpoints.check_settings()
    device = find_device(config.device)
    torch.set_float32_matmul_precision("high")  # adapters are float32
    tracker = None if config.log.tracker == "none" else config.log.tracker
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.architecture == "causal")  # coarse patches
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # wan.Autocast, where weights are float32
        log_with=tracker,
        project_dir=config.output,
        kwargs_handlers=[unused, InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    checkpoints.lock(accelerator)
    _check_unfinished(output)  # another run may have been at work, and done with it
    checkpoints.check_settings()
    if accelerator.is_main_process:
        for folder in (output, *output.glob("samples/*")):
            remove_leftovers(folder)
    start_trackers(accelerator)
    return accelerator, data, checkpoints


def _check_unfinished(output):
    if (output / "run.json").exists():
        raise InputError(f"{output} holds a finished run; name another folder with output=FOLDER, or remove it")


def guard(config, data):
    """What watches over the batches of a run."""
    above = math.inf if config.on_nan.above is None else config.on_nan.above
    return Guard(config.on_nan.skip, above, config.output, data.files)


def sampler(config, data, student, accelerator):
    """`on_step(step)` for `training.train`: every so often, clips of the averaged student in the run's samples/."""
    if not config.samples.every:
        return None
    prompts, device = config.samples.prompts, accelerator.device
    if accelerator.is_main_process:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        tokenizer, text_encoder = load_parts(config.base, "tokenizer", "text_encoder", dtype=dtype)
        prompt = encode_prompts(tokenizer, text_encoder.to(device), prompts, data.null.shape[1]).float()
        del tokenizer, text_encoder  # UMT5 is larger than the 1.3B model
        (vae,) = load_parts(config.base, "vae")  # now, or a missing one would be found hours later
        noise = torch.randn(len(prompts), *data.shape, generator=generator(config.seed, SAMPLES)).to(device)

    def on_step(step):
        if (step + 1) % config.samples.every:
            return
        averaged = student.average is not None and step >= student.ema_after
        network = student.average.module if averaged else student.network
        if isinstance(network, FSDPModule):
            network.unshard()  # all processes must ask, though one samples
        if accelerator.is_main_process:
            clips = {}
            vae.to(device)
            for steps in config.samples.steps:
                latents = sample(config, network.network, noise, prompt, steps)  # not counted
                clips[f"{steps} step{'s' * (steps > 1)}"] = decode_latents(vae, latents).cpu()
            vae.cpu()
            write_clips(Path(config.output) / "samples" / f"{step + 1:06}", clips, prompts)
        if isinstance(network, FSDPModule):
            network.reshard()

    return on_step


def save_run(config, data, networks, roles, history, seconds, accelerator, waits=()):
    """Write what a run leaves: the weights of every role that was trained, and how they were made; returns the latter.

    waits: what it waited for data since it was last started (prefetch.prefetch), on the main process.
    Then its checkpoints go. On other processes than the main one: None.
    """
    for role in roles.values():
        gather(role.network)
        gather(role.average and role.average.module)
    end_trackers(accelerator)
    if not accelerator.is_main_process:
        return None
    folder, counts, samples = Path(config.output), networks.counts(), config.steps * config.batch
    samples //= accelerator.num_processes  # of this process, as the counts are
    frames, _, high, wide = data.shape
    for name, role in roles.items():
        _save(folder, name if role.average is None else f"{name}-last", networks, role.network.network)
        if role.average is not None:
            _save(folder, name, networks, role.average.module.network)
    made = {
        "stage": config.stage,
        "architecture": config.architecture,
        "steps": config.steps,
        "batch": config.batch,
        "processes": accelerator.num_processes,
        "distribution": accelerator.distributed_type.value,
        "clip": {"frames": 4 * frames - 3, "height": 8 * high, "width": 8 * wide, "length": data.null.shape[1]},
        "seconds": round(seconds, 1),
        "waiting_for_data": waiting_share(waits),
        "evaluations_a_sample": {
            name: {"forwards": rows / samples, "backwards": with_grad / samples}
            for name, (rows, with_grad) in counts.items()
        },
        "history": history,
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft", "accelerate")},
    }
    with staging_folder(folder) as unfinished:
        (unfinished / "config.yaml").write_text(as_yaml(config))
        (unfinished / "run.json").write_text(json.dumps(made, indent=1) + "\n")
    if hasattr(os, "sync"):
        os.sync()  # on the disk itself, before what it came from goes
    Checkpoints(folder / "checkpoints").remove()
    return made


def gather(network):
    """Put whole weights in place of shards, to be saved: training is over. All processes must ask."""
    if not isinstance(network, FSDPModule):
        return
    network.reshard()
    for module in network.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, DTensor):
                module._parameters[name] = nn.Parameter(weight.full_tensor(), requires_grad=False)


def _save(folder, name, networks, network):
    if networks.base is not None:
        return save_role(folder / f"{name}.safetensors", networks.base, network.role)
    with staging_folder(folder) as unfinished:
        network.transformer.save_pretrained(unfinished / name)


def read_run(folder):
    """(Config, run.json) of a run folder. Raises InputError where it is none."""
    folder = Path(folder)
    for name in ("config.yaml", "run.json"):
        if not (folder / name).is_file():
            raise InputError(f"no {name} in {folder}; expected a run folder, which distill.py writes when it is done")
    try:
        made = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except ValueError as problem:
        raise InputError(f"{folder / 'run.json'} is not JSON ({problem}); expected it as distill.py wrote it") from None
    return load_config([folder / "config.yaml"]), made


def load_run(folder, role="student", dtype=torch.float32, device="cpu"):
    """The transformer of a finished run, its adapter merged: (transformer, Config)."""
    config, _ = read_run(folder)
    weights = weights_in(folder, role, config.trained == "full")
    transformer = transformer_of(config, config.base if config.trained == "lora" else weights, dtype, device)
    if config.trained == "lora":
        load_role(weights, transformer, role)
        merge_role(transformer, role)
    return transformer, config
