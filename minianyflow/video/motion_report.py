"""How balls move in the clips of every trained network, beside codec data and redrawn flights: motion.json.

Each network is sampled as its stage is used: teachers with 16 Euler steps, students with four.
"""

from pathlib import Path

import torch
from torch import Tensor

from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.networks.codec import Codec
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import rounded, write_report
from minianyflow.times import generator
from minianyflow.video.motion import flights, motion, spread
from minianyflow.video.report import held_out, how_sampled, prompts_for, sample, seeds_in, trained_in
from minianyflow.video.stages import WEIGHTS, path_of
from toy_data import blobs

COUNT = 512  # clips, half of each prompt
REDRAW = 8  # the frame at which a redrawn flight gets another velocity
TEACHER_NFE, NFE = 16, 4
LONG = 65  # frames
DRAWS = 3  # of noise and reference, COUNT clips of each prompt, for networks that keep velocities
DRAWN = {"inertia_teacher": (16,), "inertia": (4, 8)}


def measure_motion(latents: Tensor, balls: Tensor, codec: Codec, reference: dict) -> dict:
    """`motion` and `spread` of latents (n, F, C, H, W) with `balls` (n,), by prompt, and sliced W2 of all."""
    figures = {"sliced_w2": sliced_w2(latents, reference["latents"])}
    for number, prompt in enumerate(blobs.PROMPTS, 1):
        some = latents[balls == number]
        figures[prompt] = motion(flights(codec.decode(some), number), reference[prompt]) | spread(some)
    return figures


def make_reference(codec: Codec) -> dict:
    """Codec data: latents of COUNT clips, and the flights of each number of balls by prompt."""
    (latents, _), balls = held_out(codec, count=COUNT)
    numbered = enumerate(blobs.PROMPTS, 1)
    return {"latents": latents} | {prompt: flights(codec.decode(latents[balls == k]), k) for k, prompt in numbered}


def measure_network(path: Path, codec_path: Path, how: str, nfe: int, reference: dict, position: int = 0) -> dict:
    """The motion of one network's clips; position: unused, of run_jobs."""
    torch.set_num_threads(1)
    network, codec, (prompt, balls) = load_network(path), load_codec(codec_path), prompts_for(COUNT)
    z = sobol_noise(COUNT, reference["latents"].shape[1:])
    return {"nfe": nfe} | measure_motion(sample(how, network, z, prompt, nfe), balls, codec, reference)


def measure_draws(path: Path, codec_path: Path, how: str, nfe: int, references: list, position: int = 0) -> list[dict]:
    """The motion of COUNT clips of each prompt, {prompt: `motion`}, for each draw of noise and of its reference."""
    torch.set_num_threads(1)
    network, codec, texts = load_network(path), load_codec(codec_path), TextEncoder()(blobs.PROMPTS)
    draws = []
    for seed, reference in enumerate(references):
        z = torch.randn(COUNT, 5, 4, 4, 4, generator=generator(105, seed))
        ends = [sample(how, network, z, text.expand(COUNT, -1, -1), nfe) for text in texts]
        found = [flights(codec.decode(clips), number) for number, clips in enumerate(ends, 1)]
        draws.append(
            {prompt: motion(seen, reference[prompt]) for prompt, seen in zip(blobs.PROMPTS, found, strict=True)}
        )
    return draws


def draw_references(codec: Codec) -> list[dict]:
    """For each draw the flights of COUNT clips of codec data, by prompt; and of one draw more, data to measure."""
    drawn = []
    for seed in range(DRAWS + 1):
        clips = blobs.sample(2 * COUNT, generator(106, seed))
        latents = codec.encode(clips.video)
        numbered = enumerate(blobs.PROMPTS, 1)
        drawn.append({prompt: flights(codec.decode(latents[clips.balls == k]), k) for k, prompt in numbered})
    return drawn


def pair_distances(path: Path, codec_path: Path, position: int = 0) -> list[float]:
    """Mean pair distance of a causal student's latents over that of data, chunk by chunk of clips of 65 frames."""
    torch.set_num_threads(1)
    network, codec = load_network(path), load_codec(codec_path)
    (data, _), _ = held_out(codec, LONG, COUNT // 2)
    ends = sample("causal", network, sobol_noise(COUNT // 2, data.shape[1:]), prompts_for(COUNT // 2)[0], NFE)
    chunks = network.partition(data.shape[1])
    ours, theirs = ([spread(part)["pair_distance"] for part in clips.split(chunks, 1)] for clips in (ends, data))
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def run(weights: str | Path = WEIGHTS, output: str | Path = "outputs/video", workers: int = 2) -> dict:
    """Measure every network in `weights`; writes and returns motion.json."""
    codec_path = path_of(weights, "codec")
    codec, jobs = load_codec(codec_path), {}
    reference = make_reference(codec)
    for name in trained_in(weights):
        how = how_sampled(name)
        nfe = TEACHER_NFE if how.endswith("euler") else NFE
        for seed in seeds_in(weights, name):
            jobs[name, seed] = (measure_network, (path_of(weights, name, seed), codec_path, how, nfe, reference))
        if how == "causal":
            jobs[name, "long"] = (pair_distances, (path_of(weights, name), codec_path))
    fixed = path_of(weights, "teacher"), codec_path, "guided euler", TEACHER_NFE, reference
    jobs["guided_teacher", 0] = (measure_network, fixed)
    *references, other = draw_references(codec)
    for name, nfes in DRAWN.items():
        for nfe in nfes:
            fixed = path_of(weights, name), codec_path, how_sampled(name), nfe
            jobs[f"{name} {nfe}", "draws"] = (measure_draws, (*fixed, references))
    with staging_folder(output) as folder:
        results, report = run_jobs(jobs, workers), {"clips": COUNT, "floors": floors(codec, reference)}
        report["draws"] = {"data": [{name: motion(other[name], one[name]) for name in one} for one in references]}
        for (name, seed), figures in results.items():
            part = report.setdefault(seed if isinstance(seed, str) else "methods", {})
            if isinstance(seed, str):
                part[name] = figures
            else:
                part.setdefault(name, []).append(figures)
        write_report(rounded(report), folder / "motion.json")
    return rounded(report)


def floors(codec: Codec, reference: dict) -> dict:
    """What data read through the codec, and what redrawn flights do."""
    clips = {"data": blobs.sample(COUNT, generator(104)), "redrawn": blobs.sample(COUNT, generator(104), redraw=REDRAW)}
    return {
        name: measure_motion(codec.encode(drawn.video), drawn.balls, codec, reference) for name, drawn in clips.items()
    }
