"""Any-step reports of the video students, in the form of the plane's: what each reaches at 1 to 64 steps.

The same noises for all (scrambled Sobol), half of each prompt; latents are measured against held-out ones, decoded
videos against what a blob video is. Excess is a measure minus the codec's own, that of data through the codec.
"""

import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from minianyflow.causal import CausalNetwork, causal_rollout, chunk_partition
from minianyflow.flow_map import velocity
from minianyflow.measures import path_error, sliced_w2, sobol_noise
from minianyflow.pairs import generator
from minianyflow.running import run_jobs, staged
from minianyflow.samplers import sample_consistency, sample_euler, sample_flow_map
from minianyflow.schedules import time_grid
from minianyflow.video_measures import drift, frechet_distance, summary
from minianyflow.video_stages import STAGES, WEIGHTS, path_of
from minianyflow.wan import TextEncoder
from minianyflow.weights import KINDS, load_codec, load_network, read_weights
from toy_data import blobs

NFE = (1, 2, 4, 8, 16, 32, 64)
COUNT = 2048  # clips measured as latents
SEEN = 512  # of them decoded and measured as videos
PIECE = 256
FRAMES, LONG = 17, 33
MEASURES = ("sliced_w2", "frechet", "prompt_obeyed", "light", "light_kept", "from_ideal", "acceleration")
COST = ("steps", "forwards", "backwards", "seconds")


def prompts_for(count):
    """Embeddings (count, L, D) of one ball and two balls in turn, and the numbers of balls (count,)."""
    which = torch.arange(count) % 2
    return TextEncoder()(blobs.PROMPTS)[which], which + 1


@torch.no_grad()
def sample(how, network, z, prompt, nfe):
    """Where `nfe` evaluations take the noise z (B, F, C, H, W); (B, F, C, H, W).

    how: "euler" (a teacher), "consistency" (re-noised), "flow_map", or "causal", chunk by chunk, `nfe` a chunk.
    """
    times, ends = time_grid(nfe), []
    for index, (noise, text) in enumerate(zip(z.split(PIECE), prompt.split(PIECE), strict=True)):
        if how == "causal":
            path = causal_rollout(network, noise, times, text, network.first, network.rest)
        elif how == "euler":
            path = sample_euler(lambda z, t, **c: velocity(network, z, t, **c), noise, times, prompt=text)
        elif how == "consistency":
            path = sample_consistency(network, noise, times, generator(nfe, index), prompt=text)
        else:
            path = sample_flow_map(network, noise, times, prompt=text)
        ends.append(path[-1])
    return torch.cat(ends)


def measure(latents, reference, codec, balls, partition=None):
    """All measures of latents (n, F, C, H, W) whose prompts asked for `balls` (n,): {name: float}, and by chunk."""
    figures = {"sliced_w2": sliced_w2(latents, reference), "frechet": frechet_distance(latents, reference)}
    return figures | look(latents, codec, balls, partition)


def look(latents, codec, balls, partition=None):
    """The measures of the first SEEN clips as videos."""
    return summary(codec.decode(latents[:SEEN]), balls[:SEEN], partition)


def how_sampled(name):
    """Which sampler a stage of this name takes."""
    if name in ("teacher", "consistency"):
        return {"teacher": "euler", "consistency": "consistency"}[name]
    return "causal" if name.startswith("causal") else "flow_map"


def measure_network(path, codec_path, how, reference, nfes, quiet=False, position=0):
    """Sample one trained network at every step count and measure: ({nfe: figures}, {nfe: ends})."""
    torch.set_num_threads(1)
    network, codec, z = load_network(path), load_codec(codec_path), sobol_noise(COUNT, reference.shape[1:])
    prompt, balls = prompts_for(COUNT)
    partition = chunk_partition(z.shape[1], network.first, network.rest) if how == "causal" else None
    figures, ends = {}, {}
    bar = {"desc": f"measuring {Path(path).stem}", "position": position, "disable": quiet or None, "unit": "sampler"}
    for nfe in tqdm(nfes, **bar):
        ends[nfe] = sample(how, network, z, prompt, nfe)
        figures[nfe] = measure(ends[nfe], reference, codec, balls, partition)
    return figures, ends


def measure_long(path, codec_path, nfe=4, quiet=False, position=0):
    """Clips about twice as long as those trained on, chunk by chunk: the look of each chunk, and how far it drifts."""
    torch.set_num_threads(1)
    network, codec = load_network(path), load_codec(codec_path)
    (reference, other), balls = held_out(codec, LONG, SEEN)
    z = sobol_noise(SEEN, reference.shape[1:])
    partition = chunk_partition(z.shape[1], network.first, network.rest)
    ends = sample("causal", network, z, prompts_for(SEEN)[0], nfe)
    drifts = {"drift": drift(ends, reference, partition), "drift_of_data": drift(other, reference, partition)}
    return look(ends, codec, balls, partition) | drifts


def measure_padding(path, codec_path, reference, nfe=4, quiet=False, position=0):
    """The same noise with our attention and with stock's keys of zeros: how far ends move, and what it does to them."""
    torch.set_num_threads(1)
    network, codec, z = load_network(path), load_codec(codec_path), sobol_noise(COUNT, reference.shape[1:])
    prompt, balls = prompts_for(COUNT)
    ends = [
        sample(
            "causal",
            CausalNetwork(network.transformer, network.first, network.rest, network.timesteps, padded),
            z,
            prompt,
            nfe,
        )
        for padded in (False, True)
    ]
    partition = chunk_partition(z.shape[1], network.first, network.rest)
    figures = {
        name: measure(each, reference, codec, balls, partition)
        for name, each in zip(("ours", "stock"), ends, strict=True)
    }
    return figures | {"root_mean_square_difference": float((ends[0] - ends[1]).square().mean().sqrt())}


def held_out(codec, frames=FRAMES, count=None):
    """Latents (2, count, F, C, h, w) of clips that nothing trained on, twice, and the numbers of balls (count,)."""
    clips = [blobs.sample(count or COUNT, generator(101 + each), frames) for each in range(2)]
    return torch.stack([codec.encode(each.video) for each in clips]), clips[0].balls


def run(weights=WEIGHTS, output="outputs/video", names=None, nfes=NFE, workers=2, quiet=False):
    """Sample and measure every trained network in `weights`; writes any_step.json and any_step.png. Returns the report.

    names: stages, all by default. Written whole or not at all.
    """
    names = [name for name, stage in STAGES.items() if stage.kind != "codec"] if names is None else list(names)
    codec = load_codec(path_of(weights, "codec"))
    (reference, other), balls = held_out(codec)
    jobs = {
        (name, seed): (
            measure_network,
            (path_of(weights, name, seed), path_of(weights, "codec"), how_sampled(name), reference, nfes, quiet),
        )
        for name in names
        for seed in STAGES[name].seeds
    }
    causal = [name for name in names if how_sampled(name) == "causal"]
    for name in causal:
        place = (path_of(weights, name), path_of(weights, "codec"))
        jobs[name, "long"] = (measure_long, (*place, 4, quiet))
        jobs[name, "padding"] = (measure_padding, (*place, reference, 4, quiet))
    with staged(output) as folder:
        results = run_jobs(jobs, workers)
        target = results["teacher", 0][1][max(nfes)] if "teacher" in names else None
        report = {
            "dataset": "blobs",
            "measure": {"latents": COUNT, "videos": SEEN, "directions": 128, "noise": "scrambled Sobol"},
            "floors": {"codec": measure(other, reference, codec, balls)},
            "methods": {name: in_report(name, results, weights, nfes, target) for name in names},
        }
        report |= {way: {name: results[name, way] for name in causal} for way in ("long", "padding")}
        report["costs"] = {name: costs(name, weights) for name in STAGES}
        (folder / "any_step.json").write_text(json.dumps(rounded(report), indent=1, allow_nan=False) + "\n")
    return report


def in_report(name, results, weights, nfes, target):
    """One stage as it stands in the JSON: for every measure a list over step counts for each seed, and its cost."""
    seeds = STAGES[name].seeds
    by_seed = [results[name, seed][0] for seed in seeds]
    out = {"seeds": list(seeds), "nfe": list(nfes), **costs(name, weights)}
    for key in by_seed[0][nfes[0]]:
        out[key] = [[figures[nfe][key] for nfe in nfes] for figures in by_seed]
    if target is not None and not name.startswith("causal"):
        out["from_teacher"] = [[path_error(results[name, seed][1][nfe], target) for nfe in nfes] for seed in seeds]
    return out


def costs(name, weights):
    """What training one seed of a stage cost, the mean over its seeds, from their provenance."""
    each = [read_weights(path_of(weights, name, seed), *KINDS)[2]["cost"] for seed in STAGES[name].seeds]
    return {key: sum(cost[key] for cost in each) / len(each) for key in COST}


def rounded(value):
    """Numbers to six places, NaN to None, all the way down: what JSON can hold and people can read."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return (round(value, 6) if math.isfinite(value) else None) if isinstance(value, float) else value


def comparison(folder, workers=2, quiet=False, nfes=(1, 4)):
    """Text: sliced W2 x 1000 at a few steps of every network in `folder` beside those committed, stage by stage."""
    here, there = (
        run(each, Path(folder) / "report", nfes=nfes, workers=workers, quiet=quiet) for each in (folder, WEIGHTS)
    )
    lines = ["sliced W2 x 1000".ljust(24) + "".join(f"{f'{nfe} new':>10}{'committed':>10}" for nfe in nfes)]
    for name, method in here["methods"].items():
        pairs = zip(_means(method["sliced_w2"]), _means(there["methods"][name]["sliced_w2"]), strict=True)
        lines.append(name.ljust(24) + "".join(f"{1000 * new:>10.1f}{1000 * old:>10.1f}" for new, old in pairs))
    return "\n".join(lines)


def table(report, figure="sliced_w2", scale=1000):
    """One figure of a report as text: a row a method, a column a step count; the mean over seeds."""
    nfes = next(iter(report["methods"].values()))["nfe"]
    lines = [f"{figure} x {scale}".ljust(24) + "".join(f"{nfe:>8}" for nfe in nfes)]
    for name, method in report["methods"].items():
        lines.append(name.ljust(24) + "".join(f"{scale * mean:>8.1f}" for mean in _means(method[figure])))
    return "\n".join([*lines, "codec".ljust(24) + f"{scale * report['floors']['codec'][figure]:>8.1f}"])


def _means(by_seed):
    return [sum(column) / len(column) for column in zip(*by_seed, strict=True)]
