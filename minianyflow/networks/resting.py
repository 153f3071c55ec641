"""Frozen weights of blocks that rest elsewhere: a block's come for its forward alone, and for its recomputation.

The embedder of times and text counts as the first block.

They rest in CPU memory, from where the next block's are on their way while a block computes; or each process keeps a
part of every block, and all gather it together. Processes differ in which block they need next, as their rows do: so
before each gather they agree on one, and those that need another throw it away. Forwards go first; recomputations come
after them, from the last block to the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import distributed, nn

from minianyflow.networks.sequence import TIMEOUT
from minianyflow.support import host

ALIGNED = 16  # bytes: where a weight of any dtype may begin
_RECOMPUTED = ContextVar("recomputed", default=False)


class RestingBlocks:
    """Takes the frozen weights off the blocks of a transformer; all else of it goes to the device.

    shared: out to all processes, else into CPU memory. Adapters that come later stay.
    """

    def __init__(self, transformer: nn.Module, device: torch.device | str, shared: bool = False):
        self.device, self.shared, self.blocks, self.ahead = device, shared, [], {}
        # a group of CPUs: no GPU waits for a vote
        self.ballots = distributed.new_group(backend="gloo", timeout=TIMEOUT) if shared else None
        blocks = (transformer.condition_embedder, *transformer.blocks)
        for number, block in enumerate(blocks):
            self.blocks.append(self._rest(block))
            block.forward = partial(self._run, number, block.forward)
        resting = {id(weight) for block in blocks for weight in block.parameters()}
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            tensor.data = tensor.data if id(tensor) in resting else tensor.data.to(device)

    def _rest(self, block):
        """The weights of a block as bytes, or this process's part of them; and where each belongs and lies."""
        owners = [module._parameters for module in block.modules()]
        weights = [(own, name, weight) for own in owners for name, weight in own.items() if weight is not None]
        starts, processes = [0], distributed.get_world_size() if self.shared else 1
        for _, _, weight in weights:
            starts.append(starts[-1] + -(-weight.nbytes // ALIGNED) * ALIGNED)
        size = -(-starts[-1] // processes // ALIGNED) * ALIGNED * processes
        whole = weights[0][2].new_zeros(size, dtype=torch.uint8)
        for (_, _, weight), start in zip(weights, starts, strict=False):
            whole[start : start + weight.nbytes] = weight.detach().flatten().view(torch.uint8)
            weight.data = weight.data.new_zeros(1).expand(weight.shape)
        if self.shared:
            part = whole.chunk(processes)[distributed.get_rank()].to(self.device, copy=True)
        else:
            part = host.store(whole, wait=True)
        return part, [(*weight, start) for weight, start in zip(weights, starts, strict=False)]

    def _run(self, number, forward, *arguments, **options):
        place = 2 * len(self.blocks) - 1 - number if _RECOMPUTED.get() else number
        whole = self.gather(place) if self.shared else self._fetch(place)
        _, weights = self.blocks[number]
        try:
            for own, name, weight, start in weights:  # new ones, or a backward would see those at rest
                value = whole[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
                own[name] = nn.Parameter(value, requires_grad=False)
            del whole, value
            return forward(*arguments, **options)
        finally:
            for own, name, weight, _ in weights:
                own[name] = weight

    def _at(self, place):
        """What rests of the block at a place in the order of a forward and of a backward after it."""
        return self.blocks[min(place, 2 * len(self.blocks) - 1 - place)][0]

    def _fetch(self, place):
        """The bytes of a block; those of the next are then on their way."""
        whole = (self.ahead.pop(place, None) or host.send(self._at(place), self.device))()
        ends = (len(self.blocks) - 1, 2 * len(self.blocks) - 2, 2 * len(self.blocks) - 1)  # who knows what comes then
        self.ahead = {} if place in ends else {place + 1: host.send(self._at(place + 1), self.device)}
        return whole

    def gather(self, place: int) -> torch.Tensor | None:
        """Take part in gathers until it is the turn of `place`, whose bytes are returned; all places over: None."""
        turn = torch.tensor(-1)
        while turn != place:
            turn.fill_(place)
            distributed.all_reduce(turn, distributed.ReduceOp.MIN, group=self.ballots)
            whole = None
            if turn < 2 * len(self.blocks):
                part = self._at(int(turn))
                whole = part.new_empty(len(part) * distributed.get_world_size())
                distributed.all_gather([*whole.chunk(distributed.get_world_size())], part)
        return whole

    def wait(self) -> None:
        """Take part in gathers until no process needs another block: before anything else that all do together."""
        self.gather(2 * len(self.blocks))


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside, a block runs for the second time, in a backward."""
    token = _RECOMPUTED.set(True)
    try:
        yield
    finally:
        _RECOMPUTED.reset(token)
