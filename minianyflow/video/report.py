"""Any-step reports of the video students, in the form of the plane's: what each reaches at 1 to 128 steps.

The same noises for all (scrambled Sobol), half of each prompt; latents are measured against held-out ones, decoded
videos against what a blob video is. Excess is a measure minus the codec's own, that of data through the codec.
"""

import json
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minianyflow.flow_map import tangent, velocity
from minianyflow.guidance import guided
from minianyflow.measures import frechet_distance, path_error, sliced_w2, sobol_noise
from minianyflow.networks.causal import CausalNetwork, causal_rollout
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import KINDS, load_codec, load_network, read_weights
from minianyflow.samplers import sample_consistency, sample_euler, sample_flow_map, sample_ode
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.support.reports import rounded
from minianyflow.times import generator, time_grid
from minianyflow.video.measures import drift, summary
from minianyflow.video.stages import GUIDANCE, STAGES, WEIGHTS, path_of
from toy_data import blobs

NFE = (1, 2, 4, 8, 16, 32, 64, 128)
COUNT = 2048  # clips measured as latents
SEEN = 512  # of them decoded and measured as videos
PIECE = 256
FRAMES, LONG = 17, 33
CHUNKS = (1, 2, 2)
CURVES = ("teacher", "eulerian", "lagrangian", "semigroup", "mixed", "consistency", "on_policy")
SHOWN = (*(("teacher", nfe) for nfe in (1, 4, 32)), *(("eulerian", nfe) for nfe in (1, 4, 32)), ("consistency", 1))
SHOWN += (("consistency", 32), ("on_policy", 1), ("causal", 4))
CAUSAL_NFE = (1, 2, 4, 8, 16)  # a chunk
PADDED = 4  # at which stock's padding is measured
COST = ("steps", "forwards", "backwards", "seconds")


def prompts_for(count):
    """Embeddings (count, L, D), half of them of one ball and half of two, and the numbers of balls (count,).

    In random order, the same every time: in turn, they would go with the parity of Sobol points.
    """
    which = torch.randperm(count, generator=generator(103)) % 2
    return TextEncoder()(blobs.PROMPTS)[which], which + 1


@torch.no_grad()
def sample(how, network, z, prompt, nfe):
    """Where `nfe` evaluations take the noise z (B, F, C, H, W); (B, F, C, H, W).

    how: "euler" (a teacher), "consistency" (re-noised), "flow_map", or, chunk by chunk with `nfe` a chunk, "causal" and
    "causal euler". "ode" follows a teacher's ODE by dopri5 to a tolerance of 1e-3, whatever `nfe`. "guided euler" and
    "guided ode" are guided as what students learn: two forwards an evaluation.
    """
    times, ends = time_grid(nfe), []
    v, null = partial(velocity, network), {"prompt": TextEncoder()([""])}
    v = guided(v, null, GUIDANCE) if how.startswith("guided") else v
    for index, (noise, text) in enumerate(zip(z.split(PIECE), prompt.split(PIECE), strict=True)):
        if how.startswith("causal"):
            u = network if how == "causal" else tangent(network)
            path = causal_rollout(u, noise, times, text, network.first, network.rest)
        elif how.endswith("euler"):
            path = sample_euler(v, noise, times, prompt=text)
        elif how.endswith("ode"):
            ends_only = torch.tensor([1.0, 0.0])
            path = sample_ode(v, noise, ends_only, tolerance=1e-3, prompt=text)
        elif how == "consistency":
            path = sample_consistency(network, noise, times, generator(nfe, index), prompt=text)
        else:
            path = sample_flow_map(network, noise, times, prompt=text)
        ends.append(path[-1])
    return torch.cat(ends)


def measure(latents, reference, codec, balls, partition=None):
    """All measures of latents (n, F, C, H, W) whose prompts asked for `balls` (n,): {name: float}, and by chunk."""
    figures = {"sliced_w2": sliced_w2(latents, reference), "frechet": frechet_distance(latents, reference)}
    drifts = {"drift": drift(latents, reference, partition)} if partition else {}
    return figures | drifts | look(latents, codec, balls, partition)


def look(latents, codec, balls, partition=None):
    """The measures of the first SEEN clips as videos."""
    return summary(codec.decode(latents[:SEEN]), balls[:SEEN], partition)


def how_sampled(name):
    """Which sampler a stage of this name takes."""
    known = {"teacher": "euler", "consistency": "consistency", "causal_teacher": "causal euler"}
    return known.get(name, "causal" if name.startswith("causal") else "flow_map")


def measure_network(path, codec_path, how, reference, nfes, quiet=False, position=0, padded=False, laws=False):
    """Sample one trained network at every step count and measure: ({nfe: figures}, {nfe: ends}).

    padded: a causal one with stock's keys of zeros. laws: only sliced W2, without looking at videos.
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
        if laws:
            figures[nfe] = {"sliced_w2": sliced_w2(ends[nfe], reference)}
        else:
            figures[nfe] = measure(ends[nfe], reference, codec, balls, partition)
    return figures, ends


def measure_long(path, codec_path, position=0, nfe=4):
    """Clips about twice as long as those trained on, chunk by chunk: the look of each chunk, and how far it drifts."""
    torch.set_num_threads(1)
    network, codec = load_network(path), load_codec(codec_path)
    (reference, other), _ = held_out(codec, LONG, SEEN)
    z, (prompt, balls) = sobol_noise(SEEN, reference.shape[1:]), prompts_for(SEEN)
    partition = network.partition(z.shape[1])
    ends = sample("causal", network, z, prompt, nfe)
    drifts = {"drift": drift(ends, reference, partition), "drift_of_data": drift(other, reference, partition)}
    return look(ends, codec, balls, partition) | drifts


def padding(ours, stock):
    """What stock's keys of zeros do to the same noise; both as `measure_network` returns them."""
    difference = (ours[1][PADDED] - stock[1][PADDED]).square().mean().sqrt()
    return {"ours": ours[0][PADDED], "stock": stock[0][PADDED], "root_mean_square_difference": float(difference)}


def held_out(codec, frames=FRAMES, count=None):
    """Latents (2, count, F, C, h, w) of clips that nothing trained on, twice, and the numbers of balls (count,)."""
    clips = [blobs.sample(count or COUNT, generator(101 + each), frames) for each in range(2)]
    return torch.stack([codec.encode(each.video) for each in clips]), clips[0].balls


def run(weights=WEIGHTS, output="outputs/video", names=None, nfes=NFE, workers=2, quiet=False, extras=True):
    """Sample and measure every trained network in `weights`; returns the report, any_step.json.

    names: stages, all by default; every seed that is there. extras: all measures but sliced W2, the teacher
    guided, its exact ODE, long clips and stock's padding for causal students, and the pictures any_step.png,
    from_ideal.png and contact_sheet.png. Written whole or not at all.
    """
    names = [name for name, stage in STAGES.items() if stage.kind != "codec"] if names is None else list(names)
    if min(nfes, default=0) < 1 or not {*nfes} & {*CAUSAL_NFE}:
        raise InputError(
            f"step counts {(*nfes,)}; expected 1 or more, one of {CAUSAL_NFE} among them: causal take those"
        )
    codec = load_codec(path_of(weights, "codec"))
    (reference, other), balls = held_out(codec)

    def steps(name):
        return [nfe for nfe in nfes if not name.startswith("causal") or nfe in CAUSAL_NFE]

    def job(name, seed, nfes, how=None, **options):
        place = (path_of(weights, name, seed), path_of(weights, "codec"))
        return partial(
            measure_network, *place, how or how_sampled(name), reference, nfes, quiet, laws=not extras, **options
        ), ()

    jobs = {(name, seed): job(name, seed, steps(name)) for name in names for seed in seeds_in(weights, name)}
    if "teacher" in names and extras:
        jobs["teacher", "guided euler"] = job("teacher", 0, nfes, "guided euler")
        jobs |= {("teacher", how): job("teacher", 0, (1,), how) for how in ("ode", "guided ode")}
    causal = [name for name in names if how_sampled(name) == "causal" and extras]
    for name in causal:
        jobs[name, "long"] = (measure_long, (path_of(weights, name), path_of(weights, "codec")))
        if PADDED in steps(name):
            jobs[name, "padded"] = job(name, 0, (PADDED,), padded=True)
    with staging_folder(output) as folder:
        results = run_jobs(jobs, workers)
        target = results["teacher", "guided euler"][1][max(nfes)] if ("teacher", "guided euler") in jobs else None
        report = {
            "dataset": "blobs",
            "measure": {"latents": COUNT, "videos": SEEN, "directions": 128, "noise": "scrambled Sobol"},
            "floors": floors(reference, other, codec, balls),
            "methods": {name: in_report(name, results, weights, steps(name), target) for name in names},
        }
        report["long"] = {name: results[name, "long"] for name in causal}
        pairs = {name: (results[name, 0], results[name, "padded"]) for name in causal if (name, "padded") in results}
        report["padding"] = {name: padding(*pair) for name, pair in pairs.items()}
        if ("teacher", "ode") in results:
            report["teacher_ode"] = results["teacher", "ode"][0][1]
            report["guided_teacher_ode"] = results["teacher", "guided ode"][0][1]
            by_nfe = results["teacher", "guided euler"][0]
            report["guided_teacher"] = {str(nfe): figures for nfe, figures in by_nfe.items()}
        report["costs"] = {name: costs(name, weights) for name in ("codec", *names)}
        report = rounded(report)
        (folder / "any_step.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        if extras:
            draw(report, {name: results[name, 0][1] for name in names}, codec, folder)
    return report


def draw(report, ends, codec, folder):
    """The pictures of a report: any-step curves of two measures, and a contact sheet. ends: {stage: {nfe: latents}}."""
    from minianyflow.support.figures import save_figure
    from minianyflow.video.figures import any_step_curves, contact_sheet

    whole = report | {"methods": {name: each for name, each in report["methods"].items() if name in CURVES}}
    save_figure(any_step_curves(whole, "sliced_w2", "sliced W2 of latents"), folder / "any_step.png")
    save_figure(any_step_curves(whole, "from_ideal", "distance from ideal blobs"), folder / "from_ideal.png")
    clips = [int((prompts_for(COUNT)[1] == balls).nonzero()[0]) for balls in (1, 2)]
    rows = {"data": blobs.sample(2, generator(7)).video}
    for name, nfe in SHOWN:
        if nfe in ends.get(name, {}):
            label = "flow map" if name == "eulerian" else name.replace("_", "-")
            rows[f"{label}, {nfe}"] = codec.decode(ends[name][nfe][clips])
    save_figure(contact_sheet(rows), folder / "contact_sheet.png")


def seeds_in(weights, name):
    """The seeds of a stage that a folder holds; the first at least, or reading it says what is missing."""
    return [seed for seed in STAGES[name].seeds if path_of(weights, name, seed).exists()] or STAGES[name].seeds[:1]


def floors(reference, other, codec, balls):
    """What the measures read where there is no error: data against data, and data through the codec."""
    through = measure(other, reference, codec, balls, CHUNKS)
    clips = blobs.sample(SEEN, generator(7))
    kept = ("sliced_w2", "frechet", "drift")
    return {
        "data": {name: through[name] for name in kept} | summary(clips.video, clips.balls, CHUNKS),
        "codec": through,
    }


def in_report(name, results, weights, nfes, target):
    """One stage as it stands in the JSON: for every measure a list over step counts for each seed, and its cost."""
    seeds = seeds_in(weights, name)
    by_seed = [results[name, seed][0] for seed in seeds]
    out = {"seeds": list(seeds), "nfe": list(nfes), **costs(name, weights)}
    for key in by_seed[0][nfes[0]]:
        out[key] = [[figures[nfe][key] for nfe in nfes] for figures in by_seed]
    if target is not None and not name.startswith("causal"):
        out["from_teacher"] = [[path_error(results[name, seed][1][nfe], target) for nfe in nfes] for seed in seeds]
    return out


def costs(name, weights):
    """What training one seed of a stage cost, the mean over its seeds, from their provenance."""
    each = [read_weights(path_of(weights, name, seed), *KINDS)[2]["cost"] for seed in seeds_in(weights, name)]
    return {key: sum(cost[key] for cost in each) / len(each) for key in COST}


def comparison(folder, workers=2, quiet=False, nfes=(1, 4)):
    """Measure the networks in `folder` at a few steps, note it in their provenance, and set it beside those committed.

    Returns text: sliced W2 x 1000, the mean over seeds, and what one seed cost.
    """
    before = {path.stem: figures_of(path) for path in Path(WEIGHTS).glob("*.safetensors")}
    report = run(folder, Path(folder) / "report", nfes=nfes, workers=workers, quiet=quiet, extras=False)
    note_figures(path_of(folder, "codec"), report["floors"]["codec"])
    lines = [
        "sliced W2 x 1000".ljust(22) + "".join(f"{f'NFE {nfe}':>8}{'before':>8}" for nfe in nfes) + "  seconds a seed"
    ]
    for name, method in report["methods"].items():
        line = name.ljust(22)
        by_seed = dict(zip(method["seeds"], method["sliced_w2"], strict=True))
        for seed, values in by_seed.items():
            note_figures(path_of(folder, name, seed), {"sliced_w2": dict(zip(map(str, nfes), values, strict=True))})
        earlier = [before.get(path_of(folder, name, seed).stem, {}).get("sliced_w2", {}) for seed in by_seed]
        for nfe, new in zip(nfes, _means(method["sliced_w2"]), strict=True):
            old = [each.get(str(nfe)) for each in earlier]
            line += f"{1000 * new:>8.1f}" + (f"{1000 * sum(old) / len(old):>8.1f}" if all(old) else f"{'-':>8}")
        lines.append(line + f"{method['seconds']:>16.0f}")
    return "\n".join(lines)


def note_figures(path, figures):
    """Write what was measured into the provenance of the weights at `path`."""
    beside = Path(path).with_suffix(".json")
    made = json.loads(beside.read_text())
    with staging_folder(beside.parent) as folder:
        (folder / beside.name).write_text(json.dumps(made | {"figures": figures}, indent=1) + "\n")


def figures_of(path):
    """The figures noted in the provenance of the weights at `path`; {} if there are none."""
    beside = Path(path).with_suffix(".json")
    return json.loads(beside.read_text()).get("figures", {}) if beside.exists() else {}


def table(report, figure="sliced_w2", scale=1000):
    """One figure of a report as text: a row a method, a column a step count; the mean over seeds."""
    nfes = next(iter(report["methods"].values()))["nfe"]
    lines = [f"{figure} x {scale}".ljust(24) + "".join(f"{nfe:>8}" for nfe in nfes)]
    for name, method in report["methods"].items():
        lines.append(name.ljust(24) + "".join(f"{scale * mean:>8.1f}" for mean in _means(method[figure])))
    return "\n".join([*lines, "codec".ljust(24) + f"{scale * report['floors']['codec'][figure]:>8.1f}"])


def _means(by_seed):
    return [sum(column) / len(column) for column in zip(*by_seed, strict=True)]
