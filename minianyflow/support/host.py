"""Tensors that rest in CPU memory while the device does not need them; they come back bitwise the same.

Memory is pinned where there is CUDA: copies then run at the full rate of the bus, and the host does not wait for them.
"""

import torch
from torch import Tensor


def store(tensor: Tensor, wait: bool = False) -> Tensor:
    """A copy in CPU memory, differentiable. wait: until it is there, for what the CPU itself will read."""
    stored = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    return stored.copy_(tensor, non_blocking=tensor.is_cuda and not wait)


def fetch(stored: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, even where that is the CPU; differentiable."""
    return stored.to(device, non_blocking=True, copy=True)
