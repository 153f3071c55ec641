"""Any-step reports of the video students, in the form of the plane's: what each reaches at 1 to 128 steps.

All start from the same noises (scrambled Sobol), half of each prompt. Latents are measured against held-out ones,
decoded videos against what a blob video is.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minianyflow.flow_map import tangent, velocity
from minianyflow.guidance import guided
from minianyflow.measures import frechet_distance, path_error, sliced_w2, sobol_noise
from minianyflow.networks.causal import CausalNetwork, causal_rollout
from minianyflow.networks.codec import Codec
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import KINDS, load_codec, load_network, read_weights
from minianyflow.samplers import sample_consistency, sample_euler, sample_flow_map, sample_ode
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import mean, rounded, seed_means, write_report
from minianyflow.support.reports import text_table as table  # noqa: F401 (of the command)
from minianyflow.times import generator, time_grid
from minianyflow.video.measures import drift, summary
from minianyflow.video.stages import GUIDANCE, STAGES, WEIGHTS, path_of
from toy_data import blobs

NFE = (1, 2, 4, 8, 16, 32, 64, 128)
CAUSAL_NFE = (1, 2, 4, 8, 16)  # per chunk
COUNT = 2048  # clips measured as latents
SEEN = 512  # of them decoded and measured as videos
PIECE = 256  # clips sampled together
FRAMES, LONG = 17, 33
CHUNKS = (1, 2, 2)
PADDED = 4  # the step count at which stock's padding is measured
COST = ("steps", "forwards", "backwards", "seconds")


def prompts_for(count: int) -> tuple[Tensor, Tensor]:
    """Embeddings (count, L, D), half of them of one ball and half of two, and the numbers of balls (count,)."""
    which = torch.randperm(count, generator=generator(103)) % 2
    return TextEncoder()(blobs.PROMPTS)[which], which + 1


def how_sampled(name: str) -> str:
    """Which sampler a stage of this name takes."""
    known = {"teacher": "euler", "inertia_teacher": "euler", "consistency": "consistency"}
    known |= {"causal_teacher": "causal euler"}
    return known.get(name, "causal" if name.startswith("causal") else "flow_map")


@torch.no_grad()
def sample(how: str, network, z: Tensor, prompt: Tensor, nfe: int) -> Tensor:
    """Where `nfe` evaluations take the noise z (B, F, C, H, W); (B, F, C, H, W).

    how: "euler" (a teacher), "consistency" (re-noised), "flow_map", or, with `nfe` evaluations per chunk, "causal" and
    "causal euler"; "ode", a teacher's by dopri5; "guided euler" and "guided ode" with the guidance that students learn.
    """
    times, ends, v = time_grid(nfe), [], partial(velocity, network)
    if how.startswith("guided"):
        v = guided(v, {"prompt": TextEncoder()([""])}, GUIDANCE)
    for index, (noise, text) in enumerate(zip(z.split(PIECE), prompt.split(PIECE), strict=True)):
        if how.startswith("causal"):
            u = network if how == "causal" else tangent(network)
            path = causal_rollout(u, noise, times, text, network.first, network.rest)
        elif how.endswith("euler"):
            path = sample_euler(v, noise, times, prompt=text)
        elif how.endswith("ode"):
            path = sample_ode(v, noise, torch.tensor([1.0, 0.0]), tolerance=1e-3, prompt=text)
        elif how == "consistency":
            path = sample_consistency(network, noise, times, generator(nfe, index), prompt=text)
        else:
            path = sample_flow_map(network, noise, times, prompt=text)
        ends.append(path[-1])
    return torch.cat(ends)


def measure(latents: Tensor, reference: Tensor, codec: Codec, balls: Tensor, partition=None) -> dict:
    """All measures of latents (n, F, C, H, W) whose prompts ask for `balls` (n,); of the first SEEN as videos."""
    figures = {"sliced_w2": sliced_w2(latents, reference), "frechet": frechet_distance(latents, reference)}
    drifts = {"drift": drift(latents, reference, partition)} if partition else {}
    return figures | drifts | summary(codec.decode(latents[:SEEN]), balls[:SEEN], partition)


def measure_network(path, codec_path, how, reference, nfes, quiet=False, position=0, padded=False, only_w2=False):
    """Sample a network at every step count and measure: ({nfe: figures}, {nfe: ends}); only_w2: by sliced W2 alone.

    padded: a causal one with the zero keys of stock diffusers.
    """
    torch.set_num_threads(1)
    network, codec, z = load_network(path), load_codec(codec_path), sobol_noise(COUNT, reference.shape[1:])
    if padded:
        network = CausalNetwork(network.transformer, network.first, network.rest, network.timesteps, padded)
    prompt, balls = prompts_for(COUNT)
    partition = network.partition(z.shape[1]) if how.startswith("causal") else None
    figures, ends = {}, {}
    bar = {"desc": f"measuring {Path(path).stem}", "position": position, "disable": quiet or None, "unit": "sampler"}
    for nfe in tqdm(nfes, **bar):
        ends[nfe] = sample(how, network, z, prompt, nfe)
        few = {"sliced_w2": sliced_w2(ends[nfe], reference)} if only_w2 else None
        figures[nfe] = few or measure(ends[nfe], reference, codec, balls, partition)
    return figures, ends


def measure_long(path, codec_path, position=0, nfe=4) -> dict:
    """Clips about twice as long as those trained on, made chunk by chunk: the measures and the drift of each chunk."""
    torch.set_num_threads(1)
    network, codec = load_network(path), load_codec(codec_path)
    (reference, other), _ = held_out(codec, LONG, SEEN)
    z, (prompt, balls) = sobol_noise(SEEN, reference.shape[1:]), prompts_for(SEEN)
    partition = network.partition(z.shape[1])
    ends = sample("causal", network, z, prompt, nfe)
    drifts = {"drift": drift(ends, reference, partition), "drift_of_data": drift(other, reference, partition)}
    return summary(codec.decode(ends), balls, partition) | drifts


def held_out(codec: Codec, frames: int = FRAMES, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Latents (2, count, F, C, h, w) of clips that nothing trained on, twice, and the numbers of balls (count,)."""
    clips = [blobs.sample(count or COUNT, generator(seed), frames) for seed in (101, 102)]
    return torch.stack([codec.encode(sampled.video) for sampled in clips]), clips[0].balls


def run(
    weights: str | Path = WEIGHTS,
    output: str | Path = "outputs/video",
    names: Sequence[str] | None = None,
    nfes: Sequence[int] = NFE,
    workers: int = 2,
    quiet: bool = False,
    extras: bool = True,
) -> dict:
    """Sample and measure every trained network in `weights`; writes and returns the report, any_step.json.

    names: stages, by default all that are there; every seed that is there. extras: all measures beside sliced W2, the
    teacher guided and its exact ODE, long clips and stock's padding for causal students, and the pictures. All files
    or none.
    """
    names = trained_in(weights) if names is None else list(names)
    if min(nfes, default=0) < 1 or not {*nfes} & {*CAUSAL_NFE}:
        raise InputError(f"step counts {(*nfes,)}; expected 1 or more, with one of {CAUSAL_NFE}: causal take those")
    codec_path = path_of(weights, "codec")
    codec = load_codec(codec_path)
    (reference, other), balls = held_out(codec)

    def steps(name):
        return [nfe for nfe in nfes if not name.startswith("causal") or nfe in CAUSAL_NFE]

    def job(name, nfes, seed=0, how=None, **options):
        fixed = path_of(weights, name, seed), codec_path, how or how_sampled(name), reference, nfes, quiet
        return partial(measure_network, *fixed, only_w2=not extras, **options), ()

    jobs = {(name, seed): job(name, steps(name), seed) for name in names for seed in seeds_in(weights, name)}
    if "teacher" in names and extras:
        jobs["teacher", "guided euler"] = job("teacher", nfes, how="guided euler")
        jobs |= {("teacher", how): job("teacher", (1,), how=how) for how in ("ode", "guided ode")}
    causal = [name for name in names if how_sampled(name) == "causal" and extras]
    for name in causal:
        jobs[name, "long"] = (measure_long, (path_of(weights, name), codec_path))
        if PADDED in steps(name):
            jobs[name, "padded"] = job(name, (PADDED,), padded=True)
    with staging_folder(output) as folder:
        results = run_jobs(jobs, workers)
        _, guided_ends = results.get(("teacher", "guided euler"), (None, None))
        target = guided_ends[max(nfes)] if guided_ends else None
        report = {
            "dataset": "blobs",
            "measure": {"latents": COUNT, "videos": SEEN, "directions": 128, "noise": "scrambled Sobol"},
            "floors": floors(reference, other, codec, balls),
            "methods": {name: in_report(name, results, weights, steps(name), target) for name in names},
            "long": {name: results[name, "long"] for name in causal},
            "padding": {name: padding(name, results) for name in causal if (name, "padded") in results},
        }
        if guided_ends:
            report["teacher_ode"] = results["teacher", "ode"][0][1]
            report["guided_teacher_ode"] = results["teacher", "guided ode"][0][1]
            by_nfe, _ = results["teacher", "guided euler"]
            report["guided_teacher"] = {str(nfe): figures for nfe, figures in by_nfe.items()}
        report["costs"] = {name: costs(name, weights) for name in ("codec", *names)}
        report = rounded(report)
        write_report(report, folder / "any_step.json")
        if extras:
            from minianyflow.video.figures import save_figures

            clips = [int((prompts_for(COUNT)[1] == balls).nonzero()[0]) for balls in (1, 2)]
            save_figures(report, {name: results[name, 0][1] for name in names}, clips, codec, folder)
    return report


def padding(name: str, results: dict) -> dict:
    """What the zero keys of stock diffusers do to a causal student, from the same noise."""
    (ours, our_ends), (stock, stock_ends) = results[name, 0], results[name, "padded"]
    difference = (our_ends[PADDED] - stock_ends[PADDED]).square().mean().sqrt()
    return {"ours": ours[PADDED], "stock": stock[PADDED], "root_mean_square_difference": float(difference)}


def trained_in(weights: str | Path) -> list[str]:
    """The stages after the codec that a folder holds; all, if it holds none: reading them names what is missing."""
    names = [name for name, stage in STAGES.items() if stage.kind != "codec"]
    return [name for name in names if any(path_of(weights, name, s).exists() for s in STAGES[name].seeds)] or names


def seeds_in(weights: str | Path, name: str) -> Sequence[int]:
    """The seeds of a stage that a folder holds; the first at least, so that reading it names what is missing."""
    return [seed for seed in STAGES[name].seeds if path_of(weights, name, seed).exists()] or STAGES[name].seeds[:1]


def floors(reference: Tensor, other: Tensor, codec: Codec, balls: Tensor) -> dict:
    """What the measures read where there is no error: data against data, and data through the codec."""
    through = measure(other, reference, codec, balls, CHUNKS)
    laws = {name: through[name] for name in ("sliced_w2", "frechet", "drift")}
    clips = blobs.sample(SEEN, generator(7))
    return {"data": laws | summary(clips.video, clips.balls, CHUNKS), "codec": through}


def in_report(name: str, results: dict, weights: str | Path, nfes: Sequence[int], target: Tensor | None) -> dict:
    """One stage in the JSON: per measure a list over step counts for each seed, and its cost."""
    seeds = seeds_in(weights, name)
    by_seed = [results[name, seed] for seed in seeds]
    entry = {"seeds": list(seeds), "nfe": list(nfes), **costs(name, weights)}
    for key in by_seed[0][0][nfes[0]]:
        entry[key] = [[figures[nfe][key] for nfe in nfes] for figures, _ in by_seed]
    if target is not None and not name.startswith("causal"):
        entry["from_teacher"] = [[path_error(ends[nfe], target) for nfe in nfes] for _, ends in by_seed]
    return entry


def costs(name: str, weights: str | Path) -> dict[str, float]:
    """What training one seed of a stage cost, the mean over its seeds, from their provenance."""
    by_seed = [read_weights(path_of(weights, name, seed), *KINDS)[2]["cost"] for seed in seeds_in(weights, name)]
    return {key: mean(cost[key] for cost in by_seed) for key in COST}


def comparison(folder: str | Path, workers: int = 2, quiet: bool = False, nfes: Sequence[int] = (1, 4)) -> str:
    """Measure the networks in `folder` at a few steps, note it in their provenance, and set it beside those committed.

    Returns text: sliced W2 x 1000, the mean over seeds, and what one seed cost.
    """
    before = {path.stem: json.loads(path.read_text("utf-8"))["figures"] for path in Path(WEIGHTS).glob("*-?.json")}
    report = run(folder, Path(folder) / "report", nfes=nfes, workers=workers, quiet=quiet, extras=False)
    _note_figures(path_of(folder, "codec"), report["floors"]["codec"])
    header = "".join(f"{f'NFE {nfe}':>8}{'before':>8}" for nfe in nfes)
    lines = ["sliced W2 x 1000".ljust(22) + header + "  seconds per seed"]
    for name, method in report["methods"].items():
        paths = [path_of(folder, name, seed) for seed in method["seeds"]]
        for path, values in zip(paths, method["sliced_w2"], strict=True):
            _note_figures(path, {"sliced_w2": dict(zip(map(str, nfes), values, strict=True))})
        line = name.ljust(22)
        for nfe, new in zip(nfes, seed_means(method["sliced_w2"]), strict=True):
            old = [before.get(path.stem, {}).get("sliced_w2", {}).get(str(nfe)) for path in paths]
            line += f"{1000 * new:>8.1f}" + (f"{1000 * mean(old):>8.1f}" if all(old) else f"{'-':>8}")
        lines.append(line + f"{method['seconds']:>18.0f}")
    return "\n".join(lines)


def _note_figures(path, figures):
    """Write what was measured into the JSON beside the weights at `path`, their provenance."""
    path = path.with_suffix(".json")
    with staging_folder(path.parent) as folder:
        write_report(json.loads(path.read_text("utf-8")) | {"figures": figures}, folder / path.name)
