"""Who is asked what in a step of training: a stage's own losses, on their own draws, with stand-ins for the networks.

A stand-in writes down how many rows it is asked for, with or without gradient, and answers without computing.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import nn

from minianyflow.batch import part_of
from minianyflow.on_policy import draw_on_policy
from minianyflow.planner.costs import Live
from minianyflow.times import generator
from minianyflow.wan.data.shards import LatentShards
from minianyflow.wan.stages import ROLLOUTS, STAGES, draws

SMALL = 2  # high and wide: the latents that stand-ins are asked about


@dataclass(frozen=True)
class Question:
    """To whom, for how many rows, with gradient or not, with gradient to the state or not; and what the state is.

    kind: "all" frames, "whole", "forced" (chunks at once, with the clean ones), "read" or "remember" (of a cache).
    before: frames that are known, `past` or in the cache. cache: which one is read.
    """

    role: str
    rows: int
    grad: bool
    moved: bool
    kind: str
    frames: int
    before: int = 0
    cache: int | None = None

    @property
    def costs(self):
        """What decides the cost of a row: that of a forward is the same with a backward after it."""
        grad = self.role != "teacher" and (self.grad or self.kind != "remember")
        return replace(self, rows=1, cache=None, grad=grad, moved=self.moved and self.grad)


class StandIn(nn.Module):
    """Takes a network's place in its loss: writes down what it is asked in `asked`, and answers without computing."""

    def __init__(self, role, asked, whole=False):
        super().__init__()
        self.role, self.asked, self.whole, self.caches = role, asked, whole, []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, z, t, r, prompt, clean=None, past=None, cache=None, single_chunk=None, fill_cache=False):
        """States of the shape of z, with a gradient where a network's would have one; or something like a cache."""
        before, which = 0, None
        kind = "whole" if self.whole or single_chunk is not None else "all"
        if clean is not None:
            kind, before = "forced", 0 if past is None else past.shape[1]
        if cache is not None:
            kind, before = "read", cache[0][0].shape[3] if cache else 0
        if fill_cache:
            kind = "remember"
        grad = torch.is_grad_enabled() and self.weight.requires_grad
        made = torch.zeros(len(z), 1, 1, z.shape[1], 1) + self.weight if fill_cache else z + self.weight
        if fill_cache or cache:
            seen = made if fill_cache else cache[0][0]
            which = id(seen)
            self.caches.append(seen)  # or another could get its number
        self.asked.append(Question(self.role, len(z), grad, z.requires_grad, kind, z.shape[1], before, which))
        return ((made, made),) if fill_cache else made


class StandIns:
    """In place of RunNetworks, for the functions of wan/stages.py that make the roles of a stage."""

    def __init__(self):
        self.asked = []

    def trained(self, role, start=None):
        """As RunNetworks."""
        return StandIn(role, self.asked, whole=role == "fake")

    def teacher(self, whole=False):
        """As RunNetworks."""
        return StandIn("teacher", self.asked, whole).requires_grad_(False)


class NoShards(LatentShards):
    """Draws as LatentShards does, but all samples are zeros."""

    def __init__(self, shape, length):
        self.shape, self.null = shape, torch.ones(1, length, 1)

    def __len__(self):
        return 1 << 20

    def _order(self, seed, epoch):
        return torch.arange(len(self))

    def rows(self, indices):
        """Zeros, as many as asked for."""
        count = len(list(indices))
        return torch.zeros(count, *self.shape), torch.zeros(count, *self.null.shape[1:])


@dataclass(frozen=True)
class Part:
    """What one process does at once: the questions of one role's loss."""

    step: int
    process: int
    role: str
    asked: tuple


def trace(config, shape, length, steps, processes=1, exact=False):
    """Every Part of these steps, in order, and bytes beside networks, {role: at most}.

    shape: (F, C, H, W) of a clip; length: numbers of a prompt. exact: rollouts are those of these very steps, not
    others like them, which takes as long as drawing their noise.
    """
    numbers = shape[2] * shape[3] / SMALL**2  # in place of each one there is here
    data = NoShards((*shape[:2], SMALL, SMALL), max(1, round(length / numbers)))
    networks = StandIns()
    quiet = replace(config, student=None, teacher=None)
    roles = STAGES[config.stage](quiet, networks, {"prompt": data.null})
    draw, parts, beside = draws(config, data), [], Counter()
    for step in steps:
        batch = draw(step)
        if exact and config.stage == "on_policy":
            source = generator(config.seed, ROLLOUTS, step)  # the noise of a clip's size comes first
            drawn = draw_on_policy(shape, config.batch, source, tuple(config.on_policy.rollouts))
            batch |= {name: drawn[name] for name in ("lengths", "step")}
        for name, role in roles.items():
            for index in range(processes * config.accumulate):
                networks.asked.clear()
                part = part_of(batch, index, processes * config.accumulate)
                given = list(_tensors(part))
                live = Live([*given, data.null, *role.network.parameters()])
                with live if step == steps[0] else contextlib.nullcontext():  # it is slow, and all steps are alike
                    losses, _ = role.loss(role.network, part)
                there = live.now + sum(each.nbytes for each in given)  # when the backward begins
                losses.mean().backward()
                beside[name] = max(beside[name], numbers * there)
                parts.append(Part(step, index // config.accumulate, name, tuple(networks.asked)))
    return parts, beside


def _tensors(batch):
    for value in batch.values():
        yield from value.values() if isinstance(value, dict) else [value]
