"""The training loop of a run of days: several processes, checkpoints, trackers, bad batches.

The step is the small loop's own: `training.accumulate_gradient`, then `Role.update`. A batch is drawn for all processes
from its step number alone and every process trains on its rows of it, so that one process and many see the same rows.
"""

import signal
import time
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minianyflow.batch import deal
from minianyflow.support.errors import InputError
from minianyflow.support.recompute import current_unit
from minianyflow.training import accumulate_gradient, check_gradients, mean_figures
from minianyflow.wan.guard import (
    EXIT_CTRL_C,
    EXIT_SIGTERM,
    Guard,
    Preempted,
    agree,
    catch_signals,
    finish_trackers,
    launcher_gone,
    log_figures,
)
from minianyflow.wan.intervals import Every
from minianyflow.wan.prefetch import waiting_share


def train_run(
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
    samples=(0, None),
    deadline=None,
    waits=(),
    wait=None,
    sharing=nullcontext,
):
    """Train every role for `steps` steps; returns the history, a list of {"step", "ROLE/NAME": error}.

    draw(step): the global batch; with own_rows, the rows of this process alone, as `deal` has them.
    accumulate: number of micro-batches per process (gradient accumulation). progress: a bar, none, or a dict of tqdm's
    options. on_step(step) is called after each step. The history is gathered from all processes every `log_every`
    steps, or so much time, and at the end, and passed to the accelerator's trackers, if it has any.
    samples: (interval, sample); sample(done) is called before the first step, every so often, and after the last.
    checkpoints: a `checkpoints.Checkpoints`, to resume from and to save to. With it, after SIGTERM, Ctrl-C or the end
    of its launcher, or where another step may end after the `deadline` (seconds of time.time), the run finishes its
    step, saves, and raises `guard.Preempted`. guard: a `guard.Guard` for bad batches; None stops at the first.
    waits: a list as `prefetch` has it, for the trackers. wait: `RunNetworks.wait`, if processes share the base.
    sharing: `TokenGroup.sharing`, if they share the tokens of clips.
    Raises InputError if a loss is not finite, a weight that should learn gets no gradient, or one is frozen.
    """
    accelerator, guard = accelerator or Accelerator(), guard or Guard()
    process = accelerator.process_index, accelerator.num_processes
    whole = own_rows or (process == (0, 1) and accumulate == 1)  # rows stay as they are drawn
    wrapped = {name: _wrap(role, accelerator) for name, role in roles.items()}
    done, history = checkpoints.restore(roles, accelerator) if checkpoints else (0, [])
    if checkpoints:
        checkpoints.check_room(roles)
    for role in roles.values():
        with role.states():  # which are new, or were loaded: to where they rest
            pass
    if done > steps:
        raise InputError(f"a checkpoint of {done} steps; expected at most steps={steps}: set more")
    bar = {"desc": "training", "mininterval": 0.5, "initial": done, "total": steps, "bar_format": BAR}
    bar |= progress if isinstance(progress, dict) else {"disable": not progress}
    bar |= {} if accelerator.is_main_process else {"disable": True}
    if samples[0] and not done:
        samples[1](0)
    every = [Every(interval) for interval in (log_every, checkpoints.every if checkpoints else 0, samples[0])]
    pace, longest = Pace(done, waits, accelerator.device), 0.0
    with catch_signals(checkpoints is not None) as received, Bar(range(done, steps), **bar) as shown:
        for step in shown:
            began, last = time.time(), step == steps - 1
            batch, figures = draw(step), {"step": step}
            batch = batch if whole else deal(batch, *process)
            for name, role in roles.items():
                for network, _ in wrapped.values():
                    if wait and isinstance(network, FSDPModule):
                        network.unshard()  # on all processes: in a forward, one would wait for those in other blocks
                with sharing():
                    raw = _step(name, role, *wrapped[name], batch, step, steps, accumulate, accelerator, guard, wait)
                if raw is None:  # a bad batch
                    break
                figures |= {f"{name}/{kind}": error for kind, error in raw.items()}
            good = raw is not None
            if good:
                shown.set_postfix_str(f"loss {float(next(v for k, v in figures.items() if '/loss' in k)):.4g}", False)
            done, over = step + 1, deadline is not None and time.time() + max(longest, time.time() - began) > deadline
            due = [accelerator.is_main_process and one.due(n) for one, n in zip(every, (step, done, done), strict=True)]
            stop, log, save, show = agree([bool(received) or launcher_gone() or over, *due], accelerator)
            if good and (log or last or step == 0):
                numbers = {kind: float(value) for kind, value in figures.items()}
                history.append(mean_figures(gather_object([numbers])))
                log_figures(history[-1] | pace.figures(done), accelerator)
            if checkpoints and (save or last or stop):
                checkpoints.save(roles, done, history, accelerator)
            if checkpoints and stop and not last:
                reason = "its launcher is gone" if launcher_gone() else "its time is over" if over else "SIGTERM"
                reason = "Ctrl-C" if signal.SIGINT in received else reason
                finish_trackers(accelerator)
                status = EXIT_CTRL_C if reason == "Ctrl-C" else EXIT_SIGTERM
                raise Preempted(f"{reason}: saved after {done} of {steps} steps", status)
            if samples[0] and (show or last):
                samples[1](done)
            if on_step:
                on_step(step)
            longest = max(longest, time.time() - began)
    return history


class Bar(tqdm):
    """A progress bar in steps per minute."""

    @property
    def format_dict(self):
        """Tqdm's figures, and `pace`."""
        figures = super().format_dict
        rate = figures["rate"] or (figures["n"] - figures["initial"]) / max(figures["elapsed"], 1e-9)
        return figures | {"pace": f"{60 * rate:.3g} steps/min"}


BAR = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {pace}{postfix}]"


class Pace:
    """What trackers see of time and memory, since the entry before: seconds per step, share of waiting, memory."""

    def __init__(self, done, waits, device):
        self.done, self.waits, self.device, self.start, self.seen = done, waits, device, time.perf_counter(), 0

    def figures(self, done):
        """The figures after `done` steps, by name."""
        now, waited = time.perf_counter(), waiting_share(self.waits[self.seen :])
        cuda = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) if cuda else psutil.Process().memory_info().rss
        figures = {"seconds_per_step": (now - self.start) / max(done - self.done, 1), "memory_gb": memory / 1e9}
        self.done, self.start, self.seen = done, now, len(self.waits)
        return figures | ({"waiting_for_data": waited["all"]} if waited else {})


def _wrap(role, accelerator):
    """The network and the optimiser of a role, wrapped by accelerate for several processes."""
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
    """Make a sharded network reduce its gradients once per backward, not once per forward.

    Processes differ in how often they evaluate a network, by the rows they have, and would wait for each other for
    ever. FSDP2 searches the inputs of a forward for tensors: it casts them, and reduces once for every forward where
    one has a gradient. It does not look into functions, so the inputs pass it inside one.
    """

    def hide(_, arguments, condition):
        return (lambda: (arguments, condition),), {}

    def show(_, arguments, condition):
        return arguments[0]()

    network.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)
    network.register_forward_pre_hook(show, with_kwargs=True)


def _forward(network):
    """The network as a loss calls it: DDP's own forward prepares a reduction, and one that is repeated must not."""
    if not isinstance(network, DistributedDataParallel):
        return network
    return lambda *inputs, **condition: (network.module if current_unit()[1] else network)(*inputs, **condition)


def _reduce(role, network):
    """A backward of zero, which only adds up gradients over processes: in others, some would wait, some need blocks."""

    def zero():
        return 0 * sum(weight.sum() for weight in role.network.parameters() if weight.requires_grad)

    weights = [weight for weight in role.network.parameters() if weight.requires_grad]
    used = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=weights[0].device)
    distributed.all_reduce(used, distributed.ReduceOp.MAX)
    with patch.object(role.network, "forward", zero):
        network().backward()
    if isinstance(network, DistributedDataParallel):  # FSDP2 keeps gradients elsewhere until they are added up
        for weight, somewhere in zip(weights, used.tolist(), strict=True):
            weight.grad = weight.grad if somewhere else None  # no optimiser moves what no process used


def _step(name, role, network, optimizer, batch, step, steps, accumulate, accelerator, guard, wait=None):
    """One step of one role: its figures by name, or None for a bad batch, which changes nothing."""
    before = loss_state(role.loss)
    no_sync = partial(accelerator.no_sync, network)
    with no_sync() if wait else nullcontext():
        losses, figures = accumulate_gradient(role, batch, accumulate, _forward(network), no_sync)
    if wait:
        wait()
        _reduce(role, network)
    check_gradients(name, role, first=step == 0)
    norm = 0.0
    if role.clip:  # accelerate's own function fails with two sharded networks
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), role.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if guard.is_bad(losses, norm, accelerator):
        guard.record(step, name, losses, batch, accelerator)
        optimizer.zero_grad()
        if hasattr(role.loss, "load_state_dict"):
            role.loss.load_state_dict(before)
        return None
    role.update(step, steps, optimizer)
    figures = figures | {"lr": role.schedule(step, steps)}
    return figures | {"gradient_norm": norm} if role.clip else figures


def loss_state(loss) -> dict:
    """What a loss carries from one step to the next, {name: tensor}; empty for a plain function."""
    return loss.state_dict() if hasattr(loss, "state_dict") else {}
