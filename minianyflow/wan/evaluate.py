"""What more steps buy: sources sampled from the same noise at any step counts, measured, drawn, set side by side.

Always, and with no download: distances of latents from held-out ones, how far a sample is from the source's own sample
of most steps, how smoothly frames change, what it cost. VBench's scores where its package and models are.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open

from minianyflow.measures import frechet_distance, path_error, sliced_w2
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.support.reports import rounded
from minianyflow.wan.config import find_device
from minianyflow.wan.data.clips import WAN_NULL
from minianyflow.wan.data.shards import NULL, LatentShards
from minianyflow.wan.data.videos import WAN_CLIP, read_video, stills
from minianyflow.wan.folders import decode_latents, load_parts
from minianyflow.wan.sample import check_clip, find_source, known_clip, read_prompts
from minianyflow.wan.samples import Samples, costs, fingerprint, motion, roughness, sample_all
from minianyflow.wan.vbench_scores import VIDEOS, VBenchScores

DECODED = 64  # held-out clips whose frames are looked at, at most
SHOWN = (1, 4)  # step counts of the sheet, beside the most
DISTANCES = ("frechet", "sliced_w2")  # from held-out latents
MEASURES = {  # in the order of the picture and of the table: what the axis says
    "frechet": "Frechet distance of latents",
    "sliced_w2": "sliced W2 of latents",
    "path_error": "distance to own sample of {most} steps",
    "temporal_roughness": "roughness in time",
    "motion": "motion (rms change of a pixel)",
    "evaluations": "network evaluations a clip",
    "seconds": "seconds a clip",
}


def evaluate(arguments):
    """Sample, measure, draw; writes any_step.json, any_step.png, sheet.png, prompts.json. Returns the report.

    arguments: of scripts/evaluate.py. On other processes than the main one: None.
    """
    steps, names = check_arguments(arguments), labelled(arguments.sources)
    prompts = list(dict.fromkeys(read_prompts(None, arguments.prompts)))
    clips = {name: _clip(arguments, known_clip(name)) for name in names.values()}
    sizes = {name: "{frames} x {height} x {width}".format(**clip) for name, clip in clips.items()}
    if len({*sizes.values()}) > 1:
        told = ", ".join(f"{size} ({name})" for name, size in sizes.items())
        raise InputError(f"clips of {told}; expected one size: ask for --frames, --height and --width")
    data = LatentShards(arguments.data) if arguments.data else None
    if data and (min(len(prompts) * arguments.videos, len(data) // 2)) < 2:
        counts = f"{len(prompts) * arguments.videos} clips asked for and {len(data)} held-out latents"
        raise InputError(f"{counts}; a Frechet distance needs 2 and 4, half of them for its floor: leave out --data")
    scorer = None if arguments.no_vbench else VBenchScores(arguments.vbench_python, prompts, arguments.vbench)
    if scorer:
        _tell(scorer, arguments.videos)
    device = find_device(arguments.device)
    device = PartialState().device if device.type == "cuda" else device  # one a process
    made = {label: _sampled(arguments, label, name, prompts, steps, data, device) for label, name in names.items()}
    if not PartialState().is_main_process:
        return None
    shape, base = next(iter(made.values()))[1:]
    samples = {label: each for label, (each, *_) in made.items()}
    report = measured(samples, steps, shape, data, lambda: load_parts(base, "vae")[0].to(device), arguments.batch)
    report = {"dataset": arguments.data, "prompts": arguments.prompts, "seeds": [arguments.seed]} | report
    for label, name in names.items():
        report["methods"][label] = {"source": name} | report["methods"][label]
    if scorer and scorer.dimensions:
        report["vbench"] = {"prompts": "its own" if scorer.own else "custom input", "videos": arguments.videos}
        for label, scores in vbench(scorer, samples, steps).items():
            report["methods"][label] |= scores
    if scorer and scorer.missing:
        report["vbench_missing"] = scorer.missing
    report = rounded(report)
    write(report, samples, arguments.output)
    return report


def _sampled(arguments, label, name, prompts, steps, data, device):
    """Everything that one source makes: its Samples, the shape of its latents, where its codec is."""
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    source = find_source(name, dtype, "cpu")
    clip = _clip(arguments, source.clip)
    check_clip(source, clip, 0)
    shape = source.shape(clip)
    if data and shape != data.shape:
        expected = f"{data.shape}, as {arguments.data} has: ask for --frames, --height and --width, or other --data"
        raise InputError(f"{name} makes latents {shape}; expected {expected}")
    guidance = arguments.guidance if source.config.stage == "teacher" else 1.0  # a student has it inside
    if source.config.stage == "teacher" and guidance == 1 and PartialState().is_main_process:
        print(f"note: {label} is a teacher, sampled without guidance; students have theirs inside", file=sys.stderr)
    negative = "" if guidance == 1 else null_text(data) if arguments.negative is None else arguments.negative
    settings = {"source": fingerprint(name), "prompts": prompts, "videos": arguments.videos, "clip": clip}
    settings |= {"seed": arguments.seed, "precision": precision, "guidance": guidance, "negative": negative}
    samples, base = Samples(Path(arguments.output) / label, settings), source.config.base
    sample_all(samples, source, shape, steps, dtype, device, arguments.batch, guidance, negative, clip["length"])
    return samples, shape, base


def _clip(arguments, known):
    """The size that is asked for; what is not is the source's."""
    given = {key: getattr(arguments, key) for key in WAN_CLIP}
    return known | {key: value for key, value in given.items() if value is not None}


def _tell(scorer, videos):
    """Say on stderr what of VBench is missing."""
    if not PartialState().is_main_process:
        return
    if scorer.missing:
        print(f"note: {scorer.told()}", file=sys.stderr)
    if scorer.dimensions and scorer.own and videos < VIDEOS:
        print(f"note: {videos} clips of a prompt; VBench's standard asks for {VIDEOS}", file=sys.stderr)


def check_arguments(arguments):
    """The step counts in order, each once. Raises InputError for what is wrong whatever the sources."""
    for steps in arguments.steps:
        if steps < 1:
            raise InputError(f"{steps} steps asked for; expected whole numbers, at least 1")
    for what in ("videos", "batch"):
        if getattr(arguments, what) < 1:
            raise InputError(f"--{what} {getattr(arguments, what)}; expected at least 1")
    if not arguments.guidance >= 1:
        raise InputError(f"--guidance {arguments.guidance}; expected at least 1, which is none")
    if arguments.frames is not None and (arguments.frames < 1 or arguments.frames % 4 != 1):
        raise InputError(f"frames {arguments.frames}; expected 4 n + 1, like 17 or 81: the codec takes four together")
    if arguments.no_vbench and arguments.vbench:
        raise InputError("both --vbench and --no-vbench; leave out one")
    return sorted(set(arguments.steps))


def labelled(sources):
    """{label: source}: the ends of their names, with as much before them as tells them apart."""
    parts = [[part for part in str(source).split("/") if part not in ("", ".")] or [source] for source in sources]
    if len({tuple(each) for each in parts}) < len(parts):
        raise InputError(f"sources {', '.join(sources)}; expected each once")
    length = next(n for n in range(1, 1 + max(map(len, parts))) if len({tuple(p[-n:]) for p in parts}) == len(parts))
    return {"-".join(each[-length:]): source for each, source in zip(parts, sources, strict=True)}


def null_text(data):
    """The text of the null prompt of a set of shards; without one, Wan's negative prompt."""
    if data is None:
        return WAN_NULL
    with safe_open(data.folder / NULL, "pt") as file:
        text = (file.metadata() or {}).get("text")
    if text is None:
        raise InputError(f"{data.folder} does not say of which text its null prompt is; give it by --negative")
    return text


# Measures


@torch.no_grad()
def measured(samples, steps, shape, data=None, codec=None, batch=1):
    """The report: {"measure", "floors", "methods"}. samples: {label: Samples}, all finished. codec(): loads it.

    Latents of so many held-out clips are compared as there are samples of both; as many others against them are the
    floor, what the distances read where there is no error.
    """
    kept, floors, reference = next(iter(samples.values())).kept(shape), {}, None
    if data:
        count = min(kept, len(data) // 2)
        rows = torch.linspace(0, len(data) - 1, 2 * count).round().long().tolist()  # from all of them
        reference, other = (data.rows(rows[start::2])[0] for start in range(2))
        few, vae = reference[:: -(-count // DECODED)], codec()
        looked = [motion(clip) for part in few.split(batch) for clip in _decoded(vae, part)]
        known = {name: [each[name] for each in looked] for name in looked[0]}
        floors["data"] = _distances(other, reference) | _moving(known)
    measure = {
        "sampled": next(iter(samples.values())).count,
        "compared": len(reference) if data else 0,
        "path_error": kept,
        "path_error_to": steps[-1],
        "directions": 128,
        "decoded_data": len(looked) if data else 0,
    }
    methods = {label: _method(each, steps, kept, reference) for label, each in samples.items()}
    return {"measure": measure, "floors": floors, "methods": methods}


def _method(samples, steps, kept, reference):
    """One source as it stands in the JSON: for every measure a list over step counts, one for its one seed."""
    target, figures = samples.read(steps[-1], kept), []
    for each in steps:
        latents, known = samples.read(each, kept), samples.known(each)
        found = {} if reference is None else _distances(latents[: len(reference)], reference)
        if len(steps) > 1:
            found["path_error"] = path_error(latents, target) if each < steps[-1] else float("nan")
        figures.append(found | _moving(known) | costs(known))
    keys = [name for name in MEASURES if name in figures[0]]
    return {"nfe": steps} | {name: [[each[name] for each in figures]] for name in keys}


def _distances(latents, reference):
    return {"frechet": frechet_distance(latents, reference, 2), "sliced_w2": sliced_w2(latents, reference)}


def _moving(known):
    change = sum(known["change"]) / len(known["change"])
    return {"temporal_roughness": roughness(known), "motion": change**0.5}


def _decoded(vae, latents):
    return decode_latents(vae, latents.to(vae.device), len(latents)).cpu()


def vbench(scorer, samples, steps):
    """{label: {"vbench_DIMENSION": [[a score for each step count]]}}, scored once and kept beside the samples."""
    places = {
        (label, nfe): each.folder / "vbench" / f"{nfe}_steps.json" for label, each in samples.items() for nfe in steps
    }
    known = {key: json.loads(path.read_text()) if path.exists() else {} for key, path in places.items()}
    todo = {key: path for key, path in places.items() if not {*scorer.dimensions} <= {*known[key]}}
    titles = next(iter(samples.values())).titles()
    folders = {samples[label].video(nfe, 0).parent: path.with_suffix("") for (label, nfe), path in todo.items()}
    for (key, path), scores in zip(todo.items(), scorer.score(folders, titles), strict=True):
        known[key] |= scores
        with staging_folder(path.parent) as inside:
            (inside / path.name).write_text(json.dumps(known[key], indent=1) + "\n")
    return {
        label: {f"vbench_{name}": [[known[label, nfe][name] for nfe in steps]] for name in scorer.dimensions}
        for label in samples
    }


# What is shown


def write(report, samples, output):
    """Write a report, its curves, a sheet of stills and the prompts of the videos; whole or not at all."""
    from minianyflow.support.figures import save_figure

    with staging_folder(output) as folder:
        (folder / "any_step.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        save_figure(curves(report), folder / "any_step.png")
        sheet(samples, next(iter(report["methods"].values()))["nfe"]).save(folder / "sheet.png")
        titles = next(iter(samples.values())).titles()
        (folder / "prompts.json").write_text(json.dumps(titles, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def curves(report):
    """A Figure: every measure of a report against steps, a line for each source, dotted the data's own reading."""
    import matplotlib.pyplot as plt

    from minianyflow.support.figures import draw_any_step

    names = [name for name in _measures(report) if name != "evaluations"]  # which for most are the steps
    rows = -(-len(names) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(15, 4.2 * rows + 0.6), layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        draw_any_step(axes, report, name, " ")
        axes.set_title(_axis(report, name), fontsize=15)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=14, frameon=False)
    return figure


def _measures(report):
    """All measures that the first source has."""
    return [name for name, value in next(iter(report["methods"].values())).items() if name != "nfe" and _by_seed(value)]


def _by_seed(value):
    return isinstance(value, list) and isinstance(value[0], list)


def _axis(report, name):
    return MEASURES.get(name, name.replace("_", " ")).format(most=report["measure"].get("path_error_to"))


def sheet(samples, steps):
    """A picture of stills: a row for each source and step count, first clips of the first two prompts side by side."""
    first = next(iter(samples.values()))
    clip, prompts = first.settings["clip"], first.prompts[:2]
    size, rows = (clip["frames"], clip["height"], clip["width"]), {}
    for each in [count for count in steps if count in (*SHOWN, steps[-1])]:
        for label, source in samples.items():
            videos = [read_video(source.video(each, number), *size) for number in range(len(prompts))]
            rows[f"{label}\n{each} step{'s' * (each > 1)}"] = torch.cat(videos)
    return stills(rows, prompts, group=len(samples))


def table(report):
    """All measures as text, step counts below one another; with several sources, the ratio of each to the first."""
    methods = report["methods"]
    first, *others = methods
    heads = [*methods, *(f"{name} / {first}" for name in others)]
    wide = [max(10, len(head)) + 2 for head in heads]
    lines = []
    for name in _measures(report):
        floor = report["floors"].get("data", {}).get(name)
        clips = f"{report['measure']['compared']} clips; " * (name in DISTANCES)  # a reading depends on how many
        lines += ["", _axis(report, name) + (f" ({clips}data: {_number(floor)})" if floor is not None else "")]
        lines.append("steps".rjust(6) + "".join(head.rjust(width) for head, width in zip(heads, wide, strict=True)))
        for place, nfe in enumerate(methods[first]["nfe"]):
            values = [_mean(each[name], place) for each in methods.values()]
            ratios = [value / values[0] if values[0] and value is not None else None for value in values[1:]]
            cells = [*map(_number, values), *(_number(ratio, "{:.2f}") for ratio in ratios)]
            lines.append(f"{nfe:6}" + "".join(cell.rjust(width) for cell, width in zip(cells, wide, strict=True)))
    return "\n".join(lines[1:])


def _mean(by_seed, place):
    values = [each[place] for each in by_seed]
    return None if None in values else sum(values) / len(values)


def _number(value, form="{:.4g}"):
    return "-" if value is None else form.format(value)
