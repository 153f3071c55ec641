"""What may go wrong in a run of days, and need not end it: bad batches, a scheduler's warning, a tracker that fails."""

import contextlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from minianyflow.support.errors import InputError

EXIT_SIGTERM = 143  # as a shell says that SIGTERM ended it: to a scheduler such a run is not finished
LAUNCHED = not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)
LAUNCHER = os.getppid()  # asked for at once: later it may be gone


class Preempted(Exception):
    """SIGTERM came, or the launcher is gone; what training goes on from has been saved."""


@dataclass
class Guard:
    """What becomes of a batch whose loss or gradient norm is not finite, or whose loss is `above` a bound.

    Up to `skip` of them are left out, on all processes, without a step; the next one stops the run. Each is written to
    bad_batch.json in `folder`, if there is one, a line each: which step, which role, which samples of the run and,
    where batches have `row`, rows of the data and their files, which files(rows) names.
    """

    skip: int = 0
    above: float = math.inf
    folder: str | Path | None = None
    files: Callable | None = None
    skipped: list[int] = field(default_factory=list)  # steps

    def is_bad(self, losses, norm, accelerator):
        """Whether the step of a role is bad on any process. losses: of its parts, each (B,)."""
        fine = all(bool((each <= self.above).all()) and bool(each.isfinite().all()) for each in losses)
        return any_process(not (fine and math.isfinite(float(norm))), accelerator)

    def record(self, step, role, losses, batch, accelerator):
        """Write the batch of all processes down, and skip it or raise InputError. batch: of this process."""
        own = {"losses": torch.cat(losses).tolist(), "rows": batch["row"].tolist() if "row" in batch else []}
        gathered = gather_object([own])
        losses, numbers = ([each for part in gathered for each in part[name]] for name in own)
        rows = [row for row, loss in enumerate(losses) if not (math.isfinite(loss) and loss <= self.above)]
        rows = rows or list(range(len(losses)))  # the gradient was bad; any row may have been
        told = {"step": step, "role": role, "numbers": [step * len(losses) + row for row in rows]}
        if numbers:
            told["rows"] = [numbers[row] for row in rows]
            told |= {"files": self.files(told["rows"])} if self.files else {}
        told |= {"losses": [str(losses[row]) for row in rows]}
        where = f"{role}/loss is {losses[rows[0]]} at step {step}"
        if self.folder is not None and accelerator.is_main_process:
            try:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
                with (Path(self.folder) / "bad_batch.json").open("a") as file:
                    file.write(json.dumps(told) + "\n")
            except OSError as problem:
                tqdm.write(f"warning: {json.dumps(told)} cannot be written down ({problem.strerror})", file=sys.stderr)
        if len(self.skipped) >= self.skip:
            left = f"; {self.skip} were skipped before" if self.skip else ""
            written = "" if self.folder is None else f" named in {self.folder}/bad_batch.json"
            raise InputError(f"{where}{left}; expected finite losses: lower lr, or look at the data{written}")
        self.skipped.append(step)
        if accelerator.is_main_process:
            tqdm.write(f"warning: {where}; skipped ({len(self.skipped)} of {self.skip})", file=sys.stderr)

    def state_dict(self):
        """What a checkpoint keeps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state):
        """Go on from a checkpoint."""
        self.skipped = list(state["skipped"])


def any_process(flag, accelerator):
    """Whether it is so on any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def launcher_gone():
    """Whether `accelerate launch` or torchrun, which started this process, is gone.

    The former passes no signal on to a single process. Any other parent, say a shell that was closed, may go.
    """
    return LAUNCHED and os.getppid() != LAUNCHER


def exit_at_once():
    """End this process after SIGTERM, at once: process groups may wait for ever at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_SIGTERM)


@contextlib.contextmanager
def catch_sigterm(wanted):
    """A list that is no longer empty once SIGTERM has come."""
    came = []
    if not wanted:
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


FAILURES = []  # errors that ended a thread of a tracker


def start_trackers(accelerator):
    """Let the trackers begin, if they can. What ends a thread of theirs is said in one line, as what they raise is."""
    before, after, usual = {*threading.enumerate()}, None, threading.excepthook

    def ended(told):
        if told.thread in before or not (after is None or told.thread in after):
            usual(told)
        else:
            FAILURES.append(told.exc_value)

    FAILURES.clear()
    threading.excepthook = ended
    _tracking(accelerator, accelerator.init_trackers, "log")
    after = {*threading.enumerate()}


def log_figures(entry, accelerator):
    """Pass an entry of the history to the trackers; one that fails is a warning, and done without from then on."""
    values = {kind: value for kind, value in entry.items() if kind != "step"}
    _tracking(accelerator, accelerator.log, values, step=entry["step"])


def end_trackers(accelerator):
    """Let the trackers finish, and the processes part, whatever becomes of the trackers."""
    for tracker in accelerator.trackers:
        _tracking(accelerator, tracker.finish)
    accelerator.trackers = []
    accelerator.end_training()


def _tracking(accelerator, action, *arguments, **options):
    try:
        action(*arguments, **options)
        if accelerator.trackers and FAILURES:
            raise FAILURES[0]
    except Exception as problem:  # whatever a tracker raises, training goes on
        accelerator.trackers = []
        why = " ".join(f"{type(problem).__name__}: {problem}".split())
        tqdm.write(f"warning: the tracker failed ({why}); going on without it", file=sys.stderr)
