"""What more steps buy: sources sampled from the same noise at any step counts, measured, drawn, side by side.

Measured without any download: distances of latents from held-out ones, the distance to the source's own sample of most
steps, motion, evaluations and seconds. VBench's scores are read if its command was run (docs/evaluation.md).
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from minianyflow.measures import frechet_distance, path_error, sliced_w2
from minianyflow.support.errors import InputError
from minianyflow.support.figures import draw_any_step, save_figure
from minianyflow.support.files import staging_folder
from minianyflow.support.reports import rounded, write_report
from minianyflow.wan.config import find_device
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.data.options import DTYPES, WAN_NULL
from minianyflow.wan.data.read_video import read_video
from minianyflow.wan.data.write_video import clip_sheet
from minianyflow.wan.folders import decode_latents, load_parts
from minianyflow.wan.sampler import step_label
from minianyflow.wan.samples import Samples, motion, persistence, roughness, source_fingerprint
from minianyflow.wan.sources import check_clip, check_numbers, find_source, identify, read_prompts

DECODED = 64  # number of held-out clips that are decoded, at most
SHOWN = (1, 4)  # step counts on the sheet, beside the most
DISTANCES = ("frechet", "sliced_w2")  # from held-out latents
MEASURES = {  # in the order of the picture and of the table: the label of the axis
    "frechet": "Frechet distance of latents",
    "sliced_w2": "sliced W2 of latents",
    "path_error": "distance to own sample of {most} steps",
    "temporal_roughness": "roughness in time",
    "motion": "motion (rms change of a pixel)",
    "persistence": "flow that the next latent frame keeps",
    "evaluations": "network evaluations per clip",
    "seconds": "seconds per clip",
}


def evaluate(
    sources: list[str],
    prompts: str | Path,
    steps: list[int],
    output: str | Path,
    data: str | Path | None = None,
    videos: int = 5,
    clip: dict[str, int] | None = None,
    seed: int = 0,
    batch: int = 1,
    guidance: float = 1.0,
    negative: str | None = None,
    device: str = "auto",
    precision: str | None = None,
) -> dict | None:
    """Sample, measure, draw; writes any_step.json, any_step.png, sheet.png, prompts.json to `output`; the report.

    prompts: a file, one per line. data: a folder of held-out latents; None: no distances. videos: clips per prompt.
    clip: changes to the sources' frames, height, width and length. batch: clips sampled together. guidance, negative:
    scale and null prompt of teachers. On other processes than the main one: None. Raises InputError for what does not
    fit, before anything is sampled where it can.
    """
    check_numbers(steps, frames=(clip or {}).get("frames"))
    for name, number in (("videos", videos), ("batch", batch), ("guidance", guidance)):
        if not 1 <= number <= 10**6:
            raise InputError(f"{name} {number}; expected at least 1, at most a million")
    steps, names, texts = sorted(set(steps)), labelled(sources), list(dict.fromkeys(read_prompts(file=prompts)))
    clips = {name: identify(name)[1] | (clip or {}) for name in names.values()}
    sizes = {name: "{frames} x {height} x {width}".format(**size) for name, size in clips.items()}
    if len({*sizes.values()}) > 1:
        differ = ", ".join(f"{size} ({name})" for name, size in sizes.items())
        raise InputError(f"clips of {differ}; expected one size: set frames, height and width")
    held_out = LatentSet(data) if data else None
    if data and min(len(texts) * videos, len(held_out) // 2) < 2:
        counts = f"{len(texts) * videos} clips and {len(held_out)} held-out latents"
        raise InputError(f"{counts}; a Frechet distance needs 2 and 4, half of them for its floor: leave out the data")
    device = find_device(device)
    device = PartialState().device if device.type == "cuda" else device  # one per process
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    samples = {}
    for label, name in names.items():
        source = find_source(name, DTYPES[precision], "cpu")
        check_clip(source, clips[name])
        shape, base = source.shape(clips[name]), source.config.base
        if data and shape != held_out.shape:
            expected = f"expected {held_out.shape}, as {data} has: set another size"
            raise InputError(f"{name} makes latents {shape}; {expected}")
        scale, null = (guidance if source.config.stage == "teacher" else 1.0), ""  # a student has it inside
        if source.config.stage == "teacher" and scale == 1 and PartialState().is_main_process:
            print(f"note: {label} is a teacher, sampled without guidance; students have theirs inside", file=sys.stderr)
        if scale != 1:
            null = negative if negative is not None else held_out.null_text if held_out else WAN_NULL
            if null is None:
                raise InputError(f"{data} does not say of which text its null prompt is; give the negative prompt")
        settings = {"source": source_fingerprint(name), "prompts": texts, "videos": videos, "clip": clips[name]}
        settings |= {"seed": seed, "precision": precision, "guidance": scale, "negative": null}
        samples[label] = Samples(Path(output) / label, settings)
        samples[label].make(source, steps, device, batch)
    if not PartialState().is_main_process:
        return None
    report = measured(samples, steps, shape, held_out, lambda: load_parts(base, "vae")[0].to(device), batch)
    report["methods"] = {label: {"source": names[label]} | method for label, method in report["methods"].items()}
    report = rounded({"dataset": data and str(data), "prompts": str(prompts), "seeds": [seed]} | report)
    with staging_folder(output) as folder:
        write_report(report, folder / "any_step.json")
        save_figure(curves(report), folder / "any_step.png")
        sheet(samples, steps).savefig(folder / "sheet.png")
        titles = json.dumps(next(iter(samples.values())).titles(), indent=1, ensure_ascii=False)
        (folder / "prompts.json").write_text(titles + "\n", encoding="utf-8")
    return report


def labelled(sources: list[str]) -> dict[str, str]:
    """{label: source}: the ends of their names, as long as they must be to differ."""
    named = [Path(source).resolve() if ".." in Path(source).parts or source == "." else source for source in sources]
    parts = [[part for part in str(source).split("/") if part not in ("", ".")] or ["root"] for source in named]
    if len({tuple(part) for part in parts}) < len(parts):
        raise InputError(f"sources {', '.join(sources)}; expected different ones")
    length = next(n for n in range(1, 1 + max(map(len, parts))) if len({tuple(p[-n:]) for p in parts}) == len(parts))
    return {"-".join(part[-length:]): source for part, source in zip(parts, sources, strict=True)}


# Measures


@torch.no_grad()
def measured(samples: dict[str, Samples], steps, shape, data=None, load_codec=None, batch=1) -> dict:
    """The report: {"measure", "floors", "methods"} of finished samples.

    As many latents of held-out clips are compared as there are samples of both; the distance of other held-out clips
    from those is the floor, what the distances read without error.
    """
    first = next(iter(samples.values()))
    compared, floors, reference, decoded = first.compared(shape), {}, None, []
    if data:
        count = min(compared, len(data) // 2)
        rows = torch.linspace(0, len(data) - 1, 2 * count).round().long().tolist()  # from all of them
        reference, other = (data.rows(rows[start::2])[0] for start in range(2))
        vae = load_codec()
        for part in reference[:: -(-count // DECODED)].split(batch):
            decoded += [motion(clip) for clip in decode_latents(vae, part.to(vae.device), len(part)).cpu()]
        figures = {name: [clip[name] for clip in decoded] for name in decoded[0]}
        floors["data"] = _distances(other, reference) | _moving(figures)
    measure = {"sampled": first.count, "compared": len(reference) if data else 0, "path_error": compared}
    measure |= {"path_error_to": steps[-1], "directions": 128, "decoded_data": len(decoded)}
    methods = {label: _method(source, steps, compared, reference) for label, source in samples.items()}
    return {"measure": measure, "floors": floors, "methods": methods}


def _method(samples, steps, compared, reference):
    """One source in the report: for every measure a list over step counts, one for its one seed."""
    target, by_steps = samples.read(steps[-1], compared), []
    for count in steps:
        latents, clips = samples.read(count, compared), samples.figures(count)
        figures = {} if reference is None else _distances(latents[: len(reference)], reference)
        if len(steps) > 1:
            figures["path_error"] = path_error(latents, target) if count < steps[-1] else float("nan")
        costs = {name: statistics.median(clips[name]) for name in ("evaluations", "seconds")}
        by_steps.append(figures | _moving(clips) | costs | samples.vbench(count))
    names = dict.fromkeys([name for name in MEASURES if name in by_steps[0]])
    names |= dict.fromkeys(name for figures in by_steps for name in figures)  # VBench's
    return {"nfe": steps} | {name: [[figures.get(name) for figures in by_steps]] for name in names}


def _distances(latents, reference):
    return {"frechet": frechet_distance(latents, reference, 2), "sliced_w2": sliced_w2(latents, reference)}


def _moving(figures):
    change = sum(figures["change"]) / len(figures["change"])
    moving = {"temporal_roughness": roughness(figures), "motion": change**0.5}
    return moving | ({"persistence": persistence(figures)} if "flow" in figures else {})  # clips of before have none


# The picture, the sheet and the table


def curves(report: dict):
    """A Figure: every measure of a report against steps, a line per source, the data's own reading dotted."""
    import matplotlib.pyplot as plt

    names = [name for name in _measures(report) if name != "evaluations"]  # which for most are the steps
    rows = -(-len(names) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(15, 4.2 * rows + 0.6), layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        draw_any_step(axes, report, name, " ")
        axes.set_title(_label(report, name), fontsize=15)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=14, frameon=False)
    return figure


def _measures(report):
    """All measures of any source, in order."""
    values = {name: value for method in reversed(report["methods"].values()) for name, value in method.items()}
    return [name for name, value in values.items() if isinstance(value, list) and isinstance(value[0], list)]


def _label(report, name):
    return MEASURES.get(name, name.replace("_", " ")).format(most=report["measure"].get("path_error_to"))


def sheet(samples: dict[str, Samples], steps: list[int]):
    """A picture of stills: a row per source and step count, first clips of the first two prompts side by side."""
    first = next(iter(samples.values()))
    clip, prompts = first.settings["clip"], first.prompts[:2]
    size, rows = (clip["frames"], clip["height"], clip["width"]), {}
    for count in [count for count in steps if count in (*SHOWN, steps[-1])]:
        for label, source in samples.items():
            videos = [read_video(source.video(count, number), *size) for number in range(len(prompts))]
            rows[f"{label}\n{step_label(count)}"] = torch.cat(videos)
    return clip_sheet(rows, prompts)


def table(report: dict) -> str:
    """All measures as text, a row per step count; with several sources, the ratio of each to the first."""
    methods = report["methods"]
    first, *others = methods
    heads = ["steps", *methods, *(f"{name} / {first}" for name in others)]
    widths, lines = [6, *(max(10, len(head)) + 2 for head in heads[1:])], []
    for name in _measures(report):
        floor, rows = report["floors"].get("data", {}).get(name), [heads]
        clips = f"{report['measure']['compared']} clips; " * (name in DISTANCES)  # a reading depends on their number
        lines += ["", _label(report, name) + (f" ({clips}data: {_number(floor)})" if floor is not None else "")]
        for place, nfe in enumerate(methods[first]["nfe"]):
            values = [method[name][0][place] if name in method else None for method in methods.values()]
            ratios = [value / values[0] if values[0] and value is not None else None for value in values[1:]]
            rows.append([str(nfe), *map(_number, values), *(_number(ratio, "{:.2f}") for ratio in ratios)])
        lines += ["".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines[1:])


def _number(value, form="{:.4g}"):
    return "-" if value is None else form.format(value)
