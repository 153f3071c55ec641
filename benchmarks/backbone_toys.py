"""Two tiny transformers of other families, from teacher to flow map on a toy whose truth is exact.

`python -m benchmarks.backbone_toys 0 1 2` prints the table of docs/backbones.md, seed by seed.
"""

import copy
import sys
from functools import partial

import torch
from diffusers import LTXVideoTransformer3DModel, SD3Transformer2DModel
from torch import nn
from tqdm import tqdm

from benchmarks.backbones import Backbone, FlowMapBackbone, call_ltx, call_sd3
from minianyflow.batch import batches
from minianyflow.flow_map import tangent, velocity
from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.mixtures import GaussianMixture
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, draw_on_policy
from minianyflow.samplers import sample_flow_map
from minianyflow.times import generator, time_grid
from minianyflow.training import Role, train
from toy_data.plane import spiral

POINTS, ROWS, NFE = 1024, 64, (1, 2, 4, 8, 16)
TEACHER, FORWARD, ON_POLICY = 400, 500, 100  # steps
RATE, FORWARD_WEIGHT = 1e-3, 1.0  # of on-policy training
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


def race(family, seed, on_policy=True):
    """The stages of one seed: ({name: {nfe: sliced W2 to the truth}}, {name: forwards and backwards of all networks}).

    With `on_policy` that stage, and the forward stage alone at equal cost, go on from the flow map.
    """
    torch.manual_seed(seed)
    transformer, call, mixture = TOYS[family]()
    call, distances, costs = unprompted(call), {}, {}
    z, truth = sobol_noise(POINTS, mixture.shape), mixture.sample_stratified(POINTS, generator(0))

    def learn(name, steps, roles, stream=0, **pairs):
        counters = [stock, *(counter for role in roles.values() for counter in (role.network, role.average.module))]
        before, drawn = evaluations(counters), batches(mixture.sample, ROWS, (seed,), **pairs)

        def draw(step):
            more = draw_on_policy(mixture.shape, ROWS, generator(seed, step, 1)) if "fake" in roles else {}
            return drawn(step + stream) | more

        train(roles, draw, steps, progress={"desc": f"{family}, seed {seed}, {name}", "disable": None})
        costs[name] = evaluations(counters) - before
        u = next(iter(roles.values())).average.module.network
        follow = tangent(u) if name == "teacher" else u  # Euler's method
        ends = {nfe: sample_flow_map(follow, z, time_grid(nfe))[-1] for nfe in NFE}
        distances[name] = {nfe: sliced_w2(end, truth) for nfe, end in ends.items()}
        return u

    def role(network, loss=None, lr=4e-3, **options):
        return Role(EvaluationCounter(network), loss, lr=lr, ema=0.99, warmup=50, **options)

    def copied(u):
        return copy.deepcopy(u).requires_grad_(True)

    stock = EvaluationCounter(nn.Identity())  # of the teacher, when it is learnt
    teacher = role(Backbone(transformer, call, TINY_TIMESTEPS), FlowMapLoss({}))
    stock.network = learn("teacher", TEACHER, {"teacher": teacher}, diagonal=1.0, end=0.0)
    real = partial(velocity, stock)
    forward = FlowMapLoss(FLOW_MAPS["mixed"], velocity=real, adaptive=0.5)
    student = FlowMapBackbone(copied(stock.network.transformer), call, TINY_TIMESTEPS)
    flow_map = learn("flow map", FORWARD, {"student": role(student, forward)})
    if not on_policy:
        return distances, costs
    slow = {"betas": (0.0, 0.999)}
    student, fake = role(copied(flow_map), lr=RATE, **slow), role(copied(stock.network), lr=5 * RATE, **slow)
    student.loss = OnPolicyLoss(real, fake.network, forward, FORWARD_WEIGHT)
    fake.loss = FakeScoreLoss(student.network)
    learn("on-policy", ON_POLICY, {"student": student, "fake": fake}, FORWARD)
    steps = round(FORWARD * costs["on-policy"] / costs["flow map"])
    learn("forward alone", steps, {"student": role(copied(flow_map), forward)}, FORWARD)
    return distances, costs


def evaluations(counters):
    """Forwards and backwards, rows of all of them."""
    return sum(counter.rows + counter.with_grad for counter in counters)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for family in TOYS:
        for seed in map(int, sys.argv[1:] or "0"):
            reached, costs = race(family, seed)
            for name, distances in reached.items():
                figures = " | ".join(f"{1000 * distance:.0f}" for distance in distances.values())
                tqdm.write(f"| {family}, {name}, seed {seed} | {figures} | {costs[name] / 1000:.0f} |")
