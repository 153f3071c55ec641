"""Tables of the pages, as text, from the committed reports. pages.py says which page has which."""

import json

from minianyflow.support.install import ROOT
from minianyflow.support.reports import markdown_table, mean, seed_means, text_table

CHUNK_MEASURES = ("prompt_obeyed", "light_kept", "obeyed_and_kept")
MOTION_MEASURES = {"right": 2, "straight": 2, "kept": 2, "residual": 2, "speed": 2, "speed_w1": 3, "coverage": 2}
MOTION_MEASURES |= {"latent_variance": 0, "pair_distance": 1}
ARMS = {  # how the page names an arm, and its name in the report
    "teacher forcing": "teacher forcing",
    "teacher forcing, exact velocity": "teacher forcing, exact velocity",
    "on-policy, gradient through the context": "on-policy",
    "on-policy, context detached": "on-policy, detached",
    "on-policy, gradient, forward loss x 4": "on-policy, forward x 4",
}

TURNED = "turned student, teacher forcing on the exact velocity"
ROLES = ("student", "fake", "teacher")
ROWS = {
    "sliced_w2": "sliced W2 of latents",
    "path_error": "distance to own sample of 128 steps",
    "temporal_roughness": "roughness in time",
    "persistence": "flow that the next latent frame keeps",
    "frechet": "Frechet distance of latents",
}


def text_block(report: dict) -> str:
    """Sliced W2 of the plane as a block of text."""
    return f"```text\n{text_table(report)}\n```"


def path_block(report: dict) -> str:
    """Path errors of the plane as a block of text."""
    return f"```text\n{text_table(report, 'path_error')}\n```"


def video_table(report: dict) -> str:
    """Sliced W2 at every step count: the mean, and the range over seeds where there are several."""
    methods = {name: method for name, method in report["methods"].items() if not name.startswith("causal")}
    nfe = next(iter(methods.values()))["nfe"]
    rows = []
    for name, method in methods.items():
        seeds, label, cells = len(method["seeds"]), name.replace("_", "-"), []
        for values in zip(*method["sliced_w2"], strict=True):
            spread = f" ({1000 * (max(values) - min(values)):.1f})" if seeds > 1 else ""
            cells.append(f"{1000 * mean(values):.1f}{spread}")
        rows.append([label + f", {seeds} seeds" * (seeds > 1), *cells])
    floor = f"{1000 * report['floors']['codec']['sliced_w2']:.1f}"
    rows.append(["data against data", floor, *[""] * (len(nfe) - 1)])
    return markdown_table(["sliced W2 x 1000, mean (range over seeds)", *nfe], rows)


def video_motion(report: dict) -> str:
    """How balls move in the clips of each network: the mean over seeds, of one ball and in brackets of two."""

    def row(name, by_seed):
        cells = []
        for measure, digits in MOTION_MEASURES.items():
            one, two = (mean(seed[prompt][measure] for seed in by_seed) for prompt in ("one ball", "two balls"))
            cells.append(f"{one:.{digits}f} ({two:.{digits}f})")
        label = name.replace("_", "-") + f", {len(by_seed)} seeds" * (len(by_seed) > 1)
        return [label, *cells, f"{1000 * mean(seed['sliced_w2'] for seed in by_seed):.1f}"]

    rows = [row(name, [figures]) for name, figures in report["floors"].items()]
    rows += [row(name, by_seed) for name, by_seed in report["methods"].items()]
    names = (name.replace("_", " ") for name in MOTION_MEASURES)
    return markdown_table(["one ball (two balls)", *names, "sliced W2 x 1000"], rows)


def video_draws(report: dict) -> str:
    """What networks that keep velocities keep: the mean over draws, and their range."""

    def cell(draws, prompt, measure):
        values = [draw[prompt][measure] for draw in draws]
        return f"{mean(values):.2f} ({max(values) - min(values):.2f})"

    columns = [(prompt, measure) for prompt in ("one ball", "two balls") for measure in ("straight", "kept", "right")]
    rows = [[name.replace("_", "-"), *(cell(draws, *column) for column in columns)] for name, draws in report.items()]
    return markdown_table(["evaluations", *(f"{prompt}: {measure}" for prompt, measure in columns)], rows)


def video_costs(report: dict) -> str:
    """What each stage cost, and what it reaches at one and four steps."""
    rows = []
    for name, cost in report["costs"].items():
        reached = " / ".join(f"{_law(report, name, nfe):.1f}" for nfe in (1, 4)) if name in report["methods"] else "-"
        counts = [f"{cost[count] / 1000:.0f} k" for count in ("forwards", "backwards")]
        rows.append([name.replace("_", "-"), f"{cost['steps']:.0f}", *counts, f"{cost['seconds']:.0f}", reached])
    header = ["stage", "steps", "forwards", "backwards", "seconds", "sliced W2 x 1000 at NFE 1 / 4"]
    return markdown_table(header, rows)


def video_causal(report: dict) -> str:
    """What causal students obey in each chunk, at four steps per chunk."""
    rows = []
    for name, method in report["methods"].items():
        if name.startswith("causal"):
            by_seed = [by_nfe[method["nfe"].index(4)] for by_nfe in method["by_chunk"]]
            chunks = list(zip(*by_seed, strict=True))  # per chunk all seeds
            cells = [" / ".join(f"{mean(s[key] for s in seeds):.0%}" for seeds in chunks) for key in CHUNK_MEASURES]
            rows.append([name.replace("_", "-"), *cells, f"{_law(report, name, 4):.1f}"])
    header = ["at four steps a chunk", "prompt obeyed, by chunk", "light kept, by chunk", "both, by chunk"]
    return markdown_table([*header, "sliced W2 x 1000"], rows)


def video_padding(report: dict) -> str:
    """What the zero keys of stock diffusers do to the causal student."""
    rows = [
        [name, f"{1000 * figures['sliced_w2']:.1f}", f"{figures['prompt_obeyed']:.0%}", f"{figures['light_kept']:.0%}"]
        for name, figures in report["padding"]["causal"].items()
        if name in ("ours", "stock")
    ]
    return markdown_table(["attention", "sliced W2 x 1000", "prompt obeyed", "light kept"], rows)


def exposure_long_table(report: dict) -> str:
    """What free-running clips of the saved students keep, far beyond the frames of training: means over seeds."""
    long = report["long"]
    frames = [long["frames"].index(frame) for frame in (16, 64, 160)]
    names = {name: arm for arm, name in ARMS.items()} | {"teacher forcing, turned student": TURNED}

    def row(label, nfe, seeds):
        figures = ("sliced_w2", "tv", "kept", "whole")
        cells = [" / ".join(f"{mean(seed[name][frame] for seed in seeds):.2f}" for frame in frames) for name in figures]
        return [label, nfe, *cells, f"{mean(seed['lost'][long['frames'].index(320)] for seed in seeds):.0%}"]

    rows = [row(names[arm], nfe, seeds) for arm, by_nfe in long["arms"].items() for nfe, seeds in by_nfe.items()]
    rows.append(row("exact law of the next frame", "", [long["exact"]]))
    columns = ["sliced W2", "TV of speeds", "kept", "whole"]
    return markdown_table(["at frame 16 / 64 / 160", "NFE", *columns, "lost at frame 320"], rows)


def exposure_map_table(report: dict) -> str:
    """The map of what cures exposure bias, at frame 160: means over seeds, and their range for four evaluations."""
    place = report["frames"].index(160)

    def row(start, name, cell):
        def values(nfe, figure):
            return [seed[figure][place] for seed in cell["nfe"][nfe]]

        four = [values("4", figure) for figure in figures]
        cells = [f"{mean(found):.2f} ({max(found) - min(found):.2f})" for found in four]
        one = " / ".join(f"{mean(values('1', figure)):.2f}" for figure in figures)
        return [start, name, *cells, one]

    figures = ("tv", "kept", "whole", "sliced_w2")
    rows = []
    for start, recipes in report["cells"].items():
        rows.append(row(start, "the start itself", report["starts"][start]))
        rows += [row("", name, cell) for name, cell in recipes.items()]
    rows.append(["exact law", "", *(f"{report['exact'][figure][place]:.2f}" for figure in figures), ""])
    return markdown_table(["start", "then", "TV", "kept", "whole", "sliced W2", "the four at one evaluation"], rows)


def exposure_table(report: dict) -> str:
    """Exposure bias on the circle: last radius error and sliced W2 of clips, along the curve of each arm."""

    def row(label, points):
        cells = []
        for nfe, key in (("1", "free_running"), ("4", "free_running"), ("4", "sliced_w2")):
            by_point = [point["nfe"][nfe][key] for point in points]
            last = [[seed[-1] if isinstance(seed, list) else seed for seed in seeds] for seeds in by_point]
            cells.append(", ".join(f"{mean(seeds):.3f}".removeprefix("0") for seeds in last))
        return [label, *cells, int(points[-1]["cost"]["cpu_seconds"] + 0.5)]

    rows = [row("start", report["start"][-1:]), *(row(label, report["arms"][arm]) for label, arm in ARMS.items())]
    header = ["", "radius, NFE 1", "radius, NFE 4", "sliced W2 of clips, NFE 4", "seconds"]
    return markdown_table(header, rows)


def evaluations_per_sample() -> str:
    """Forwards and backwards per sample of every stage, as scripts/wan_tiny.py counted them."""
    counts = json.loads((ROOT / "docs/wan/evaluations.json").read_text("utf-8"))
    rows = [
        [stage, *("{forwards:.2f}, {backwards:.2f}".format(**roles[role]) if role in roles else "" for role in ROLES)]
        for stage, roles in counts.items()
    ]
    return markdown_table(["stage", "student: forwards, backwards", "fake score", "teacher"], rows)


def evaluation() -> str:
    """The small video's teacher and flow map at a few step counts, beside held-out clips."""
    report = json.loads((ROOT / "docs/video/evaluation.json").read_text("utf-8"))
    steps, rows = [1, 2, 4, 8, 64, 128], []
    for name, words in ROWS.items():
        for label, method in report["methods"].items():
            values = dict(zip(method["nfe"], method[name][0], strict=True))
            cells = ["" if values[count] is None else f"{values[count]:.3g}" for count in steps]
            floor = report["floors"]["data"].get(name)
            rows.append([words, label, *cells, "" if floor is None else f"{floor:.3g}"])
    return markdown_table(["measure", "network", *steps[:-1], f"{steps[-1]} steps", "held-out clips"], rows)


def _law(report, name, nfe):
    """The mean sliced W2 over seeds at one step count, times 1000."""
    method = report["methods"][name]
    return 1000 * seed_means(method["sliced_w2"])[method["nfe"].index(nfe)]
