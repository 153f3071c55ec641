"""The small training loop: per step a batch, per role a gradient and an update.

A `Role` is a network with its loss, optimiser and average. A student alone is one role; on-policy training has two,
student and fake score, which take turns on the same batch. wan/trainer.py is the loop of long runs (several processes,
checkpoints, trackers), on the same `accumulate_gradient` and `Role.update`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from minianyflow.batch import Batch, deal, part_of
from minianyflow.notation import Errors, Loss
from minianyflow.support import host
from minianyflow.support.errors import InputError
from minianyflow.support.muon import Muon


@dataclass
class Role:
    """network: u(z, t, r). loss: `loss(network, batch) -> losses (B,), errors by name`; may be set later.

    AdamW at `lr`, times a linear warm-up over `warmup` steps, times a cosine that falls to zero, of which the run takes
    the share `cosine`; 0: none. muon: instead, with this learning rate, same warm-up and cosine, square weights (n, n),
    or stacks of them (S, n, n), step by `Muon`, momentum .95, without decay. clip: largest gradient norm.
    average: the moving average of the weights with decay `ema`, from step `ema_after` on, to sample from. With
    ema=None there is none. offload: see `states`. Raises InputError for a network without weights to train.
    """

    network: nn.Module
    loss: Loss | None = None
    lr: float = 3e-3
    muon: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 200
    cosine: float = 1.0
    clip: float | None = None
    ema: float | None = 0.999
    ema_after: int = 0
    offload: bool = False
    average: AveragedModel | None = field(init=False, default=None)

    def __post_init__(self):
        if not (0 <= self.lr < math.inf and 0 <= (self.muon or 0) < math.inf):
            raise InputError(f"learning rates lr={self.lr}, muon={self.muon}; expected finite numbers, not negative")
        if self.ema is not None:
            rule = get_ema_multi_avg_fn(self.ema)
            self.average = AveragedModel(self.network, multi_avg_fn=rule).requires_grad_(False)
        trained = [pair for pair in self.network.named_parameters() if pair[1].requires_grad]
        if not trained:
            raise InputError("a network none of whose weights is trained; expected a role with weights to train")
        self.optimizer = Muon(trained, self.muon, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def schedule(self, step: int, steps: int, rate: float | None = None) -> float:
        """The learning rate at `step` of `steps`; rate: the highest, by default `lr`."""
        rate = (self.lr if rate is None else rate) * min(1.0, (step + 1) / max(self.warmup, 1))
        return rate * 0.5 * (1 + math.cos(math.pi * step / steps * self.cosine))

    def update(self, step: int, steps: int, optimizer: object = None) -> None:
        """One optimiser step along the gradients, and one of the average. optimizer: the role's own, wrapped."""
        optimizer = optimizer or self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.schedule(step, steps, group.get("rate"))
        with self.states():
            optimizer.step()
            optimizer.zero_grad()
            if self.average is not None and step >= self.ema_after:
                self.average.update_parameters(self.network)

    @contextmanager
    def states(self) -> Iterator[None]:
        """Inside, moments and average are beside the weights; after it, with `offload`, they rest in CPU memory."""
        if self.offload:
            for tensor in self._states():
                tensor.data = host.fetch(tensor.data, next(self.network.parameters()).device)
        yield
        if self.offload:
            for tensor in self._states():
                tensor.data = host.store(tensor.data, wait=True)

    def _states(self):
        moments = [value for state in self.optimizer.state.values() for key, value in state.items() if key != "step"]
        return [*moments, *(self.average.module.parameters() if self.average else ())]


def accumulate_gradient(
    role: Role, batch: Batch, parts: int = 1, network: nn.Module | None = None, no_sync: Callable = nullcontext
) -> tuple[list[Tensor], Errors]:
    """Add up the gradient of the mean loss over the batch, in `parts` micro-batches, its rows as `deal` has them.

    network: the role's own, or its wrapper for several processes; no_sync: the context of all backwards but the last.
    A loss with `terms`, the losses that it is the sum of, has a backward of each: then no two are in memory at once.
    Returns the losses, a (B,) per part, and the means of the errors by name, with that of the losses as "loss".
    """
    losses, figures, terms = [], [], getattr(role.loss, "terms", (role.loss,))
    device = next(role.network.parameters()).device
    for index in range(parts):
        part, total, figure = part_of(batch, index, parts, device), 0.0, {}
        for term in terms:
            with nullcontext() if (index, term) == (parts - 1, terms[-1]) else no_sync():
                loss, errors = term(network or role.network, part)
                (loss.mean() / parts).backward()
            total, figure = total + loss.detach(), figure | errors
        losses.append(total)
        figures.append(figure | {"loss": total.mean()})
    return losses, mean_figures(figures)


def train(
    roles: dict[str, Role],
    draw: Callable[[int], Batch],
    steps: int,
    accumulate: int = 1,
    progress: bool | dict = True,
    on_step: Callable[[int], object] | None = None,
    log_every: int = 100,
) -> list[dict[str, float]]:
    """Train all roles for `steps` steps; returns the history, a list of {"step", "ROLE/NAME": error}.

    draw(step): the batch. accumulate: number of micro-batches per step (gradient accumulation). progress: a bar, none,
    or a dict of tqdm's options. on_step(step) is called after the step. `log_every`: steps per entry of the history,
    which ends with the last step.
    Raises InputError if a loss is not finite, or a weight that should learn gets no gradient or is frozen.
    """
    lacking = [name for name, role in roles.items() if role.loss is None]
    if steps < 1 or lacking:
        raise InputError(f"{steps} steps, roles without a loss: {lacking}; expected at least 1 step, a loss per role")
    history, bar = [], {"desc": "training", "unit": "step", "mininterval": 0.5}
    bar |= progress if isinstance(progress, dict) else {"disable": not progress}
    for step in tqdm(range(steps), **bar):
        batch, figures = draw(step), {"step": step}
        batch = deal(batch) if accumulate > 1 else batch
        for name, role in roles.items():
            _, errors = accumulate_gradient(role, batch, accumulate)
            check_gradients(name, role, first=step == 0)
            norm = nn.utils.clip_grad_norm_(role.network.parameters(), role.clip) if role.clip else 0.0
            if not math.isfinite(errors["loss"] + norm):
                raise InputError(f"{name}/loss is {errors['loss']} at step {step}; expected finite losses: lower lr")
            role.update(step, steps)
            figures |= {f"{name}/{key}": error for key, error in errors.items()}
        if step % log_every == 0 or step == steps - 1:
            history.append({key: float(value) for key, value in figures.items()})
        if on_step:
            on_step(step)
    return history


def mean_figures(figures: Sequence[dict[str, Tensor | float]]) -> dict[str, Tensor | float]:
    """The mean of each figure, over the dicts that have it."""
    values = defaultdict(list)
    for name, value in (pair for some in figures for pair in some.items()):
        values[name].append(value)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def check_gradients(name: str, role: Role, first: bool) -> None:
    """Raise InputError if a weight of the optimiser is frozen, or if the `first` gradient does not reach a weight."""
    groups = role.optimizer.param_groups
    trained = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    frozen = [key for key, weight in trained if not weight.requires_grad]  # torch leaves its gradient None
    if frozen:
        problem, advice = "was frozen after its optimiser was made", "leave requires_grad alone while training"
        raise InputError(f"{frozen[0]} of role {name!r} {problem} ({len(frozen)} weights in all): {advice}")
    unused = [key for key, weight in role.network.named_parameters() if weight.requires_grad and weight.grad is None]
    if first and unused:
        problem, advice = "got no gradient", "freeze it, or use it in the loss"
        raise InputError(f"{unused[0]} of role {name!r} {problem} ({len(unused)} weights in all): {advice}")
