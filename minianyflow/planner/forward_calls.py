"""Which forward calls a training step makes: the losses of a stage run on their own draws, with recording networks.

A recording network computes nothing. It records each call and its backward, and the bytes that the loss holds then.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

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
    frames: of z. context: number of earlier frames, clean or in the cache. unit: whether it is in a part of a rollout
    that is recomputed as a whole (support.recompute).
    """

    role: str
    rows: int
    grad: bool
    state_grad: bool
    kind: str
    frames: int
    context: int = 0
    unit: bool = False

    @property
    def per_row(self) -> "ForwardCall":
        """The call that has the cost of one row; a forward costs the same whether or not a backward follows."""
        grad = self.role != "teacher" and (self.grad or self.kind != "fill_cache")
        return replace(self, rows=1, unit=False, grad=grad, state_grad=self.state_grad and self.grad)

    @property
    def cached(self) -> int:
        """The number of frames in the cache that it fills or reads, by which the caches of a rollout differ; or 0."""
        return {"fill_cache": self.frames, "read_cache": self.context}.get(self.kind, 0)


@dataclass(frozen=True)
class Event:
    """A network starts on a call: its "forward", the same "again" to recompute a unit, or its "backward".

    beside: bytes that batch and loss hold then, beside networks. caches: (rows, frames) of those that are there.
    """

    call: ForwardCall
    what: str
    beside: float
    caches: tuple[tuple[int, int], ...]


@dataclass
class Record:
    """The events of a loss and its backward, in order. live: counts the bytes beside networks. caches: {stand-in:
    (rows, frames)}, while they are held.
    """

    events: list[Event] = field(default_factory=list)
    live: LiveBytes | None = None
    caches: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def note(self, call: ForwardCall, what: str, gradient: torch.Tensor | None = None) -> None:
        """Add the event that is now. gradient: of the call's output, which its backward frees."""
        beside = self.live.now - (0 if gradient is None else gradient.nbytes)
        self.events.append(Event(call, what, beside, tuple(self.caches.values())))


class RecordingNetwork(nn.Module):
    """Takes a network's place in a loss: its calls and their backwards are events of `record`. It computes nothing.

    holds: whether its backward reads caches again, as recomputed blocks do.
    """

    def __init__(self, role, record, holds, one_chunk=False):
        super().__init__()
        self.role, self.record, self.holds, self.one_chunk = role, record, holds, one_chunk
        self.weight = nn.Parameter(torch.ones(()))

    def forward(
        self, z, t, r, prompt, clean=None, past=None, cache=None, single_chunk=None, known=None, fill_cache=False
    ):
        """A tensor of the shape of z, with gradient where the network's has one; or a stand-in for a cache."""
        kind, context = "fill_cache" if fill_cache else "plain", 0
        if clean is not None:
            kind, context = "teacher_forced", 0 if past is None else past.shape[1]
        elif cache is not None:
            kind, context = "read_cache", cache[0][0].shape[3] if cache else 0
        elif not fill_cache and (self.one_chunk or single_chunk is not None):
            kind = "one_chunk"
        if cache:
            self.record.caches[cache[0][0]] = len(z), context  # some rows of one are another cache
        grad = torch.is_grad_enabled() and self.weight.requires_grad
        unit, again = current_unit()
        call = ForwardCall(self.role, len(z), grad, z.requires_grad, kind, z.shape[1], context, unit is not None)
        self.record.note(call, "again" if again else "forward")
        # the backward of a product needs the state, as that of a network's embedder does
        out = (torch.zeros(len(z), 1, 1, z.shape[1], 1) if fill_cache else z) * self.weight
        if cache:
            out = out + (cache[0][0] * (self.weight if self.holds else 1)).sum()
        if fill_cache:
            self.record.caches[out] = len(z), z.shape[1]
        if out.requires_grad:
            out.register_hook(partial(self.record.note, call, "backward"))
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
    """What one process computes for one term of a role's loss on its part of the batch, forward and backward.

    rollout: whether it is the term of the rollouts. first: whether no gradients are there yet.
    """

    step: int
    process: int
    role: str
    events: list[Event]
    rollout: bool
    first: bool

    @property
    def calls(self) -> list[ForwardCall]:
        """Those of the forward."""
        return [event.call for event in self.events if event.what == "forward"]


def forward_calls(config: Config, shape, length: int, steps, processes=1, exact=False) -> list[MicroBatch]:
    """Every micro-batch of these steps, in order.

    shape: (F, C, H, W) of a clip. length: numbers per prompt. exact: the rollouts of these very steps, not others of
    the same distribution; that takes as long as drawing their noise.
    """
    scale = shape[2] * shape[3] / SMALL**2  # numbers of a real clip per number here
    data = ZeroClips((*shape[:2], SMALL, SMALL), max(1, round(length / scale)))
    record, holds = Record(), config.checkpointing
    networks = SimpleNamespace(  # in place of RunNetworks
        trained=lambda role, start=None: RecordingNetwork(role, record, holds, one_chunk=role == "fake"),
        teacher=lambda whole=False: RecordingNetwork("teacher", record, holds, whole).requires_grad_(False),
        wait=lambda: None,
    )
    roles = STAGES[config.stage](replace(config, student=None, teacher=None), networks, {"prompt": data.null})
    draw, micro_batches, known = draws(config, data), [], {}
    for step in steps:
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
                terms = getattr(role.loss, "terms", (role.loss,))
                for term in terms:
                    record.events, record.live = [], LiveBytes()
                    term(role.network, part)
                    key = name, terms.index(term), *(event.call for event in record.events)
                    if key not in known:  # counting is slow, and many micro-batches are alike
                        record.events, record.live = [], LiveBytes([*inputs, data.null, *role.network.parameters()])
                        record.live.now = sum(tensor.nbytes for tensor in inputs)
                        with record.live:
                            term(role.network, part)[0].mean().backward()
                        known[key] = [replace(event, beside=scale * event.beside) for event in record.events]
                    first = index == 0 and term == terms[0]
                    rollout = hasattr(role.loss, "terms") and term == terms[0]
                    micro_batches.append(MicroBatch(step, process, name, known[key], rollout, first))
    return micro_batches


_CALLS = {}


def known_calls(config: Config, *given) -> list[MicroBatch]:
    """`forward_calls`, once for all configurations that differ in what rests elsewhere."""
    config = replace(config, offload=[], shard_base=False, sequence_parallel=1)
    key = repr((config, given))
    if key not in _CALLS:
        _CALLS[key] = forward_calls(config, *given)
    return _CALLS[key]
