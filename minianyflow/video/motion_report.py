"""How balls move in the clips of every trained network, beside codec data and redrawn flights: motion.json.

Each network is sampled as its stage is used: teachers with 16 Euler steps, students with four.
"""

from pathlib import Path

import torch
from torch import Tensor

from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.networks.codec import Codec
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import rounded, write_report
from minianyflow.times import generator
from minianyflow.video.motion import flights, motion, spread
from minianyflow.video.report import held_out, how_sampled, prompts_for, sample, seeds_in
from minianyflow.video.stages import STAGES, WEIGHTS, path_of
from toy_data import blobs

COUNT = 512  # clips, half of each prompt
REDRAW = 8  # the frame at which a redrawn flight gets another velocity
TEACHER_NFE, NFE = 16, 4
LONG = 65  # frames


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
    for name in STAGES:
        if name != "codec":
            how = how_sampled(name)
            nfe = TEACHER_NFE if how.endswith("euler") else NFE
            for seed in seeds_in(weights, name):
                fixed = path_of(weights, name, seed), codec_path
                jobs[name, seed] = (measure_network, (*fixed, how, nfe, reference))
            if how == "causal":
                jobs[name, "long"] = (pair_distances, (path_of(weights, name), codec_path))
    for row, name, how in (("guided_teacher", "teacher", "guided euler"), ("inertia_diagonal", "inertia", "euler")):
        jobs[row, 0] = (measure_network, (path_of(weights, name), codec_path, how, TEACHER_NFE, reference))
    with staging_folder(output) as folder:
        results, report = run_jobs(jobs, workers), {"clips": COUNT, "floors": floors(codec, reference)}
        for (name, seed), figures in results.items():
            part = report.setdefault("long" if seed == "long" else "methods", {})
            if seed == "long":
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
