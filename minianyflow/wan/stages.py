"""The three stages of distillation, one per run: teacher tuning, forward flow-map training, on-policy distillation.

A stage is a function (config, networks, null) -> {role: Role}. It makes the same calls as notebooks 4 and 5 of the
course; only the networks are larger. `distil` trains the stage that a configuration names.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import psutil
import torch

from minianyflow.flow_map import pick_rows, velocity
from minianyflow.guidance import Guidance, guided
from minianyflow.networks.causal import causal_backward_simulation
from minianyflow.networks.causal_attention import chunk_partition
from minianyflow.networks.known_frames import know_first_frames
from minianyflow.networks.sequence import check_tokens
from minianyflow.networks.teacher_forcing import (
    TeacherForced,
    add_whole_clips,
    single_chunk_batch,
    teacher_forcing_batch,
)
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss, sqrt_weight
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, backward_simulation, draw_on_policy
from minianyflow.times import draw_pairs, generator
from minianyflow.training import Role
from minianyflow.wan.config import Config
from minianyflow.wan.data.buckets import GOLDEN, Buckets
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.memory import check_host, choose_memory
from minianyflow.wan.prefetch import prefetch
from minianyflow.wan.published import Rebalanced, anyflow_weight
from minianyflow.wan.run import Stopwatch, guard, prepare, save_run
from minianyflow.wan.run_networks import RunNetworks
from minianyflow.wan.sampler import sample_while_training
from minianyflow.wan.trainer import train_run

ROLLOUTS, CONTEXT, WHOLE = 3, 4, 5  # keys (seed, key, step) of random numbers, beside those of the data


def teacher(config: Config, networks: RunNetworks, null: dict) -> dict[str, Role]:
    """Flow matching: rows r = t alone."""
    student = networks.trained("student", config.student)
    return {"student": Role(student, forward_loss(config, networks, null), **optimiser(config))}


forward = teacher  # with rows r < t, and the objective of the configuration, it is the forward stage


def on_policy(config: Config, networks: RunNetworks, null: dict) -> dict[str, Role]:
    """Backward simulation, distribution matching against a fake score, and the forward loss beside it."""
    student = networks.trained("student", config.student)
    fake = networks.trained("fake", config.teacher)
    real_velocity = guided(partial(velocity, networks.teacher(whole=True)), null, config.on_policy.real_guidance)
    policy = OnPolicyLoss(
        real_velocity,
        fake,
        forward_loss(config, networks, null),
        config.on_policy.forward_weight,
        config.shift,
        simulation(config),
    )
    fake_loss = FakeScoreLoss(student, config.shift, simulation(config))
    return {
        "student": Role(student, policy, **optimiser(config)),
        "fake": Role(fake, fake_loss, **optimiser(config, lr=config.on_policy.fake_lr, ema=None)),
    }


STAGES = {"teacher": teacher, "forward": forward, "on_policy": on_policy}


def distil(config: Config, minutes: float | None = None) -> dict | None:
    """Train the stage of `config`, from the newest checkpoint of its run if there is one; returns run.json.

    Leaves a run folder. On other processes than the main one: None. Raises `guard.Preempted` after SIGTERM or Ctrl-C,
    and before this process is `minutes` old.
    """
    accelerator, data, checkpoints = prepare(config)
    together = config.sequence_parallel
    networks = RunNetworks(config, data.shape[0], accelerator.device, (data.shape[1], data.null.shape[2]))
    null = {"prompt": data.null.to(accelerator.device)}
    size = networks.base and networks.base.config
    memory, why = choose_memory(config, size, data.shape, accelerator.device, accelerator.num_processes)
    if config.stage == "on_policy" and accelerator.is_main_process:
        print(f"memory={memory}: {why}", flush=True)
    if networks.error is not None and accelerator.is_main_process:
        print(
            f"base_dtype=int8: weights of blocks are wrong by {float(networks.error):.2%} (root mean square)",
            flush=True,
        )
    roles = STAGES[config.stage](replace(config, memory=memory), networks, null)
    for clips in getattr(data, "sets", [data]):
        shape = roles["student"].network.network.transformer.config
        per_frame = [
            clips.shape[2] // n * (clips.shape[3] // n) for n in (2, 4)[: 1 + (config.architecture == "causal")]
        ]
        check_tokens(together, shape.num_attention_heads, *per_frame)
    check_host(config, size, roles, data.shape, accelerator.num_processes)
    stopwatch, watch, waits = Stopwatch(), guard(config, data), []
    checkpoints.stateful = {"networks": networks, "clock": stopwatch, "guard": watch}
    part = accelerator.process_index // together, accelerator.num_processes // together
    show = sample_while_training(config, data, roles["student"], accelerator, networks.wait)
    history = train_run(
        roles,
        prefetch(draws(config, data, part), config.steps, waits),
        config.steps,
        config.accumulate,
        accelerator,
        {"desc": f"{config.architecture} {config.stage}"},
        None,
        config.log.every,
        checkpoints,
        watch,
        own_rows=True,
        samples=(config.samples.every, show),
        deadline=None if minutes is None else psutil.Process().create_time() + 60 * minutes,
        waits=waits,
        wait=networks.wait if config.shard_base else None,
        sharing=networks.tokens.sharing if networks.tokens else nullcontext,
    )
    return save_run(config, data, networks, roles, history, stopwatch.seconds, accelerator, waits)


def optimiser(config: Config, **changes) -> dict:
    """The options of `training.Role` in a configuration."""
    options = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    options |= {"warmup": config.warmup, "cosine": False, "clip": config.clip}
    options |= {"offload": "states" in config.offload}
    return options | {"ema": config.ema, "ema_after": config.ema_after} | changes


def forward_loss(config: Config, networks: RunNetworks, null: dict) -> Callable:
    """The loss of the forward stage, or of the teacher; chunk by chunk for a causal student."""
    teaching, scale = config.stage == "teacher", config.guidance.scale
    loss = FlowMapLoss(
        {} if teaching else FLOW_MAPS[config.objective],
        velocity=partial(velocity, networks.teacher()) if config.velocity == "base" and not teaching else None,
        guidance=Guidance(scale, null, config.guidance.published) if scale > 1 else None,
        weight={"none": torch.ones_like, "sqrt": sqrt_weight, "anyflow": anyflow_weight(config.shift)}[config.weight],
        adaptive=config.adaptive,
        delta=config.delta,
    )
    whole = replace(loss, shares={}, weight=torch.ones_like, adaptive=0.0)
    loss = Rebalanced(loss, networks.wait) if config.rebalance else loss
    return loss if config.architecture == "bidirectional" else TeacherForced(loss, whole)


def simulation(config: Config) -> Callable:
    """Backward simulation for the architecture."""
    recomputed, chunks = config.memory == "small", config.causal
    if config.architecture == "bidirectional":
        return partial(backward_simulation, recomputed=recomputed)
    return causal_backward_simulation(config.on_policy.context_gradient, chunks.first, chunks.rest, True, recomputed)


def draws(config: Config, data: LatentSet | Buckets, part: tuple[int, int] = (0, 1)) -> Callable[[int], dict]:
    """`draw(step)` for `train_run`: the rows of one process, part = (index, processes), of the batch of that step."""
    pairs = {"diagonal": config.diagonal, "end": config.end, "shift": config.shift, "drop": config.drop}
    pairs |= {"diagonal_time": config.diagonal_time, "known": config.i2v_prob}
    policy = config.on_policy
    rollouts = {"steps": tuple(policy.rollouts), "shift": config.shift, "shared": policy.shared_rollout}
    rollouts["fake_time"] = policy.score_time

    def draw(step):
        batch = data.draw(step, config.batch, config.seed, part, **pairs)
        batch["objective_draw"].fill_(step * GOLDEN % 1)  # one per step: rows of one cost on every process; evenly
        if "dropped" in batch:
            batch = drop_prompts(batch, data.null, config)
        if config.stage == "on_policy":
            rollout = draw_on_policy(
                batch["x"].shape[1:], config.batch, generator(config.seed, ROLLOUTS, step), **rollouts
            )
            batch |= pick_rows(rollout, batch["place"])
        batch = know_first_frames(batch)
        return chunk_batch(batch, config, step) if config.architecture == "causal" else batch

    return draw


def drop_prompts(batch: dict, null: torch.Tensor, config: Config) -> dict:
    """The batch with the null prompt in the rows that drop theirs."""
    prompt = batch["condition"]["prompt"]
    kept = {"condition": {"prompt": torch.where(batch["dropped"][:, None, None], null, prompt)}}
    if config.stage == "on_policy" and config.on_policy.null_prompts == "forward":
        kept["rollout_condition"] = batch["condition"]
    return batch | kept


def chunk_batch(batch: dict, config: Config, step: int) -> dict:
    """The batch as a causal student trains on it: a long context, a short one, or the clip as one chunk."""
    whole, long, where = torch.rand(3, generator=generator(config.seed, CONTEXT, step)).tolist()
    chunks, whole = config.causal, step and whole < config.causal.bidirectional
    if whole and not chunks.bidirectional_adds:
        return single_chunk_batch(batch)
    partition = chunk_partition(batch["x"].shape[1], chunks.first, chunks.rest, ragged=True)
    if step:  # step 0 has the longest context: it trains every weight
        more = int(where * (len(partition) - chunks.full_chunks + 1)) if long < chunks.long_context else 0
        partition = partition[: chunks.full_chunks + more]
    cut = teacher_forcing_batch(batch, partition, chunks.full_chunks)
    if not whole:
        return cut
    law = {"diagonal": 1.0, "end": 0.0, "diagonal_time": "logit_normal"}
    times = draw_pairs(config.batch, generator(config.seed, WHOLE, step), shift=config.shift, **law)
    return add_whole_clips(cut, batch, times["t"][batch["place"]])
