"""The one training loop: notebooks, the demo and the scripts all call `train`.

A `Role` is a network with its loss, its optimiser and its average. One student alone is one role; on-policy training
has two, student and fake score, which take turns on the same batch. A batch is drawn for all processes from its step
number alone; every process has its part of it, so that one process and many see the same rows.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from minianyflow.interpolant import check_finite
from minianyflow.pairs import draw_pairs, generator
from minianyflow.support.errors import InputError
from minianyflow.wan.guard import Guard, Stopped, abandoned, listening, on_any, track


@dataclass
class Role:
    """network: u(z, t, r). loss: `loss(network, batch) -> (losses (B,), raw errors by name)`; may be set later.

    AdamW at `lr`, linear warm-up over `warmup` steps, then a cosine to zero (or constant); it holds its weights by
    name. `average` is an exponential moving average of the weights, begun after `ema_after` steps; it is what one
    samples from. With ema=None there is none, and `average` is None.
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

    def schedule(self, step, steps):
        """The learning rate at `step` of `steps`."""
        rate = self.lr * min(1.0, (step + 1) / max(self.warmup, 1))
        return rate * (0.5 * (1 + math.cos(math.pi * step / steps)) if self.cosine else 1.0)


def batches(sample, rows, seeds=(0,), **pairs):
    """`draw(step)` for `train`: the batch of that step, the same whoever draws it.

    sample(count, generator) gives data (count, *shape). Each of `seeds` has `rows` rows, with data and noise of its
    own and times that all share, so that rows of one kind go through the network in turn; with several seeds the
    condition `copy` says whose a row is (networks.MLP). `pairs` goes to `draw_pairs`.
    """

    def draw(step):
        sources = [generator(seed, step) for seed in seeds]
        x = torch.stack([sample(rows, source) for source in sources], 1).flatten(0, 1)
        eps = torch.stack([torch.randn(x[:rows].shape, generator=source) for source in sources], 1).flatten(0, 1)
        times = draw_pairs(rows, generator(step), **pairs)
        batch = {"x": x, "eps": eps} | {name: value.repeat_interleave(len(seeds)) for name, value in times.items()}
        return batch if len(seeds) == 1 else batch | {"condition": {"copy": copies}}

    copies = torch.arange(len(seeds)).repeat(rows)
    check_finite("the data", sample(rows, generator(*seeds)))
    return draw


def part_of(batch, index, parts, device=None):
    """Rows [index n / parts, (index + 1) n / parts) of every tensor of a batch, conditions included."""
    size = len(next(iter(batch.values())))
    if size % parts:
        raise InputError(f"a batch of {size} rows does not divide into {parts} equal parts (processes x accumulation)")
    rows = slice(index * size // parts, (index + 1) * size // parts)
    return {
        name: {key: item[rows].to(device) for key, item in value.items()}
        if isinstance(value, dict)
        else value[rows].to(device)
        for name, value in batch.items()
    }


def train(
    roles,
    draw,
    steps,
    accumulate=1,
    accelerator=None,
    progress=True,
    on_step=None,
    log_every=100,
    checkpoints=None,
    guard=None,
    own_rows=False,
):
    """Train every role for `steps` steps; returns the history, a list of {"step", "ROLE/KIND": raw error}.

    draw(step): the global batch, a dict of tensors; with own_rows the rows of this process alone, as `part_of` has
    them. accumulate: parts a process takes its rows in. progress: a bar, none, or a dict of tqdm's options.
    on_step(step) is called after each step. The history is gathered from all processes every `log_every` steps and at
    the end, and passed to the accelerator's trackers, if it has any.
    checkpoints: where to go on from and what to save to, a `checkpoints.Checkpoints`; SIGTERM, or the end of what
    launched it, then ends the run after its step, saved, with `faults.Stopped`. guard: a `faults.Guard` for bad
    batches; None stops at the first.
    Raises InputError if a loss stops being finite, a weight that should learn gets no gradient, or one is frozen.
    """
    if steps < 1:
        raise InputError(f"{steps} training steps asked for; expected at least 1")
    accelerator, guard = accelerator or Accelerator(), guard or Guard()
    mine = (0, 1) if own_rows else (accelerator.process_index, accelerator.num_processes)
    ready = {name: _prepare(name, role, accelerator) for name, role in roles.items()}
    done, history = checkpoints.restore(roles, accelerator) if checkpoints else (0, [])
    if checkpoints:
        checkpoints.check_room(roles)
    if done > steps:
        raise InputError(f"a checkpoint of {done} steps; expected at most steps={steps}: set more")
    with listening(checkpoints is not None) as terminated:
        for step in tqdm(range(done, steps), initial=done, total=steps, **_bar(progress, accelerator)):
            batch, logs = part_of(draw(step), *mine), {"step": step}
            for name, role in roles.items():
                figures = _step(name, role, *ready[name], batch, step, steps, accumulate, accelerator, guard)
                if figures is None:  # a bad batch
                    break
                logs |= {f"{name}/{kind}": error for kind, error in figures.items()}
            else:
                if step % log_every == 0 or step == steps - 1:
                    history.append(_gather(logs))
                    track(history[-1], accelerator)
            if checkpoints:
                stop = on_any(bool(terminated) or abandoned(), accelerator)
                if stop or checkpoints.due(step + 1, steps):
                    checkpoints.save(roles, step + 1, history, accelerator)
                if stop:
                    why = "its launcher is gone" if abandoned() else "SIGTERM"
                    raise Stopped(f"{why}: saved after {step + 1} of {steps} steps")
            if on_step:
                on_step(step)
    return history


def _prepare(name, role, accelerator):
    """The network and the optimiser of a role as accelerate has them."""
    if role.loss is None:
        raise InputError(f"role {name!r} has no loss; set its `loss` before training")
    network, optimizer = accelerator.prepare(role.network, role.optimizer)
    if role.average is not None:
        role.average.to(accelerator.device)
    if isinstance(network, FSDPModule):
        _reduce_once(network)
        if role.average is not None:
            fully_shard(role.average.module, reshard_after_forward=False)
    if hasattr(network, "broadcast_buffers"):
        network.broadcast_buffers = False  # or a process whose rows need fewer forwards hangs the others
    return network, optimizer


def _reduce_once(network):
    """Have a sharded network add gradients up over processes once a backward, not once a forward of it.

    Processes differ in how often they evaluate a network, by the rows they have, and would wait for each other for
    ever. FSDP2 looks for inputs with gradient, and casts them: they pass it hidden, times as they are.
    """

    def hide(_, arguments, condition):
        return (lambda: (arguments, condition),), {}

    def show(_, arguments, condition):
        return arguments[0]()

    network.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)
    network.register_forward_pre_hook(show, with_kwargs=True)


def _step(name, role, network, optimizer, batch, step, steps, accumulate, accelerator, guard):
    """One step of one role: its figures by name, or None for a bad batch, which leaves everything as it was."""
    memory = remembered(role.loss)
    for group in optimizer.param_groups:
        group["lr"] = role.schedule(step, steps)
    every, each_loss = [], []
    for index in range(accumulate):
        part = part_of(batch, index, accumulate, accelerator.device)
        last = index == accumulate - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(network):
            losses, raw = role.loss(network, part)
            accelerator.backward(losses.mean() / accumulate)
        every.append(raw | {"loss": losses.detach().mean()})
        each_loss.append(losses.detach())
    _check_gradients(name, role, first=step == 0)
    norm = _clip(network.parameters(), role.clip) if role.clip else 0.0
    if guard.bad(each_loss, norm, accelerator):
        guard.note(step, name, each_loss, batch, accelerator)
        optimizer.zero_grad()
        remembered(role.loss, {(index, key): value for index, key, value in memory})
        return None
    optimizer.step()
    optimizer.zero_grad()
    if role.average is not None and step >= role.ema_after:
        role.average.update_parameters(role.network)
    return _mean(every)


def _clip(weights, most):
    """Scale gradients to a norm of `most`; returns that before. accelerate's own fails with two sharded networks."""
    norm = torch.nn.utils.clip_grad_norm_(weights, most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


REMEMBERED = ("diagonal_loss", "calls")  # of FlowMapLoss, for rebalancing; of ConsistencyLoss, for its warm-up


def remembered(loss, change=None):
    """What a loss, or a loss inside it, keeps from one step to the next: a list of (which, name, value).

    change: {(which, name): value}, to put there instead.
    """
    losses = [loss] if is_dataclass(loss) else []
    for each in losses:  # it grows
        losses += [inner for inner in vars(each).values() if is_dataclass(inner) and callable(inner)]
    found = [(index, key) for index, each in enumerate(losses) for key in REMEMBERED if hasattr(each, key)]
    for index, key in found if change else ():
        if (index, key) in change:
            before, value = getattr(losses[index], key), change[index, key]
            setattr(losses[index], key, int(value) if isinstance(before, int) else value)
    return [(index, key, getattr(losses[index], key)) for index, key in found]


def _bar(progress, accelerator):
    options = {"desc": "training", "unit": "step", "mininterval": 0.5}
    options |= progress if isinstance(progress, dict) else {"disable": not progress}
    return options if accelerator.is_main_process else {"disable": True}


def _mean(every):
    """Figure by figure, the mean over those of the dicts `every` that have it."""
    names = dict.fromkeys(name for each in every for name in each)
    figures = {name: [each[name] for each in every if name in each] for name in names}
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _gather(logs):
    """Mean over processes of every figure."""
    return _mean(gather_object([{name: float(value) for name, value in logs.items()}]))


def _check_gradients(name, role, first):
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
