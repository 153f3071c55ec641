"""The training loop of a run of days: several processes, checkpoints, trackers, bad batches.

The step is the small loop's own: `training.accumulate_gradient`, then `Role.update`. A batch is drawn for all processes
from its step number alone and every process trains on its rows of it, so that one process and many see the same rows.
"""

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minianyflow.batch import deal
from minianyflow.flow_map import current_unit
from minianyflow.support.errors import InputError
from minianyflow.training import accumulate_gradient, check_gradients, mean_figures
from minianyflow.wan.guard import Guard, Preempted, any_process, catch_sigterm, launcher_gone, log_figures


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
):
    """Train every role for `steps` steps; returns the history, a list of {"step", "ROLE/NAME": error}.

    draw(step): the global batch; with own_rows, the rows of this process alone, as `deal` has them.
    accumulate: number of micro-batches per process (gradient accumulation). progress: a bar, none, or a dict of tqdm's
    options. on_step(step) is called after each step. The history is gathered from all processes every `log_every`
    steps and at the end, and passed to the accelerator's trackers, if it has any.
    checkpoints: a `checkpoints.Checkpoints`, to resume from and to save to. With it, after SIGTERM or the end of its
    launcher, the run finishes its step, saves, and raises `guard.Preempted`. guard: a `guard.Guard` for bad batches;
    None stops at the first.
    Raises InputError if a loss is not finite, a weight that should learn gets no gradient, or one is frozen.
    """
    accelerator, guard = accelerator or Accelerator(), guard or Guard()
    process = accelerator.process_index, accelerator.num_processes
    whole = own_rows or (process == (0, 1) and accumulate == 1)  # rows stay as they are drawn
    wrapped = {name: _wrap(role, accelerator) for name, role in roles.items()}
    done, history = checkpoints.restore(roles, accelerator) if checkpoints else (0, [])
    if checkpoints:
        checkpoints.check_room(roles)
    if done > steps:
        raise InputError(f"a checkpoint of {done} steps; expected at most steps={steps}: set more")
    bar = {"desc": "training", "unit": "step", "mininterval": 0.5, "initial": done, "total": steps}
    bar |= progress if isinstance(progress, dict) else {"disable": not progress}
    bar |= {} if accelerator.is_main_process else {"disable": True}
    with catch_sigterm(checkpoints is not None) as received:
        for step in tqdm(range(done, steps), **bar):
            batch, figures, last = draw(step), {"step": step}, step == steps - 1
            batch = batch if whole else deal(batch, *process)
            for name, role in roles.items():
                raw = _step(name, role, *wrapped[name], batch, step, steps, accumulate, accelerator, guard)
                if raw is None:  # a bad batch
                    break
                figures |= {f"{name}/{kind}": error for kind, error in raw.items()}
            else:
                if step % log_every == 0 or last:
                    numbers = {kind: float(value) for kind, value in figures.items()}
                    history.append(mean_figures(gather_object([numbers])))
                    log_figures(history[-1], accelerator)
            if checkpoints:
                preempted = any_process(bool(received) or launcher_gone(), accelerator)
                if preempted or last or (step + 1) % checkpoints.every == 0:
                    checkpoints.save(roles, step + 1, history, accelerator)
                if preempted:
                    why = "its launcher is gone" if launcher_gone() else "SIGTERM"
                    raise Preempted(f"{why}: saved after {step + 1} of {steps} steps")
            if on_step:
                on_step(step)
    return history


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


def _step(name, role, network, optimizer, batch, step, steps, accumulate, accelerator, guard):
    """One step of one role: its figures by name, or None for a bad batch, which changes nothing."""
    before = loss_state(role.loss)
    no_sync = partial(accelerator.no_sync, network)
    losses, figures = accumulate_gradient(role, batch, accumulate, _forward(network), no_sync)
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
    return figures


def loss_state(loss) -> dict:
    """What a loss carries from one step to the next, {name: tensor}; empty for a plain function."""
    return loss.state_dict() if hasattr(loss, "state_dict") else {}
