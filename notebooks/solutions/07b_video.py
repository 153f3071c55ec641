"""Exercises to notebook 7b. Fill the gaps, then run this file: %run exercises/07b_video.py"""

import torch

from minianyflow import EvaluationCounter, generator, rollout, time_grid
from minianyflow.course.exercises import check, finish, sealed
from minianyflow.networks.causal import causal_backward_simulation, causal_rollout
from minianyflow.networks.causal_attention import attend, causal_mask
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.video.report import prompts_for
from minianyflow.video.stages import WEIGHTS, path_of
from toy_data import blobs

student, codec = load_network(path_of(WEIGHTS, "causal")), load_codec(path_of(WEIGHTS, "codec"))
prompt, _ = prompts_for(2)
noise = torch.randn(2, 5, 4, 4, 4, generator=generator(0))


# 1. Warm-up (5 minutes). Who sees whom: a query sees the keys of its own chunk and of earlier ones. Frames have
# `tokens` tokens each, none is compressed, there are no clean copies.
def mask(partition, tokens):
    """Return a (Q, K) tensor, 1 where query sees key. For (1, 2, 2) and 4 tokens it is 20 x 20."""
    # SOLUTION
    chunk = torch.arange(len(partition)).repeat_interleave(torch.tensor(partition) * tokens)  # of every token
    return (chunk[:, None] >= chunk[None, :]).float()
    # END


check(
    "1", lambda: mask((1, 2, 1), 2), causal_mask((1, 2, 1), 2, 1, 3), "say of every token which chunk it is in, compare"
)


# 2. The bill (10 minutes). A clip of `chunks` chunks is simulated with gradient: each chunk by the at most three jumps of
# step g of an N-step rollout; before each chunk but the first the clip so far is remembered, one evaluation.
# How often is the network asked?
def evaluations(chunks, N, g):
    """Return a whole number."""
    # SOLUTION
    return chunks * (1 + (g > 0) + (g < N - 1)) + chunks - 1
    # END


def counted(chunks, N, g):
    network = EvaluationCounter(student)
    z = torch.zeros(1, 2 * chunks - 1, 4, 4, 4)
    causal_backward_simulation()(network, z, torch.tensor([N]), torch.tensor([g]), prompt=prompt[:1])
    return network.rows


def all_of(count):
    answers = [count(*case) for case in ((1, 8, 3), (3, 8, 3), (3, 8, 0), (3, 8, 7), (5, 2, 1), (2, 1, 0))]
    return None if any(answer is None or answer is ... for answer in answers) else answers


check(
    "2", lambda: all_of(evaluations), all_of(counted), "jumps: notebook 5, exercise 1; the last chunk is not remembered"
)


# 3. An image starts to move (20 minutes). Given one image, make the next 8 frames by hand: encode it, remember it, then
# roll the next chunk out along `times`. What you need: codec.encode(image) and codec.decode(latents);
# student(x, None, None, prompt, fill_cache=True) gives a cache; rollout(student, z, times, prompt=..., cache=...).
def next_frames(image, z, times):
    """image (2, 1, 16, 16), z (2, 2, 4, 4, 4) noise of the chunk; return the video (2, 9, 16, 16), image first."""
    # SOLUTION
    first = codec.encode(image)
    cache = student(first, None, None, prompt, fill_cache=True)
    chunk = rollout(student, z, times, prompt=prompt, cache=cache)[-1]
    return codec.decode(torch.cat([first, chunk], 1))
    # END


def light(video):
    """The light of every frame, (2, 9); what is not there yet stays so."""
    return video if video is None or video is ... else video.sum((2, 3))


image = blobs.sample(2, generator(1)).video[:, :1]
with torch.no_grad():
    whole = causal_rollout(student, noise[:, :3], time_grid(4), prompt, prefix=codec.encode(image))[-1]
    hint = "latents are (B, F, C, H, W): join image and chunk along dimension 1 before you decode, not after"
    check("3", lambda: light(next_frames(image, noise[:, 1:3], time_grid(4))), light(codec.decode(whole)), hint)


# 4. Keys of zeros (20 minutes, on paper first). A query has logits l_1 ... l_K with its K true keys. Somebody adds M keys of
# zeros, with values of zero. Write what attention gives now as a factor times what it gave before.
def factor(logits, M):
    """Return the factor for each query, (Q,), from logits (Q, K)."""
    # SOLUTION
    weight = logits.exp().sum(1)  # a zero key has logit 0 and weighs exp(0) = 1
    return weight / (weight + M)
    # END


def from_attention(M):
    query, key, value = torch.randn(3, 1, 1, 6, 16, generator=generator(2))
    plain = attend(query, key, value)
    padded = attend(query, *(torch.nn.functional.pad(each, (0, 0, 0, M)) for each in (key, value)))
    return (query @ key.mT / 16**0.5)[0, 0], (padded / plain)[0, 0].mean(1)


logits, expected = from_attention(122)
hint = "softmax divides by the sum of exp(logit) over all keys; the padding adds to that sum, and nothing else"
check("4", lambda: factor(logits, 122), expected, hint)


# ... and how large is M? Stock diffusers fills the chunk's *queries* up to the next multiple of 128, and adds as many zeros
# to the keys, whatever their number.
def zeros_added(queries):
    """Return a whole number."""
    # SOLUTION
    return -queries % 128
    # END


def both(count):
    answers = [count(queries) for queries in (4, 8, 128, 1560)]
    return None if any(answer is None or answer is ... for answer in answers) else answers


check(
    "4, how many",
    lambda: both(zeros_added),
    sealed("WzEyNCwgMTIwLCAwLCAxMDRd"),
    "Python's % is never negative: -8 % 128 is 120",
)

finish()
