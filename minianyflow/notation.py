"""Letters, the direction of time, and types. **t = 1 is noise, t = 0 is data**, as in Wan, diffusers and AnyFlow.

    x, eps, z, v, u    State (B, *shape): data, noise, state, velocity, average velocity of B samples of any shape
    t, r               Times (B,), r <= t, both in [0, 1]; FrameTimes may also have one time per frame, (B, F)
    velocity           Velocity, a function velocity(z, t, **condition) -> v: of a teacher, or a formula
    u, network         Network, a function u(z, t, r, **condition) -> u: an MLP, Wan2.1, or a formula
    condition          the other arguments of a network: tensors (B, ...), or tuples of them, however nested

The tests check the types of all calls (jaxtyping and beartype: tests/conftest.py). In use they cost nothing.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

State = Float[Tensor, "batch *shape"]
Times = Float[Tensor, "batch"]
FrameTimes = Float[Tensor, "batch *frames"]
Grid = Float[Tensor, "times *columns"]  # falling times: (N + 1,) for all samples, or (N + 1, B)
Trajectory = Float[Tensor, "times batch *shape"]  # the state at each time of a grid
Samples = Float[Tensor, "samples *shape"]
Losses = Float[Tensor, "batch"]
Errors = dict[str, Tensor]  # mean errors without weights, by name
Mask = Bool[Tensor, "batch"]
Counts = Int[Tensor, "batch"]
Rows = Int[Tensor, "rows"]  # indices of some rows of a batch
Velocity = Callable[..., State]
Network = Callable[..., State]
Weight = Callable[[Times], Times]  # of a row, from its time
Loss = Callable[..., tuple[Losses, Errors]]  # loss(network, batch)
Condition = Tensor | tuple[Any, ...]
