"""Exercises to notebook 8. Fill the gaps, then run this file: %run exercises/08_wan.py"""

import torch

from minianyflow import FLOW_MAPS, FlowMapLoss, Guidance, draw_pairs, generator
from minianyflow.course.exercises import check, finish, sealed
from minianyflow.networks.lora_roles import Adapter, add_role, merge_role
from minianyflow.networks.wan import tiny_transformer


def both(answers):
    """All answers, or nothing if one of them is missing."""
    return None if any(answer is None or answer is ... for answer in answers) else answers


# 1. Warm-up (5 minutes). How many tokens is a clip? Wan's codec makes one latent frame of the first frame and one of every
# further four, eight times smaller both ways; the transformer cuts latents into patches of (1, 2, 2).
def tokens(frames, height, width):
    """Return a whole number."""
    # SOLUTION
    return (1 + (frames - 1) // 4) * (height // 16) * (width // 16)
    # END


def cut(frames, height, width):
    latents = torch.empty(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8, device="meta")
    return torch.nn.Conv3d(16, 1, (1, 2, 2), (1, 2, 2), device="meta")(latents).numel()


CLIPS = ((81, 480, 832), (17, 64, 64), (1, 480, 832))
check("1", lambda: both([tokens(*clip) for clip in CLIPS]), [cut(*clip) for clip in CLIPS], "a token is 16 x 16 pixels")


# ... and what does the on-policy stage cost (5 minutes)? A sample takes `forwards` evaluations, `backwards` of them with gradient. A
# backward costs two forwards, and working through checkpointed blocks again one. 283 TFLOP a forward (1.3B), 32 samples
# a step, 1200 steps, on eight GPUs that reach 400 TFLOP/s each.
def hours(forwards, backwards):
    """Return the hours it takes."""
    # SOLUTION
    return 283 * (forwards + 3 * backwards) * 32 * 1200 / (8 * 400) / 3600
    # END


hint = "TFLOP of all steps over TFLOP a second of all GPUs; 3600 s an hour"
check("1, hours", lambda: hours(11.8, 4.6), sealed("MjQuMTQ5MzMz"), hint)


# 2. Out of the adapter, into the weights (10 minutes). A layer with a LoRA gives W x + alpha / rank B A x. For export it must be
# one matrix again.
def folded(W, A, B, alpha):
    """W (out, in), A (rank, in), B (out, rank); return (out, in)."""
    # SOLUTION
    return W + alpha / len(A) * B @ A
    # END


LAYER, ALPHA = "blocks.0.ffn.net.2", 6
transformer = tiny_transformer()
W = transformer.get_submodule(LAYER).weight.detach().clone()
add_role(transformer, "student", rank=4, alpha=ALPHA)
for number, weight in enumerate(Adapter(transformer, "student").parameters()):
    weight.data.normal_(generator=generator(number))
lora = Adapter(transformer, "student").get_submodule(LAYER)
A, B = lora.lora_A.weight.detach().clone(), lora.lora_B.weight.detach().clone()
merge_role(transformer, "student")
hint = "(B A) x is B (A x): multiply the two matrices; the rank is the number of rows of A"
check("2", lambda: folded(W, A, B, ALPHA), transformer.get_submodule(LAYER).weight, hint)


# 3. The bill (20 minutes). How many evaluations does a row of the forward stage cost on average, by all networks? A share
# `diagonal` of the rows has r = t; guidance is exact and no row drops its prompt: wherever a velocity is a target or a
# direction, the null branch is asked for it once. What each kind of row needs beside the network itself:
#    tangent     a velocity, of the data
#    eulerian    a velocity, of the data, and a central difference
#    semigroup   two jumps
#    mixed       half of the rows r < t are eulerian, half are semigroup
#    lagrangian  a velocity where the jump lands, and a central difference that gives the jump for free; for all its rows,
#                tangent ones too, the velocity is a teacher's
def bill(objective, diagonal):
    """Return a number of evaluations a row; objective: "eulerian", "semigroup", "mixed" or "lagrangian"."""
    # SOLUTION
    off = 1 - diagonal
    guided = {"eulerian": 1, "semigroup": 0, "mixed": 0.5, "lagrangian": 1}[objective]
    teacher = 1 if objective == "lagrangian" else 0
    return 1 + diagonal + guided * off + 2 * off + teacher
    # END


def counted(objective, diagonal, rows=400):
    asked = []

    def u(z, t, r, label):
        asked.append(len(z))
        return torch.zeros_like(z)

    velocity = (lambda z, t, label: u(z, t, t, label)) if objective == "lagrangian" else None
    batch = dict(zip(("x", "eps"), torch.randn(2, rows, 2, generator=generator(0))))
    batch |= draw_pairs(rows, generator(1), diagonal=diagonal, end=0.25)
    batch |= {"condition": {"label": torch.ones(rows)}, "dropped": torch.zeros(rows, dtype=torch.bool)}
    FlowMapLoss(FLOW_MAPS[objective], velocity, Guidance(3.0, {"label": torch.zeros(1)}))(u, batch)
    return sum(asked) / rows


CASES = [(objective, diagonal) for diagonal in (0.5, 0.25) for objective in FLOW_MAPS]
hint = "the network once on all rows, then kind by kind: null branch, two more for a difference or two jumps, a teacher"
check("3", lambda: both([bill(*case) for case in CASES]), [counted(*case) for case in CASES], hint, tolerance=0.01)

finish()
