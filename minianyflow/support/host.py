"""Tensors that rest in CPU memory while the device does not need them; they come back bitwise the same.

Memory is pinned where there is CUDA, and copies run on a stream of their own, beside what is computed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from weakref import ref

import torch
from torch import Tensor


def store(tensor: Tensor, wait: bool = False) -> Tensor:
    """A copy in CPU memory, differentiable. wait: until it is there, for what the CPU itself will read."""
    stored = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    with _beside(tensor.device, after=True):
        stored = stored.copy_(tensor, non_blocking=tensor.is_cuda and not wait)
    if tensor.is_cuda:
        tensor.record_stream(_stream(tensor.device))
    return stored


def send(stored: Tensor, device: torch.device | str) -> Callable[[], Tensor]:
    """Begin to copy to the device. What is returned, called, gives the copy: the device waits for it there."""
    device = torch.device(device)
    with _beside(device):
        copy = stored.to(device, non_blocking=True, copy=True)
    if device.type != "cuda":
        return lambda: copy

    def receive():
        torch.cuda.current_stream(device).wait_event(sent)
        copy.record_stream(torch.cuda.current_stream(device))
        return copy

    sent = _stream(device).record_event()
    return receive


def fetch(stored: Tensor, device: torch.device | str) -> Tensor:
    """A copy on the device, even where that is the CPU; differentiable."""
    return send(stored, device)()


class Stack:
    """Tensors that are stored in turn and come back from the last to the first, each sent while the one after is used.

    One that is dropped is left out.
    """

    def __init__(self):
        self.last = lambda: None

    def store(self, tensor: Tensor) -> "Kept":
        """What gives the tensor back."""
        kept = Kept(store(tensor), tensor.device, self.last)
        self.last = ref(kept)
        return kept


class Kept:
    """A tensor on a `Stack`; before: gives the one below it, or None."""

    def __init__(self, stored: Tensor, device: torch.device, before: Callable[[], "Kept | None"]):
        self.stored, self.device, self.before, self.coming, self.was = stored, device, before, None, False

    def fetch(self) -> Tensor:
        """The tensor, on its device; the one below, if it was not there yet, is then on its way."""
        tensor, self.coming, self.was = (self.coming or send(self.stored, self.device))(), None, True
        below = self.before()
        if below and not below.was:
            below.coming = below.coming or send(below.stored, below.device)
        return tensor


@lru_cache
def _stream(device):
    return torch.cuda.Stream(device)


def _beside(device, after=False):
    """Inside, copies run on a stream of their own; after: what is computed until now."""
    if device.type != "cuda":
        return nullcontext()
    if after:
        _stream(device).wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(_stream(device))
