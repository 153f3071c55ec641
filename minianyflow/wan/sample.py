"""Clips of one source at any step counts, as videos and a contact sheet."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minianyflow.support.errors import InputError
from minianyflow.wan.config import find_device
from minianyflow.wan.data.options import DTYPES
from minianyflow.wan.data.read_video import read_video
from minianyflow.wan.data.write_video import write_clips
from minianyflow.wan.folders import decode_latents, embed, encode_video, load_parts
from minianyflow.wan.sampler import sample, step_label, stock_noise
from minianyflow.wan.sources import Source, check_clip, check_numbers, find_source


def sample_clips(
    source: str,
    prompts: list[str],
    steps: list[int],
    output: str | Path,
    clip: dict[str, int] | None = None,
    seed: int = 0,
    start: str | Path | None = None,
    context: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    write: Sequence[str] = (),
    base: str | None = None,
) -> None:
    """Sample every prompt at every step count; write the clips and sheet.png to `output`.

    The noise of prompt k is that of diffusers' pipelines for the seed `seed` + k. write: "latents" (F, C, h, w) and
    "png", frames without loss, beside the mp4 files. base: of an exported LoRA, where it is now. clip:
    changes to the source's frames, height, width and length (tokens per prompt). start: a picture or a video to start
    from, and `context` how many of its frames; None: the first two chunks. precision: "bf16" or "fp32"; None: bf16 on
    a GPU. Raises InputError for a source, a clip or a start that does not fit.
    """
    check_numbers(steps)
    loaded, clip, frames, device, dtype = open_source(source, clip, start, context, device, precision, base)
    config = loaded.config
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"cannot write to {output} ({problem.strerror}); name another folder") from None
    embedded = embed(config.base, prompts, clip["length"], dtype, device)
    vae = load_parts(config.base, "vae")[0].to(device)
    prefix = None if frames is None else encode_video(vae, frames.to(device))
    made = {step_label(count): [] for count in steps}
    with tqdm(total=len(prompts) * sum(set(steps)), unit="step", desc="sampling") as bar:
        for number, prompt in enumerate(embedded.split(1)):
            noise = stock_noise(loaded.shape(clip), seed + number).to(device)
            for count in dict.fromkeys(steps):
                made[step_label(count)].append(sample(config, loaded.network, noise, prompt, count, prefix))
                bar.update(count)
    latents = {label: torch.cat(some) for label, some in made.items()}
    clips = {label: decode_latents(vae, some).cpu() for label, some in latents.items()}
    write_clips(output, clips, prompts, loaded.fps, latents=latents if "latents" in write else None, png="png" in write)


def open_source(
    source: str,
    clip: dict[str, int] | None,
    start: str | Path | None,
    context: int | None,
    device: str,
    precision: str | None,
    base: str | None,
) -> tuple[Source, dict[str, int], Tensor | None, torch.device, torch.dtype]:
    """What `sample_clips` was given: source, sizes of its clip, first frames (1, T, 3, H, W), device and dtype."""
    check_numbers((), frames=(clip or {}).get("frames"), context=context)
    if start and not Path(start).is_file():
        raise InputError(f"no file {start}; expected a picture or a video")
    device = find_device(device)
    dtype = DTYPES[precision or ("bf16" if device.type == "cuda" else "fp32")]
    loaded = find_source(source, dtype, device, base)
    config, clip = loaded.config, loaded.clip | (clip or {})
    context = (context or 4 * (config.causal.first + config.causal.rest) - 3) if start else 0
    check_clip(loaded, clip, context)
    frames = read_video(start, context, clip["height"], clip["width"], loaded.fps) if start else None
    return loaded, clip, frames, device, dtype
