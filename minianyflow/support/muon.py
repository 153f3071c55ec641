"""The optimiser Muon, for networks whose weights may be stacks of copies."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW


class Muon(AdamW):
    """AdamW; with a `rate`, Muon (Jordan et al. 2024) at that learning rate for square weights, (n, n) or (S, n, n).

    Muon steps along the gradient's Nesterov average, made orthogonal. Of a stack of copies (S, n, n) each is made
    orthogonal by itself; torch.optim.Muon takes a single matrix. weights: pairs (name, weight).
    """

    def __init__(self, weights: Sequence[tuple[str, Tensor]], rate: float | None = None, **options: object):
        square = {name for name, weight in weights if weight.ndim in (2, 3) and weight.shape[-2] == weight.shape[-1]}
        mine = square if rate is not None else set()
        adamw, muon = ([pair for pair in weights if (pair[0] in mine) == is_muon] for is_muon in (False, True))
        groups = [{"params": adamw}, {"params": muon, "momentum": 0.95, "rate": rate}]
        super().__init__([group for group in groups if group["params"]], fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> float | None:
        """One step of all groups. Those of Muon lose their gradients, so that AdamW passes over them."""
        for group in self.param_groups:
            for weight in [weight for weight in group["params"] if "momentum" in group and weight.grad is not None]:
                average = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                weight.sub_(group["lr"] * orthogonal(weight.grad.lerp(average, group["momentum"])))
                weight.grad = None
        return super().step(closure)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrices (n, n) or (S, n, n) with their singular values moved near 1 (.7 to 1.2), by Newton-Schulz steps."""
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    stack = stack / stack.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = stack @ stack.mT
        stack = torch.baddbmm(stack, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), stack, beta=3.4445)
    return stack.reshape(matrix.shape)
