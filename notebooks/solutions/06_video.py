"""Exercises to notebook 6. Fill the gaps, then run this file: %run exercises/06_video.py"""

import torch

from minianyflow import flow_map
from minianyflow.consistency import ConsistencyLoss
from minianyflow.course.exercises import check, finish
from minianyflow.measures import sobol_noise
from minianyflow.networks.mlp import MLP, EvaluationCounter
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.objectives import FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, draw_on_policy
from minianyflow.samplers import sample_flow_map
from minianyflow.times import draw_pairs, generator, time_grid
from minianyflow.video.measures import physics
from minianyflow.video.stages import WEIGHTS, path_of
from toy_data import blobs

codec, student = load_codec(path_of(WEIGHTS, "codec")), load_network(path_of(WEIGHTS, "eulerian"))
one_ball, two_balls = TextEncoder()(blobs.PROMPTS)  # (L, D) each
SIZES = [(1, 16, 16), (17, 16, 16), (33, 16, 32)]


# 1. Warm-up (2 minutes). How many numbers are the latents of a clip? The first frame becomes one latent frame, every
# further four become one; a latent frame has 4 channels and is four times smaller both ways.
def numbers(frames, height, width):
    """Return a whole number."""
    # SOLUTION
    return (1 + (frames - 1) // 4) * 4 * (height // 4) * (width // 4)
    # END


def all_sizes():
    answers = [numbers(*size) for size in SIZES]
    return None if any(answer is None or answer is ... for answer in answers) else answers


expected = [codec.encode(torch.zeros(1, *size)).numel() for size in SIZES]
check("1", all_sizes, expected, "1 + (frames - 1) / 4 latent frames, 4 channels, a sixteenth of the pixels")


# 2. A jump for videos (10 minutes), without the library's. Times are one a clip, (B,), or one a frame, (B, F): both must
# work. A time for every frame is what notebook 7b needs.
def jump(u, z, t, r, prompt):
    """Return z at r: (B, F, C, H, W), from z at t; t and r are both (B,) or both (B, F)."""
    # SOLUTION
    length = (t - r).reshape(t.shape + (1,) * (z.ndim - t.ndim))  # (B, 1, 1, 1, 1) or (B, F, 1, 1, 1)
    return z - length * u(z, t, r, prompt=prompt)
    # END


z, prompt = sobol_noise(4, (5, 4, 4, 4)), torch.stack([one_ball, two_balls] * 2)
r, t = torch.rand(2, 4, 5, generator=generator(0)).sort(0).values  # (B, F)
for name, late, early in (("one time a clip", t[:, 0], r[:, 0]), ("one time a frame", t, r)):
    expected = flow_map.jump(student, z, late, early, prompt=prompt)
    hint = "t - r must get as many dimensions as z, its own first: reshape it with ones at the end"
    check(f"2, {name}", lambda late=late, early=early: jump(student, z, late, early, prompt), expected, hint)


# 3. The bill (20 minutes). One training step on 128 rows: how many states are evaluated in all, by all networks?
#    (a) the teacher: flow matching on eps - x
#    (b) a flow map: Eulerian by central difference on the teacher's velocity, half of the rows r = t
#    (c) consistency from the teacher: grid of 16 times, one Heun step; t is spread evenly, so 8 rows step to 0,
#        where the averaged student is not asked
#    (d) on-policy: (b) on 128 rows, beside rollouts of three jumps; two updates, the student's and the fake score's
def bill():
    """Return a list of four whole numbers."""
    # SOLUTION
    flow_matching = 128
    flow_map_step = 128 + 2 * 64 + 128  # the student, its derivative on rows r < t, the teacher on all
    consistency = 128 + 2 * 128 + 128 - 8  # the student, a Heun step of the teacher, the average where s > 0
    student_update = 3 * 128 + 2 * 128 + flow_map_step  # rollout, two scores, the forward loss
    return [flow_matching, flow_map_step, consistency, student_update + 3 * 128 + 128]
    # END


def counted():
    networks = [EvaluationCounter(MLP((5, 4, 4, 4), width=4, depth=1)) for _ in range(3)]
    u, teacher, other = networks  # other: the averaged student, or the fake score
    source, even = generator(0), (torch.arange(128) + 0.5) / 128
    x, eps = torch.randn(2, 128, 5, 4, 4, 4, generator=source)
    batch = {"x": x, "eps": eps} | draw_pairs(128, source) | draw_on_policy(x.shape[1:], 128, source, steps=(4,))
    batch["step"] = torch.ones(128, dtype=torch.long)  # neither the first nor the last: three jumps
    forward = FlowMapLoss({"eulerian": 1.0}, velocity=lambda z, t: teacher(z, t, t))
    losses = [
        [FlowMapLoss({})],
        [forward],
        [ConsistencyLoss(lambda z, t: teacher(z, t, t), other, grid=16, solver="heun")],
        [OnPolicyLoss(lambda z, t: teacher(z, t, t), other, forward), FakeScoreLoss(u)],
    ]
    spent = []
    for stage, (first, *second) in enumerate(losses):
        start = sum(each.rows for each in networks)
        first(u, batch | ({"t": even, "r": even} if stage in (0, 2) else {}))
        for loss in second:
            loss(other, batch)
        spent.append(sum(each.rows for each in networks) - start)
    return spent


hint = "write each loss as a list of who is asked, on how many rows: network, derivative, teacher, rollout, scores"
check("3", bill, counted(), hint)


# 4. A prompt swapped on the way (30 minutes). Ask for one ball while t > swap, and for two balls from then on.
def swapped(u, z, first, second, steps, swap):
    """Return the clean latents of a rollout of `steps` equal steps; first and second are prompts (B, L, D)."""
    # SOLUTION
    times = time_grid(steps)
    for t, r in zip(times[:-1], times[1:]):
        rows = torch.ones(len(z))
        z = flow_map.jump(u, z, t * rows, r * rows, prompt=first if t > swap else second)
    return z
    # END


STEPS, SWAPS = 20, (0.98, 0.92, 0.82, 0.72, 0.62, 0.52, 0.42)
noise = sobol_noise(64, (5, 4, 4, 4))
first, second = one_ball.expand(64, -1, -1), two_balls.expand(64, -1, -1)


def ends(swap):
    def u(z, t, r):
        return student(z, t, r, prompt=torch.where(t[:, None, None] > swap, first, second))

    return sample_flow_map(u, noise, time_grid(STEPS))[-1]


reference = {swap: ends(swap) for swap in SWAPS}
hint = "one jump after another; which prompt a jump gets depends on the time t at which it starts"
check("4", lambda: swapped(student, noise, first, second, STEPS, 0.72), reference[0.72], hint)


# ... and when is the number of balls decided? Count balls in the last frame of codec.decode(...), for all of SWAPS:
# physics(video, balls)["count"] is (B, T). Answer with the largest of SWAPS at which at most a half of the clips still
# end with two balls.
def decided():
    """Return one of SWAPS."""
    # SOLUTION
    for swap in SWAPS:
        video = codec.decode(swapped(student, noise, first, second, STEPS, swap))
        if (physics(video, [2] * len(video))["count"][:, -1] == 2).float().mean() <= 0.5:
            return swap
    # END


share = {}
for swap, latents in reference.items():
    share[swap] = float((physics(codec.decode(latents), [2] * 64)["count"][:, -1] == 2).float().mean())
expected = max(swap for swap, value in share.items() if value <= 0.5)
check("4, when", decided, expected, "with a swap near 1 most clips get two balls, with one near 0 hardly any: go down")

finish()
