"""The folder of a run: prepared, held by one run alone, written when training is over, read again.

config.yaml, run.json                           configuration; costs, losses, versions
student.safetensors, student-last.safetensors   the average and the last weights (all weights: folders)
fake.safetensors                                on-policy: the last weights of the fake score
samples/                                        clips sampled while training
checkpoints/                                    until the run is finished
bad_batch.json                                  if there was one: samples whose loss was not finite
"""

import hashlib
import json
import math
import os
import time
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import TypedDict

from minianyflow.networks.lora_roles import merge_role
from minianyflow.networks.sequence import TIMEOUT
from minianyflow.networks.weights import fingerprint, load_role, save_role
from minianyflow.support.errors import InputError
from minianyflow.support.files import read_json, remove_leftovers, staging_folder
from minianyflow.training import Role
from minianyflow.wan.checkpoints import Checkpoints
from minianyflow.wan.config import Config, as_yaml, find_device, identity, load_config
from minianyflow.wan.data.buckets import Buckets, check_processes, open_latents
from minianyflow.wan.data.latents import Count, LatentSet
from minianyflow.wan.data.options import CODECS
from minianyflow.wan.guard import Guard, check_tracker, end_trackers, start_trackers
from minianyflow.wan.prefetch import waiting_share
from minianyflow.wan.run_networks import RunNetworks, transformer_of, weights_in

Clip = TypedDict("Clip", dict.fromkeys(("frames", "height", "width", "length"), Count))


class Run(TypedDict):
    """The fields of run.json that are read."""

    stage: str
    architecture: str
    steps: Count
    clip: Clip
    history: list[dict]


class Stopwatch:
    """Seconds of training, those before a checkpoint included."""

    def __init__(self):
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self.start

    def state_dict(self) -> dict:
        """The seconds, for a checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        """Resume from a checkpoint."""
        self.start = time.perf_counter() - state["seconds"]


def run_identity(config: Config, data: LatentSet | Buckets) -> dict:
    """What may not change when a run resumes, {name: value}: weights and data by content, not by place."""
    values, full = identity(config), config.trained == "full"
    starts = {name: getattr(config, name) for name in ("student", "teacher")}
    values |= {name: fingerprint(weights_in(start, whole=full)) for name, start in starts.items() if start}
    del values["data"]  # its manifest says more than its folder
    null = hashlib.sha256(data.null.numpy().tobytes()).hexdigest()[:12]
    values |= {"base": fingerprint(config.base), "the null prompt": null}
    return values | {"what data holds": data.identity, "rows of data": len(data)}


def prepare(config: Config) -> tuple[Accelerator, LatentSet | Buckets, Checkpoints]:
    """The accelerator, the data and the checkpoints of a run.

    Raises InputError for a finished run in its folder, one that was begun with another configuration or is not to be
    resumed, a folder that cannot be written to, or a missing GPU.
    """
    output = Path(config.output)
    _check_unfinished(output)
    check_tracker(config.log.tracker)
    data = open_latents(config.data, config.data_skip)
    options = config.checkpoints
    checkpoints = Checkpoints(output / "checkpoints", options.every, options.keep, run_identity(config, data))
    if config.resume == "never" and checkpoints.folders():
        expected = "set resume=auto to go on, name another folder with output=FOLDER, or remove it"
        raise InputError(f"{config.output} holds checkpoints of an unfinished run, and resume=never; {expected}")
    checkpoints.check_settings()
    device = find_device(config.device)
    torch.set_float32_matmul_precision("high")  # adapters are float32
    tracker = None if config.log.tracker == "none" else config.log.tracker
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.architecture == "causal" or config.shard_base)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # wan.Autocast, where weights are float32
        log_with=tracker,
        project_dir=config.output,
        kwargs_handlers=[unused, InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if "states" in config.offload and sharded:
        raise InputError("offload=states with FSDP2, which shards moments and averages; set offload=[], or use DDP")
    if sharded and config.shard_base and config.architecture == "causal" and config.stage != "on_policy":
        moved = "its weights of coarse patches would move in steps that do not use them"
        raise InputError(f"shard_base=true with FSDP2 and a causal student: {moved}; use DDP, or set shard_base=false")
    if config.shard_base and accelerator.num_processes == 1:
        raise InputError("shard_base=true in one process; start several, or set offload=[base]: it rests in CPU memory")
    if accelerator.num_processes % config.sequence_parallel:
        problem = f"sequence_parallel={config.sequence_parallel} with {accelerator.num_processes} processes"
        raise InputError(f"{problem}; expected a number that divides them")
    check_processes(data, accelerator.num_processes // config.sequence_parallel)
    checkpoints.lock(accelerator)
    _check_unfinished(output)  # another run may have been at work, and done with it
    checkpoints.check_settings()
    if accelerator.is_main_process:
        for folder in (output, *output.glob("samples/*")):
            remove_leftovers(folder)
    start_trackers(accelerator, output)
    return accelerator, data, checkpoints


def _check_unfinished(output):
    held = {"run.json": "a finished run", "model_index.json": "a pipeline", "manifest.json": "latents"}
    for name, what in held.items():
        if (output / name).exists():
            raise InputError(f"{output} holds {what}; name another folder with output=FOLDER")


def guard(config: Config, data: LatentSet | Buckets) -> Guard:
    """The guard against bad batches of a run."""
    return Guard(config.on_nan.skip, config.on_nan.above or math.inf, config.output, data.files)


def save_run(
    config: Config,
    data: LatentSet | Buckets,
    networks: RunNetworks,
    roles: dict[str, Role],
    history: list[dict],
    seconds: float,
    accelerator: Accelerator,
    waits: list[tuple[float, float]] = (),
) -> dict | None:
    """Write the weights of every trained role and run.json, then remove the checkpoints; returns run.json.

    waits: seconds that each step waited for data (prefetch.prefetch). On other processes than the main one: None.
    """
    for role in roles.values():
        gather(role.network)
        gather(role.average and role.average.module)
    end_trackers(accelerator)
    if not accelerator.is_main_process:
        return None
    folder, counts, samples = Path(config.output), networks.counts(), config.steps * config.batch
    samples = samples * config.sequence_parallel // accelerator.num_processes  # of this process, as the counts are
    frames, channels, high, wide = data.shape
    factor, _ = CODECS.get(channels, CODECS[16])
    clip = {"frames": 4 * frames - 3, "height": factor * high, "width": factor * wide, "length": data.null.shape[1]}
    for name, role in roles.items():
        _save(folder, name if role.average is None else f"{name}-last", networks, role.network.network)
        if role.average is not None:
            _save(folder, name, networks, role.average.module.network)
    run = {
        "stage": config.stage,
        "architecture": config.architecture,
        "steps": config.steps,
        "batch": config.batch,
        "processes": accelerator.num_processes,
        "distribution": accelerator.distributed_type.value,
        "clip": clip,
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
        (unfinished / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
        (unfinished / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if hasattr(os, "sync"):
        os.sync()  # on the disk itself, before the checkpoints go
    Checkpoints(folder / "checkpoints").remove()
    return run


def gather(network: nn.Module) -> None:
    """Put whole weights in place of shards, to be saved: training is over. All processes must call it."""
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


def read_run(folder: str | Path) -> tuple[Config, dict]:
    """(Config, run.json) of a run folder. Raises InputError for another folder."""
    folder = Path(folder)
    for name in ("config.yaml", "run.json"):
        if not (folder / name).is_file():
            raise InputError(f"no {name} in {folder}; expected a run folder, which a finished run leaves")
    return load_config([folder / "config.yaml"]), read_json(folder / "run.json", "put it back as it was written", Run)


def load_run(folder: str | Path, role: str = "student", dtype=torch.float32, device="cpu") -> tuple[nn.Module, Config]:
    """The transformer of a finished run, its adapter merged: (transformer, Config)."""
    config, _ = read_run(folder)
    weights = weights_in(folder, role, config.trained == "full")
    transformer = transformer_of(config, config.base if config.trained == "lora" else weights, dtype, device)
    if config.trained == "lora":
        load_role(weights, transformer, role)
        merge_role(transformer, role)
    return transformer, config
