"""Why small video teachers did not learn that balls fly straight: one change at a time, one ball, short trainings.

    python -m benchmarks.motion --only "dense, clean clip" --seeds 0 1 2      adds its readings to motion_tries.json

A network that puts out the velocity eps - x must carry every number of the noise through its width; one that puts out
the clean clip x, from which u = (z - x) / t, need not (Li and He, arXiv 2511.13720). Times are processor seconds.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

from minianyflow.measures import sobol_noise
from minianyflow.networks.dense import Dense, FromClean
from minianyflow.networks.wan import TINY_TIMESTEPS, TextEncoder, WanNetwork, tiny_transformer
from minianyflow.networks.weights import load_codec
from minianyflow.objectives import FlowMapLoss
from minianyflow.support.reports import markdown_table, rounded
from minianyflow.times import draw_pairs, generator
from minianyflow.training import Role, train
from minianyflow.video.motion import flights, motion
from minianyflow.video.report import sample
from minianyflow.video.stages import WEIGHTS, path_of
from toy_data import blobs

OUTPUT = Path("docs/video/motion_tries.json")
CLIPS, ROWS, COUNT, NFE = 8192, 128, 256, 24
PROBED = (0.9, 0.8, 0.7, 0.6, 0.4, 0.2)  # times at which the error of the clean clip is read
FRAMES = {"patch": 4, "width": 4, "clean": True}  # a frame per token
TRIES = {  # name: (network, steps, learning rate)
    "transformer, clean clip": ({"patch": 2, "width": 2, "clean": True}, 600, 2e-3),
    "transformer, a frame per token, clean clip": (FRAMES, 600, 2e-3),
    "transformer, a frame per token, clean clip, learnt positions": (FRAMES | {"positions": True}, 600, 2e-3),
    "dense, velocity": ({"width": 256, "clean": False}, 1000, 1e-3),
    "dense, clean clip": ({"width": 256, "clean": True}, 1000, 1e-3),
    "dense, clean clip, three times as long": ({"width": 256, "clean": True}, 3000, 1e-3),
}


class Positions(nn.Module):
    """A patch embedding and a learnt vector per token: rotary positions tell distances alone."""

    def __init__(self, embedding: nn.Module, width: int, tokens: tuple[int, int, int]):
        super().__init__()
        self.embedding, self.place = embedding, nn.Parameter(0.3 * torch.randn(1, width, *tokens))

    @property
    def weight(self):
        """Of the embedding: says in which dtype the transformer computes."""
        return self.embedding.weight

    def forward(self, z):
        """As the embedding."""
        return self.embedding(z) + self.place


def build(seed: int, width: int, clean: bool, patch: int = 0, positions: bool = False) -> nn.Module:
    """A network by its try; the width of a transformer is that many heads of 32."""
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": width, "ffn_dim": 128 * width, "patch_size": (1, patch, patch)}
    network = WanNetwork(tiny_transformer(seed, **sizes), TINY_TIMESTEPS) if patch else Dense(width, width, half=False)
    if positions:
        embedding = Positions(network.transformer.patch_embedding, 32 * width, (5, 4 // patch, 4 // patch))
        network.transformer.patch_embedding = embedding
    return FromClean(network) if clean else network


def teach(name: str, seed: int, latents, held_out, codec, reference) -> dict:
    """Train one try with one seed: what it reads."""
    settings, steps, rate = TRIES[name]
    prompt = TextEncoder()(blobs.PROMPTS[:1])
    role = Role(build(seed, **settings), FlowMapLoss({}, weight=torch.ones_like), rate, warmup=100, ema=0.99, clip=1.0)

    def draw(step):
        source = generator(seed, step)
        x = latents[torch.randint(len(latents), (ROWS,), generator=source)]
        batch = {"x": x, "eps": torch.randn(x.shape, generator=source)}
        return batch | {"condition": {"prompt": prompt.expand(ROWS, -1, -1)}} | draw_pairs(ROWS, source, 1.0, 0.0)

    start = time.process_time()
    train({"teacher": role}, draw, steps, progress=False)
    seconds, network, errors = time.process_time() - start, role.average.module, {}
    with torch.no_grad():
        for t in PROBED:
            eps = torch.randn(held_out.shape, generator=generator(9, int(1000 * t)))
            z, times = (1 - t) * held_out + t * eps, torch.full((len(held_out),), t)
            clean = z - t * network(z, times, times, prompt=prompt.expand(len(z), -1, -1))
            errors[t] = float((clean - held_out).square().flatten(1).sum(1).mean())
    z = sobol_noise(COUNT, latents.shape[1:])
    ends = sample("euler", network, z, prompt.expand(COUNT, -1, -1), NFE)
    weights = sum(weight.numel() for weight in network.parameters())
    figures = {"seed": seed, "weights": weights, "steps": steps, "seconds": seconds, "clean_error": errors}
    return figures | motion(flights(codec.decode(ends), 1), reference)


def table(report: dict) -> str:
    """The tries as a table: means over seeds, and the range where there are several."""

    def cell(rows, key, digits=2):
        values = [row["clean_error"][key] if key in row["clean_error"] else row[key] for row in rows]
        spread = f" ({max(values) - min(values):.{digits}f})" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.{digits}f}{spread}"

    rows = []
    for name, by_seed in report.items():
        first, shown = by_seed[0], [cell(by_seed, key) for key in ("right", "straight", "kept", "residual")]
        cost = [f"{first['weights'] / 1e6:.2f}", first["steps"], cell(by_seed, "seconds", 0)]
        rows.append([name, len(by_seed), *cost, *shown, cell(by_seed, "0.8", 0), cell(by_seed, "0.6", 1)])
    header = ["teacher of one ball", "seeds", "million weights", "steps", "processor seconds"]
    header += ["right", "straight", "kept", "residual, pixels", "error of x at t = .8", "at .6"]
    return markdown_table(header, rows)


def main() -> None:
    """Run the tries and add their readings to the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TRIES), choices=list(TRIES), help="tries")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="seeds of each")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the report")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    codec = load_codec(path_of(WEIGHTS, "codec"))
    parts = [blobs.sample(2 * count, generator(seed)) for count, seed in ((CLIPS, 100), (COUNT, 101))]
    latents, held_out = (codec.encode(clips.video[clips.balls == 1]) for clips in parts)
    reference = flights(codec.decode(held_out), 1)
    for name in arguments.only:
        for seed in arguments.seeds:
            readings = rounded(teach(name, seed, latents, held_out, codec, reference), 4)
            report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
            others = [entry for entry in report.get(name, []) if entry["seed"] != seed]
            report[name] = sorted([*others, readings], key=lambda entry: entry["seed"])
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
            print(name, readings, flush=True)


if __name__ == "__main__":
    main()
