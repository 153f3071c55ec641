"""The training loop, as small as it can be: for each step a batch, for each role a gradient and an update.

A `Role` is a network with its loss, its optimiser and its average. A student alone is one role; on-policy training
has two, student and fake score, which take turns on the same batch. A run of days needs more (several processes,
checkpoints, trackers): wan/trainer.py has that, around the same `accumulate_gradient` and `Role.update`.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from minianyflow.batch import Batch, part_of
from minianyflow.support.errors import InputError


@dataclass
class Role:
    """network: u(z, t, r). loss: `loss(network, batch) -> (losses (B,), raw errors by name)`; may be set later.

    AdamW at `lr`: linear warm-up over `warmup` steps, then a cosine to zero (or constant). clip: largest gradient norm.
    `average` is an exponential moving average of the weights, begun after `ema_after` steps; sample from it. With
    ema=None there is none, and `average` is None. Raises InputError for a network without weights to train.
    """

    network: torch.nn.Module
    loss: Callable | None = None
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 200
    cosine: bool = True
    clip: float | None = None
    ema: float | None = 0.999
    ema_after: int = 0
    average: AveragedModel | None = field(init=False, default=None)

    def __post_init__(self):
        if self.ema is not None:
            rule = get_ema_multi_avg_fn(self.ema)
            self.average = AveragedModel(self.network, multi_avg_fn=rule).requires_grad_(False)
        trained = [(name, weight) for name, weight in self.network.named_parameters() if weight.requires_grad]
        if not trained:
            raise InputError("a network none of whose weights is trained; expected a role with weights to train")
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True
        )

    def schedule(self, step: int, steps: int) -> float:
        """The learning rate at `step` of `steps`."""
        rate = self.lr * min(1.0, (step + 1) / max(self.warmup, 1))
        return rate * (0.5 * (1 + math.cos(math.pi * step / steps)) if self.cosine else 1.0)

    def update(self, step: int, steps: int, optimizer=None) -> None:
        """Take one optimiser step along the gradients there are, and move the average. optimizer: a wrapped one."""
        optimizer = optimizer or self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if self.average is not None and step >= self.ema_after:
            self.average.update_parameters(self.network)


def accumulate_gradient(role: Role, parts, network=None, no_sync=contextlib.nullcontext):
    """Add up the gradient of the mean loss over `parts`, the micro-batches of one step.

    network: the role's own, or what wraps it for several processes; no_sync: the context of all parts but the last.
    Returns the losses, a list of (B,) per part, and the mean of each raw error by name, with "loss".
    """
    network, losses, figures = network or role.network, [], []
    for index, part in enumerate(parts):
        with contextlib.nullcontext() if index == len(parts) - 1 else no_sync():
            loss, raw = role.loss(network, part)
            (loss.mean() / len(parts)).backward()
        losses.append(loss.detach())
        figures.append(raw | {"loss": losses[-1].mean()})
    return losses, mean_figures(figures)


def train(
    roles: dict[str, Role],
    draw: Callable[[int], Batch],
    steps: int,
    accumulate=1,
    progress=True,
    on_step=None,
    log_every=100,
):
    """Train every role for `steps` steps; returns the history, a list of {"step", "ROLE/KIND": raw error}.

    draw(step): the batch. accumulate: number of micro-batches per step (gradient accumulation). progress: a bar, none,
    or a dict of tqdm's options. on_step(step) is called after each step. The history has an entry per
    `log_every` steps, and one for the last.
    Raises InputError if a loss is not finite, a weight that should learn gets no gradient, or one is frozen.
    """
    check_roles(roles, steps)
    bar = {"desc": "training", "unit": "step", "mininterval": 0.5}
    history = []
    for step in tqdm(range(steps), **bar | (progress if isinstance(progress, dict) else {"disable": not progress})):
        batch, figures = draw(step), {"step": step}
        for name, role in roles.items():
            device = next(role.network.parameters()).device
            parts = [part_of(batch, index, accumulate, device) for index in range(accumulate)]
            losses, raw = accumulate_gradient(role, parts)
            check_gradients(name, role, first=step == 0)
            norm = torch.nn.utils.clip_grad_norm_(role.network.parameters(), role.clip) if role.clip else 0.0
            if not (math.isfinite(norm) and all(bool(loss.isfinite().all()) for loss in losses)):
                raise InputError(
                    f"{name}/loss is {float(raw['loss'])} at step {step}; expected finite losses: lower lr"
                )
            role.update(step, steps)
            figures |= {f"{name}/{kind}": error for kind, error in raw.items()}
        if step % log_every == 0 or step == steps - 1:
            history.append({name: float(value) for name, value in figures.items()})
        if on_step:
            on_step(step)
    return history


def mean_figures(figures):
    """Figure by figure, the mean over those of the dicts `figures` that have it."""
    names = dict.fromkeys(name for one in figures for name in one)
    values = {name: [one[name] for one in figures if name in one] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def check_roles(roles: dict[str, Role], steps: int) -> None:
    """Raise InputError for no steps, or a role without a loss."""
    if steps < 1:
        raise InputError(f"{steps} training steps asked for; expected at least 1")
    for name, role in roles.items():
        if role.loss is None:
            raise InputError(f"role {name!r} has no loss; set its `loss` before training")


def check_gradients(name: str, role: Role, first: bool) -> None:
    """The optimiser's weights must all still learn; a first gradient must reach these and all others not frozen."""
    groups = role.optimizer.param_groups
    held = dict(pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True))
    frozen = [key for key, weight in held.items() if not weight.requires_grad]  # its gradient would just stay None
    if frozen:
        raise InputError(
            f"{frozen[0]} of role {name!r} was frozen after its optimiser was made ({len(frozen)} weights in all); "
            "expected it to learn: leave requires_grad alone between a forward and its backward"
        )
    learns = {key: weight for key, weight in role.network.named_parameters() if weight.requires_grad}
    missing = [key for key, weight in {**held, **learns}.items() if first and weight.grad is None]
    if missing:
        raise InputError(
            f"no gradient reached {missing[0]} of role {name!r} ({len(missing)} weights in all); "
            "expected one for every trained weight: freeze it, or use it in the loss"
        )
