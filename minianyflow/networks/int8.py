"""Frozen weights of blocks in 8 bits: an integer per weight and a scale per output, W = scale x integer.

Half the memory of bfloat16, at the price of an error that `quantise` returns; computed in the dtype of the input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Int8Linear(nn.Linear):
    """A linear layer whose weight (out, in) is int8, with a scale (out, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear, with the weight that the integers stand for."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), bias)


@torch.no_grad()
def quantise(blocks: nn.Module) -> Tensor:
    """Make the linear layers of blocks Int8Linear, frozen; returns the error of their weights, ||dW|| / ||W||."""
    wrong, size = [], []
    for layer in [module for module in blocks.modules() if type(module) is nn.Linear]:
        weight = layer.weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        integers = (weight / scale).round()
        wrong.append((integers * scale - weight).square().sum())
        size.append(weight.square().sum())
        layer.__class__, layer.scale = Int8Linear, nn.Parameter(scale, requires_grad=False)
        layer.weight = nn.Parameter(integers.to(torch.int8), requires_grad=False)
    return (torch.stack(wrong).sum() / torch.stack(size).sum()).sqrt()
