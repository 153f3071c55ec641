"""Samples of a network of Wan: at any step counts, from known first frames, under guidance, and while training."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from minianyflow.flow_map import tangent, velocity
from minianyflow.guidance import guided, guided_velocity
from minianyflow.networks.causal import causal_rollout
from minianyflow.samplers import sample_flow_map
from minianyflow.times import generator, time_grid
from minianyflow.training import Role
from minianyflow.wan.config import Config
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.data.options import DTYPES, fps_of
from minianyflow.wan.data.write_video import write_clips
from minianyflow.wan.folders import decode_latents, embed, load_parts
from minianyflow.wan.guard import log_clips

SAMPLES = 5  # key (seed, key) of random numbers, beside those of the data and of stages.py


@torch.no_grad()
def sample(
    config: Config, network: Callable, noise: Tensor, prompt: Tensor, steps: int, prefix: Tensor | None = None
) -> Tensor:
    """Latents (B, F, C, H, W) from noise, for prompts (B, L, D), by `steps` evaluations (per chunk, if causal).

    A teacher knows no target time: its velocity is followed by Euler's method. prefix (B, P, C, H, W): clean first
    frames to start from, as in `causal_rollout` and diffusers' pipelines.
    """
    times = time_grid(steps, config.shift, noise.device)
    u = tangent(network) if config.stage == "teacher" else network
    if config.architecture == "causal":
        chunks = config.causal.first, config.causal.rest
        return causal_rollout(u, noise, times, prompt, *chunks, prefix, ragged=True)[-1]
    if prefix is None:
        return sample_flow_map(u, noise, times, prompt=prompt)[-1]
    frames = prefix.shape[1]
    known = torch.arange(noise.shape[1], device=noise.device).expand(noise.shape[:2]) < frames
    start = torch.cat([prefix, noise[:, frames:]], 1)
    return sample_flow_map(u, start, times, prompt=prompt, known=known)[-1]


def stock_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise (1, F, C, h, w) that diffusers' pipelines make with `torch.Generator().manual_seed(seed)`."""
    frames, channels, *size = shape
    noise = torch.randn(1, channels, frames, *size, generator=torch.Generator().manual_seed(seed))
    return noise.transpose(1, 2)


def guided_network(u: Callable, config: Config, null: Tensor, scale: float) -> Callable:
    """A teacher under guidance: `u` with the prompt and with the null prompt, one cache for each if causal."""
    if config.architecture == "bidirectional":
        both = guided(partial(velocity, u), {"prompt": null}, scale)
        return lambda z, t, r, **condition: both(z, t, **condition)

    def causal(z, t, r, prompt, cache=(), **options):
        prompts = prompt, null.expand(len(z), *null.shape[1:])
        if options.get("fill_cache"):
            return tuple(u(z, t, r, prompt=text, **options) for text in prompts)
        pairs = zip(prompts, cache or ((), ()), strict=True)
        return guided_velocity(*(u(z, t, t, prompt=text, cache=past, **options) for text, past in pairs), scale)

    return causal


def sample_while_training(
    config: Config, data: LatentSet, student: Role, accelerator: Accelerator, wait: Callable = lambda: None
) -> Callable[[int], None] | None:
    """`sample(done)` for `train_run`: clips of the averaged student in samples/, and in the trackers.

    With samples.last also those of its last weights, from the same noise. Processes share the clips by weights, step
    count and prompt; the main one decodes and writes them. wait: `RunNetworks.wait`.
    """
    if not config.samples.every:
        return None
    prompts, device, prompt = config.samples.prompts, accelerator.device, None
    if accelerator.is_main_process:
        prompt = embed(config.base, prompts, data.null.shape[1], DTYPES[config.precision], device).float().cpu()
        (vae,) = load_parts(config.base, "vae")  # now, or a missing one would be found hours later
    prompt = broadcast_object_list([prompt])[0].to(device)
    noise = torch.randn(len(prompts), *data.shape, generator=generator(config.seed, SAMPLES)).to(device)

    def on_sample(done):
        with student.states():
            sample_and_show(done)

    def sample_and_show(done):
        averaged = student.average is not None and done > student.ema_after
        sources = {"": student.average.module} if averaged else {}
        if config.samples.last or not averaged:
            sources["last, " * averaged] = student.network
        for network in sources.values():
            if isinstance(network, FSDPModule):
                network.unshard()  # on all processes: some may have no clip
        jobs = product(sorted(config.samples.steps, reverse=True), sources, range(len(prompts)))
        latents = {
            (name, n, k): sample(config, sources[name].network, noise[k, None], prompt[k, None], n).cpu()  # uncounted
            for n, name, k in [*jobs][accelerator.process_index :: accelerator.num_processes]
        }
        wait()
        latents = {job: clip for some in gather_object([latents]) for job, clip in some.items()}
        if accelerator.is_main_process:
            vae.to(device)
            clips = {}
            for name, n in product(sources, config.samples.steps):
                videos = [decode_latents(vae, latents[name, n, k].to(device)).cpu() for k in range(len(prompts))]
                clips[f"{name}{step_label(n)}"] = torch.cat(videos)
            vae.cpu()
            fps = fps_of(vae.config.z_dim)
            write_clips(Path(config.output) / "samples" / f"{done:06}", clips, prompts, fps)
            log_clips(clips, done, accelerator, fps)
        for network in sources.values():
            if isinstance(network, FSDPModule):
                network.reshard()

    return on_sample


def step_label(steps: int) -> str:
    """'1 step', '4 steps'."""
    return f"{steps} step{'s' * (steps > 1)}"
