"""How blobs drift in a stream of twenty times the trained length: `python -m benchmarks.stream` writes stream.json.

A chunk of two latent frames is compared with the last chunk of codec data: the process is the same at every time.
"""

from itertools import repeat

import torch

from minianyflow.measures import sliced_w2
from minianyflow.networks.causal import causal_stream
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.support.install import ROOT
from minianyflow.support.reports import markdown_table, rounded, write_report
from minianyflow.times import generator, time_grid
from minianyflow.video.measures import summary
from minianyflow.video.motion import spread
from minianyflow.video.report import held_out, prompts_for
from minianyflow.video.stages import WEIGHTS, path_of

CLIPS, FRAMES, SEEDS, WINDOWS, STEPS = 128, 5, (0, 1, 2), (5, 7), 4  # latent frames of a trained clip
CHUNKS = 1 + (20 * FRAMES - 1) // 2
AT = {"1": 2, "2": 4, "5": 12, "10": 24, "20": CHUNKS - 1}  # times the trained length: the chunk that ends there
MEASURES = ("sliced_w2", "obeyed_and_kept", "light", "pair_distance")


def measure(seed: int, window: int) -> dict[str, list[float]]:
    """{measure: [one per length in AT]} of the causal student, four steps per chunk."""
    codec, u = load_codec(path_of(WEIGHTS, "codec")), load_network(path_of(WEIGHTS, "causal", seed))
    (data, other), _ = held_out(codec, count=CLIPS)
    (prompt, balls), source = prompts_for(CLIPS), generator(90, seed)

    def draw(frames):
        return torch.randn(CLIPS, frames, *data.shape[2:], generator=source)

    made = torch.cat([*causal_stream(u, draw, repeat((time_grid(STEPS), prompt), CHUNKS), window)], 1)
    by_chunk = summary(codec.decode(made), balls, u.partition(made.shape[1]))["by_chunk"]
    apart = spread(data[:, -2:])["pair_distance"]
    figures = {name: [] for name in MEASURES}
    for chunk in AT.values():
        latents = made[:, 2 * chunk - 1 : 2 * chunk + 1]
        here = by_chunk[chunk] | {"pair_distance": spread(latents)["pair_distance"] / apart}
        here["sliced_w2"] = sliced_w2(latents, data[:, -2:])
        for name in MEASURES:
            figures[name].append(here[name])
    return figures | {"floor": sliced_w2(other[:, -2:], data[:, -2:])}


def table(report: dict) -> str:
    """A row per window: each measure at the lengths in AT, mean of the seeds."""
    rows = []
    for window, seeds in report["windows"].items():
        cells = [
            " / ".join(f"{sum(seed[name][k] for seed in seeds) / len(seeds):.2f}" for k in range(len(AT)))
            for name in MEASURES
        ]
        rows.append([f"{window} latent frames", *cells])
    names = ["sliced W2 of the chunk", "right and bright", "light", "pair distance over data's"]
    return markdown_table([f"after {' / '.join(AT)} times the trained length", *names], rows)


def main() -> None:
    """Measure every window and seed."""
    torch.set_num_threads(1)
    windows = {str(window): [measure(seed, window) for seed in SEEDS] for window in WINDOWS}
    report = {"clips": CLIPS, "steps": STEPS, "seeds": SEEDS, "times": [*AT], "windows": windows}
    write_report(rounded(report), ROOT / "docs/video/stream.json")
    print(table(rounded(report)))


if __name__ == "__main__":
    main()
