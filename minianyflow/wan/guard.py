"""What can go wrong in a run of days and need not end it: bad batches, signals, a tracker that fails."""

import contextlib
import importlib.util
import io
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
from minianyflow.wan.data.write_video import as_gif

EXIT_SIGTERM, EXIT_CTRL_C = 143, 130  # what a shell reports after SIGTERM: to a scheduler the run is not finished
LAUNCHED = not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)
LAUNCHER = os.getppid()  # read at import: later it may be gone


class Preempted(Exception):
    """A signal came, the launcher is gone or the time is over; a checkpoint was saved. status: to exit with."""

    def __init__(self, text: str, status: int = EXIT_SIGTERM):
        super().__init__(text)
        self.status = status


@dataclass
class Guard:
    """What becomes of a batch whose loss or gradient norm is not finite, or whose loss is `above` a bound.

    The first `skip` of them are left out, on all processes, without an update; the next one stops the run. Each is
    written to bad_batch.json in `folder`, if there is one, as one line: the step, the role, the numbers of the samples
    and, where batches have `row`, rows of the data and their files, which files(rows) names.
    """

    skip: int = 0
    above: float = math.inf
    folder: str | Path | None = None
    files: Callable | None = None
    skipped: list[int] = field(default_factory=list)  # steps

    def is_bad(self, losses, norm, accelerator) -> bool:
        """Whether the step of a role is bad on any process. losses: one (B,) per micro-batch."""
        fine = all(bool((loss.isfinite() & (loss <= self.above)).all()) for loss in losses)
        return agree([not (fine and math.isfinite(float(norm)))], accelerator)[0]

    def record(self, step, role, losses, batch, accelerator) -> None:
        """Write the bad rows of all processes down, and skip the batch or raise InputError. batch: of this process."""
        losses = gather_object(torch.cat(losses).tolist())
        rows = gather_object(batch["row"].tolist()) if "row" in batch else []
        places = gather_object(batch["place"].tolist()) if "place" in batch else range(len(losses))
        once = {place: index for index, place in enumerate(places)}  # processes that share a clip have the same rows
        bad = [index for index in once.values() if not (math.isfinite(losses[index]) and losses[index] <= self.above)]
        bad = bad or list(once.values())  # the gradient is not finite: any row may be the cause
        entry = {"step": step, "role": role, "numbers": [step * len(once) + places[index] for index in bad]}
        if rows:
            entry["rows"] = [rows[index] for index in bad]
            entry |= {"files": self.files(entry["rows"])} if self.files else {}
        line = json.dumps(entry | {"losses": [str(losses[index]) for index in bad]})
        where = f"{role}/loss is {losses[bad[0]]} at step {step}"
        if self.folder is not None and accelerator.is_main_process:
            try:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
                with (Path(self.folder) / "bad_batch.json").open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as problem:
                warn(f"{line} cannot be written down ({problem.strerror})", accelerator)
        if len(self.skipped) >= self.skip:
            before = f"; {self.skip} were skipped before" if self.skip else ""
            named = "" if self.folder is None else f" named in {self.folder}/bad_batch.json"
            raise InputError(f"{where}{before}; expected finite losses: lower lr, or look at the data{named}")
        self.skipped.append(step)
        warn(f"{where}; skipped ({len(self.skipped)} of {self.skip})", accelerator)

    def state_dict(self):
        """State for a checkpoint."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state):
        """Resume from a checkpoint."""
        self.skipped = list(state["skipped"])


def agree(flags: list[bool], accelerator) -> list[bool]:
    """Which of the flags are true on any process."""
    if accelerator.num_processes == 1:
        return flags
    counts = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [count > 0 for count in accelerator.reduce(counts, "sum").tolist()]


def warn(text: str, accelerator) -> None:
    """Print a warning on the main process, above its progress bar."""
    if accelerator.is_main_process:
        tqdm.write(f"warning: {text}", file=sys.stderr)


# Signals


@contextlib.contextmanager
def catch_signals(wanted: bool):
    """A list of the signals SIGTERM and SIGINT (Ctrl-C) that came; the process lives on. A second Ctrl-C ends it."""
    received = []

    def note(number, _):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nCtrl-C: finishing this step, then saving; Ctrl-C again ends at once\n")
        received.append(number)

    caught = (signal.SIGTERM, signal.SIGINT) if wanted and threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield received
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def launcher_gone() -> bool:
    """Whether `accelerate launch` or torchrun, which started this process, is gone.

    `accelerate launch` passes no signal on to a single process. Any other parent, such as a shell, may end.
    """
    return LAUNCHED and os.getppid() != LAUNCHER


def exit_at_once(status: int = EXIT_SIGTERM):
    """End this process after a signal without the usual clean-up, in which process groups may wait for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# Trackers

FAILURES = []  # errors that ended a thread of a tracker


def check_tracker(name: str) -> None:
    """Raise InputError for a tracker that is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"log.tracker={name} is not installed here: pip install {name}, or set log.tracker=none")


def start_trackers(accelerator, folder: str | Path = ".") -> None:
    """Start the trackers; wandb's files go to `folder`.

    An error that ends a thread of theirs becomes the one warning, as an error of a call does.
    """
    before, after, usual_hook = {*threading.enumerate()}, None, threading.excepthook

    def hook(failure):
        if failure.thread not in before and (after is None or failure.thread in after):
            FAILURES.append(failure.exc_value)
        else:
            usual_hook(failure)

    FAILURES.clear()
    threading.excepthook = hook
    names = [getattr(kind, "value", kind) for kind in accelerator.log_with]
    settings = {"dir": str(folder), "name": Path(folder).name}
    project = "minianyflow" if "wandb" in names else "log"  # of tensorboard: its folder
    _call_tracker(accelerator, accelerator.init_trackers, project, init_kwargs={"wandb": settings})
    after = {*threading.enumerate()}


def log_figures(entry: dict, accelerator) -> None:
    """Pass an entry of the history to the trackers; one that fails is a warning, and is not used any more."""
    values = {kind: value for kind, value in entry.items() if kind != "step"}
    _call_tracker(accelerator, accelerator.log, values, step=int(entry["step"]))  # wandb takes no float


def end_trackers(accelerator) -> None:
    """End the trackers and, whether they fail or not, the group of processes."""
    finish_trackers(accelerator)
    accelerator.end_training()


def log_clips(clips: dict, step: int, accelerator, fps: float) -> None:
    """Pass {label: videos (B, T, 3, H, W) in [0, 1]} to tensorboard and wandb as GIFs."""
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        if tracker.name in ("tensorboard", "wandb"):
            _call_tracker(accelerator, _log_clips, tracker, clips, step, fps)


def _log_clips(tracker, clips, step, fps):
    videos = {
        f"samples/{label}-{k}": as_gif(clip, fps) for label, batch in clips.items() for k, clip in enumerate(batch)
    }
    if tracker.name == "wandb":
        import wandb

        return tracker.log(
            {name: wandb.Video(io.BytesIO(gif), format="gif") for name, gif in videos.items()}, step=step
        )
    from tensorboard.compat.proto.summary_pb2 import Summary

    for name, gif in videos.items():
        values = [Summary.Value(tag=name, image=Summary.Image(encoded_image_string=gif))]
        tracker.writer._get_file_writer().add_summary(Summary(value=values), step)


def finish_trackers(accelerator) -> None:
    """End the trackers: what they hold is written."""
    for tracker in accelerator.trackers:
        _call_tracker(accelerator, tracker.finish)
    accelerator.trackers = []


def _call_tracker(accelerator, action, *arguments, **options):
    try:
        action(*arguments, **options)
        if accelerator.trackers and FAILURES:
            raise FAILURES[0]
    except Exception as problem:  # whatever a tracker raises, training continues
        accelerator.trackers = []
        why = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        warn(f"the tracker failed ({why}); going on without it", accelerator)
