"""Which forward calls a training step makes: the losses of a stage run on their own draws, with recording networks.

A recording network computes nothing. It records the rows of each call, whether gradient is needed, and the context.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace

import torch
from torch import nn

from minianyflow.batch import deal, part_of
from minianyflow.on_policy import draw_on_policy
from minianyflow.planner.counters import LiveBytes, tensors_in
from minianyflow.support.recompute import current_unit
from minianyflow.times import draw_pairs, generator
from minianyflow.wan.config import Config
from minianyflow.wan.data.latents import TIMES
from minianyflow.wan.stages import ROLLOUTS, STAGES, draws

SMALL = 2  # height and width of the latents that recording networks get


@dataclass(frozen=True)
class ForwardCall:
    """One forward of the network of a role.

    grad: whether a backward follows. state_grad: whether gradient reaches the state z. kind: "plain"; of a causal
    network "one_chunk", "teacher_forced" (all chunks at once, beside clean ones), "fill_cache" or "read_cache".
    frames: of z. context: number of earlier frames, clean or in the cache. cache: the id of the one used. unit: the
    number of the part of a rollout that is recomputed as a whole (support.recompute), if it is in one.
    """

    role: str
    rows: int
    grad: bool
    state_grad: bool
    kind: str
    frames: int
    context: int = 0
    cache: int | None = None
    unit: int | None = None

    @property
    def per_row(self) -> "ForwardCall":
        """The call that has the cost of one row; a forward costs the same whether or not a backward follows."""
        grad = self.role != "teacher" and (self.grad or self.kind != "fill_cache")
        return replace(self, rows=1, cache=None, unit=None, grad=grad, state_grad=self.state_grad and self.grad)


class RecordingNetwork(nn.Module):
    """Takes a network's place in a loss: appends each call to `calls`, and computes nothing."""

    def __init__(self, role, calls, one_chunk=False):
        super().__init__()
        self.role, self.calls, self.one_chunk, self.caches = role, calls, one_chunk, []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(
        self, z, t, r, prompt, clean=None, past=None, cache=None, single_chunk=None, known=None, fill_cache=False
    ):
        """A tensor of the shape of z, with gradient where the network's has one; or a stand-in for a cache."""
        kind, context, which = "fill_cache" if fill_cache else "plain", 0, None
        if clean is not None:
            kind, context = "teacher_forced", 0 if past is None else past.shape[1]
        elif cache is not None:
            kind, context = "read_cache", cache[0][0].shape[3] if cache else 0
        elif not fill_cache and (self.one_chunk or single_chunk is not None):
            kind = "one_chunk"
        out = torch.zeros(len(z), 1, 1, z.shape[1], 1) + self.weight if fill_cache else z + self.weight
        if fill_cache or cache:
            self.caches.append(out if fill_cache else cache[0][0])  # held, so that no other cache gets its id
            which = id(self.caches[-1])
        grad = torch.is_grad_enabled() and self.weight.requires_grad
        unit, again = current_unit()
        call = ForwardCall(self.role, len(z), grad, z.requires_grad, kind, z.shape[1], context, which, unit)
        self.calls.extend([] if again else [call])
        return ((out, out),) if fill_cache else out


class ZeroClips:
    """Takes the place of the data of a run: times and dropped prompts are drawn as there, all clips are zero."""

    def __init__(self, shape, length):
        self.shape, self.null = shape, torch.ones(1, length, 1)  # guidance skips rows whose prompt is the null prompt

    def draw(self, step, rows, seed=0, part=(0, 1), **pairs):
        """The batch of `step`, as the data of a run draws it."""
        times = deal(draw_pairs(rows, generator(seed, TIMES, step), **pairs), *part)
        rows = len(times["t"])
        x, eps = torch.zeros(2, rows, *self.shape)
        prompt = torch.zeros(rows, *self.null.shape[1:])
        return {"x": x, "eps": eps, "condition": {"prompt": prompt}, "row": torch.arange(rows)} | times


@dataclass(frozen=True)
class MicroBatch:
    """What one process computes up to a backward: the calls of one term of a role's loss on its part of the batch.

    rollout: whether it is the term of the rollouts. first: whether no gradients are there yet.
    """

    step: int
    process: int
    role: str
    calls: tuple[ForwardCall, ...]
    rollout: bool
    first: bool


def forward_calls(config: Config, shape, length: int, steps, processes=1, exact=False) -> tuple[list[MicroBatch], dict]:
    """Every micro-batch of these steps, in order; and the bytes beside networks (batch, loss), {role: largest}.

    shape: (F, C, H, W) of a clip. length: numbers per prompt. exact: the rollouts of these very steps, not others of
    the same distribution; that takes as long as drawing their noise.
    """
    scale = shape[2] * shape[3] / SMALL**2  # numbers of a real clip per number here
    data = ZeroClips((*shape[:2], SMALL, SMALL), max(1, round(length / scale)))
    calls = []
    networks = SimpleNamespace(  # in place of RunNetworks
        trained=lambda role, start=None: RecordingNetwork(role, calls, one_chunk=role == "fake"),
        teacher=lambda whole=False: RecordingNetwork("teacher", calls, whole).requires_grad_(False),
        wait=lambda: None,
    )
    roles = STAGES[config.stage](replace(config, student=None, teacher=None), networks, {"prompt": data.null})
    draw, micro_batches, beside = draws(config, data), [], Counter()
    for number, step in enumerate(steps):
        batch = draw(step)
        if exact and config.stage == "on_policy":
            source = generator(config.seed, ROLLOUTS, step)  # it draws the noise of a real clip first
            policy = config.on_policy
            drawn = draw_on_policy(shape, config.batch, source, policy.rollouts, shared=policy.shared_rollout)
            batch |= {name: drawn[name][batch["place"]] for name in ("lengths", "step")}
        dealt = [deal(batch, process, processes) for process in range(processes)]
        for name, role in roles.items():
            for process, index in product(range(processes), range(config.accumulate)):
                part = part_of(dealt[process], index, config.accumulate)
                inputs = tensors_in(part)
                live = LiveBytes([*inputs, data.null, *role.network.parameters()])
                terms = getattr(role.loss, "terms", (role.loss,))
                for term in terms:
                    calls.clear()
                    with contextlib.nullcontext() if number else live:  # it is slow, and all steps are alike
                        losses, _ = term(role.network, part)
                    before_backward = live.now + sum(tensor.nbytes for tensor in inputs)
                    losses.mean().backward()
                    beside[name] = max(beside[name], scale * before_backward)
                    first = index == 0 and term == terms[0]
                    rollout = hasattr(role.loss, "terms") and term == terms[0]
                    micro_batches.append(MicroBatch(step, process, name, tuple(calls), rollout, first))
    return micro_batches, beside


_CALLS = {}


def known_calls(config: Config, *given) -> tuple[list[MicroBatch], dict]:
    """`forward_calls`, once for all configurations that differ in what rests elsewhere."""
    config = replace(config, offload=[], shard_base=False, sequence_parallel=1)
    key = repr((config, given))
    if key not in _CALLS:
        _CALLS[key] = forward_calls(config, *given)
    return _CALLS[key]
