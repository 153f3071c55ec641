"""Two tiny transformers of other families, from teacher to flow map on a toy whose truth is exact.

`python -m benchmarks.backbone_toys 0 1 2` prints the table of docs/backbones.md, seed by seed.
"""

import copy
import sys

import torch
from diffusers import LTXVideoTransformer3DModel, SD3Transformer2DModel
from tqdm import tqdm

from benchmarks.backbones import Backbone, FlowMapBackbone, call_ltx, call_sd3
from minianyflow.batch import batches
from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.mixtures import GaussianMixture
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.samplers import sample_euler, sample_flow_map
from minianyflow.times import generator, time_grid
from minianyflow.training import Role, train
from toy_data.plane import spiral

POINTS = 1024
STEPS = {"teacher": 400, "flow map": 500}
TINY_TIMESTEPS = 5.0  # as in networks/wan.py: docs/video.md says why tiny ones count slowly


def spread_spiral(*shape):
    """The spiral of the plane, twice as large, turned by a fixed rotation into 16 dimensions and blurred by .1."""
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator(0)))[0][:2]
    return GaussianMixture((2 * spiral().means @ rotation).reshape(-1, *shape), 0.1)


def sd3_toy():
    """An image transformer, of joint attention with the prompt; latents (1, 4, 4), a token per 2 x 2 patch."""
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=64,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
    )
    return transformer, call_sd3, spread_spiral(1, 4, 4)


def ltx_toy():
    """A video transformer, of attention across to the prompt; clips (4, 4, 1, 1), a token per frame."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        cross_attention_dim=64,
        caption_channels=8,
    )
    return transformer, call_ltx, spread_spiral(4, 4, 1, 1)


TOYS = {"sd3": sd3_toy, "ltx": ltx_toy}


def unprompted(call):
    """`call` with an empty prompt: the toys have none."""

    def without(transformer, z, t):
        prompts = (torch.zeros(len(z), 1, 8), torch.zeros(len(z), 8))
        return call(transformer, z, t, *prompts[: 2 if call is call_sd3 else 1])

    return without


def race(family, seed):
    """Teacher, then flow map: {"teacher" or "flow map": {nfe: sliced W2 to the truth}}."""
    torch.manual_seed(seed)
    transformer, call, mixture = TOYS[family]()
    call = unprompted(call)

    def learn(name, network, loss, **pairs):
        role = Role(network, loss, lr=4e-3, ema=0.99, warmup=50)
        progress = {"desc": f"{family}, seed {seed}, {name}", "disable": None}
        train({name: role}, batches(mixture.sample, 64, (seed,), **pairs), STEPS[name], progress=progress)
        return role.average.module

    stock = learn("teacher", Backbone(transformer, call, TINY_TIMESTEPS), FlowMapLoss({}), diagonal=1.0, end=0.0)
    student = FlowMapBackbone(copy.deepcopy(stock.transformer).requires_grad_(True), call, TINY_TIMESTEPS)
    loss = FlowMapLoss(FLOW_MAPS["mixed"], velocity=lambda z, t: stock(z, t, t), adaptive=0.5)
    flow_map = learn("flow map", student, loss)
    z, truth = sobol_noise(POINTS, mixture.shape), mixture.sample_stratified(POINTS, generator(0))

    def measure(sampler, u, nfe):
        return sliced_w2(sampler(u, z, time_grid(nfe))[-1], truth)

    return {
        "teacher": {nfe: measure(sample_euler, lambda z, t: stock(z, t, t), nfe) for nfe in (1, 2, 4, 8, 16)},
        "flow map": {nfe: measure(sample_flow_map, flow_map, nfe) for nfe in (1, 2, 4, 8, 16)},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for family in TOYS:
        for seed in map(int, sys.argv[1:] or "0"):
            for name, distances in race(family, seed).items():
                figures = " | ".join(f"{1000 * distance:.0f}" for distance in distances.values())
                tqdm.write(f"| {family}, {name}, seed {seed} | {figures} |")
