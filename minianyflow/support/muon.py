"""The optimiser Muon, for networks whose weights may be stacks of copies."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW


class Muon(AdamW):
    """AdamW, with Muon (Jordan et al. 2024) for the groups of weights that have `momentum`.

    Muon steps along the gradient's Nesterov average, made orthogonal. A weight may be a stack of copies (S, n, n), each
    made orthogonal by itself; torch.optim.Muon takes a single matrix.
    """

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
