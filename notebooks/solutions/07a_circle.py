"""Exercises to notebook 7a. Fill the gaps, then run this file: %run exercises/07a_circle.py"""

import torch

from minianyflow import EvaluationCounter, generator
from minianyflow.course.exercises import check, finish, sealed
from minianyflow.plane.circle_measures import fit_speed, measure_clips
from minianyflow.plane.circle_student import CausalMLP, simulate
from toy_data.circle import SPEEDS, CircleProcess

process = CircleProcess()


def lawful(speed, frames=64):
    """Clips (C, frames, 2) that run at `speed` (C,), one of SPEEDS each: random phase and the process's blur."""
    phase = 2 * torch.pi * torch.rand(len(speed), 1, generator=generator(0))
    angle = phase + speed[:, None] * torch.arange(frames)
    clips = torch.stack([angle.cos(), angle.sin()], -1)
    return clips + process.clips.sigma * torch.randn(clips.shape, generator=generator(1))


# 1. Warm-up (5 minutes). How far is a law of speeds from the even one? Total variation is half the sum of the differences.
def tv(shares):
    """Return a number, from the shares (6,) of the six speeds."""
    # SOLUTION
    return 0.5 * (shares - 1 / 6).abs().sum()
    # END


two_left = lawful(torch.tensor(SPEEDS)[torch.arange(600) % 2])
expected = measure_clips(two_left, process, (16,))["tv"][0]
check("1", lambda: tv(torch.tensor([0.5, 0.5, 0, 0, 0, 0])), expected, "two differences of 1/3, four of 1/6")


# 2. The bill (10 minutes). On-policy training makes a clip of `frames` frames, each by the at most three jumps of step g of
# an N-step rollout; every g in 0..N-1 is equally likely. How many evaluations does a clip take on average?
def evaluations(frames, N):
    """Return a number."""
    # SOLUTION
    return frames * (3 - 2 / N)
    # END


def counted(frames, N):
    network = EvaluationCounter(CausalMLP(width=4))
    simulate(True)(network, torch.zeros(N, frames, 2), torch.full((N,), N), torch.arange(N))
    return network.rows / N


def all_of(count):
    answers = [count(*case) for case in ((1, 4), (16, 1), (16, 4), (16, 16))]
    return None if any(answer is None or answer is ... for answer in answers) else answers


check(
    "2", lambda: all_of(evaluations), all_of(counted), "one of the N steps has no jump before it, one has none after it"
)


# 3. What a clip keeps (10 minutes). fit_speed(window) returns, of windows (C, 16, 2), the number of the nearest speed (C,),
# and how far from it the window is. Which share of clips ends at the speed at which it began?
def kept(clips):
    """Return a number, from clips (C, F, 2)."""
    # SOLUTION
    return (fit_speed(clips[:, :16])[0] == fit_speed(clips[:, -16:])[0]).double().mean()
    # END


half = lawful(torch.tensor(SPEEDS).repeat(100))
half[::2, 32:] = half[::2, 32:].flip(1)  # every other clip runs backwards
check("3", lambda: kept(half), measure_clips(half, process, (64,))["kept"][0], "compare the first window and the last")


# 4. Fool a distance (20 minutes). Make clips whose windows of 16 frames at frames 16 and 64 have the law of data (sliced W2
# below .12), while not one clip keeps its speed. lawful(speed) makes clips of given speeds.
def forgetful():
    """Return clips (600, 64, 2)."""
    # SOLUTION
    speed = torch.tensor(SPEEDS).repeat(100)
    return torch.cat([lawful(speed)[:, :32], lawful(speed.roll(1))[:, 32:]], 1)
    # END


def caught(clips):
    """Whether both distances are small, and the share of clips that keep their speed."""
    if clips is None or clips is ...:
        return clips
    figures = measure_clips(clips, process, (16, 64))
    return [max(figures["sliced_w2"]) < 0.12, figures["kept"][1]]


hint = "the first 32 frames of a clip at one speed, the others at another; all six speeds in equal shares, both times"
check("4", lambda: caught(forgetful()), sealed("W3RydWUsIDAuMF0="), hint)

finish()
