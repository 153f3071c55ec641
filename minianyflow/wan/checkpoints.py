"""Checkpoints of a run: everything that training resumes from, whole or absent.

A folder of checkpoints has one folder per checkpoint, named by the number of steps done. It is written under another
name and renamed once all of it is on the disk: the rename is the commit point.
    000500/*.distcp, .metadata   weights, averages and optimiser moments (torch.distributed.checkpoint): each process
                                 writes its part, any number of processes may read it
    000500/state.pt              random state of each process, state of each loss (torch.save)
    000500/state.json            number of steps, history, settings of the run, state of its clock and counters
    000500/manifest.json         CRC-32 of .metadata, state.pt and state.json; torch stores one beside every tensor
Learning rates and batches are functions of the step and need no state. `.metadata` is a pickle of torch's: resume only
from checkpoints that you wrote yourself.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed
from accelerate.utils import gather_object
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from typing_extensions import TypedDict

from minianyflow.support.errors import InputError
from minianyflow.support.files import LOCK, UNFINISHED, check_json, lock_folder, remove_leftovers
from minianyflow.wan.guard import agree, warn
from minianyflow.wan.trainer import loss_state

METADATA, STATE, TENSORS, MANIFEST = ".metadata", "state.json", "state.pt", "manifest.json"
BROKEN = "not-whole-"  # before the name of a checkpoint that is set aside
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # any other error of a disk may pass

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves and loads as well


class State(TypedDict):
    """The fields of state.json that are read."""

    step: int
    history: list[dict]
    settings: dict
    stateful: dict


class Broken(Exception):
    """A file of a checkpoint is missing, cut short or changed."""


@dataclass
class Checkpoints:
    """What `trainer.train_run` saves in `folder` every `every` steps, or so much time, and at the end; `keep` stay.

    settings: {name: value} of the run; a run with other settings may not resume. stateful: {name: object} of what
    else is saved and restored, by `state_dict()`, plain enough for JSON, and `load_state_dict(state)`.
    """

    folder: Path
    every: int | str = "30 min"
    keep: int = 3
    settings: dict = field(default_factory=dict)
    stateful: dict = field(default_factory=dict)

    def __post_init__(self):
        self.folder = Path(self.folder)
        if self.every == 0 or self.keep < 1:
            raise InputError(f"checkpoints every {self.every} steps, {self.keep} kept; expected at least 1 of each")

    def folders(self) -> list[Path]:
        """The checkpoints by name, newest first; `check` says whether one is whole."""
        named = [path for path in self.folder.glob("*") if path.name.isdecimal() and path.is_dir()]
        return sorted(named, key=lambda path: int(path.name), reverse=True)

    def lock(self, accelerator) -> None:
        """Keep other runs out for the life of this process. Raises InputError if one is in, or writing is refused."""
        self.lock_file = _raise_on_all(accelerator.on_main_process(lock_folder), self.folder)

    def check_settings(self) -> None:
        """Raise InputError, one line, if the newest whole checkpoint was saved with other settings."""
        for folder in self.folders():
            try:
                before = _state(folder)["settings"]
            except Broken:  # `restore` says so
                continue
            except OSError as problem:
                raise _unreadable(folder, problem) from None
            names = [name for name in before | self.settings if before.get(name) != self.settings.get(name)]
            if names:
                changes = [f"{name} was {before.get(name)}, is {self.settings.get(name)}" for name in names[:5]]
                expected = "put back what changed, or name another folder with output=FOLDER"
                raise InputError(f"{folder} was made by another configuration: {'; '.join(changes)}; {expected}")
            return

    def check_room(self, roles) -> None:
        """Raise InputError if the disk has no room for the checkpoints to come: at the start, not after hours."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(roles).values())
        needed = size * max(1, self.keep + 1 - len(self.folders()))  # an old one goes when a new one is whole
        place = self.folder.absolute()
        place = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            expected = "make room, set checkpoints.keep lower, or name another folder with output=FOLDER"
            raise InputError(
                f"checkpoints need {needed / 1e9:.3g} GB more in {place}, and {free / 1e9:.3g} GB are free; {expected}"
            )

    def save(self, roles, done: int, history, accelerator) -> None:
        """Save the state after `done` steps. Raises InputError if that fails; older checkpoints stay intact."""
        unfinished, on_main = self.folder / f"{UNFINISHED}{done:06}", accelerator.on_main_process
        older = ", ".join(folder.name for folder in self.folders()) or "none"
        tensors, losses = _tensors(roles), {name: loss_state(role.loss) for name, role in roles.items()}
        checked = [*tensors.values(), *(tensor for state in losses.values() for tensor in state.values())]
        if agree([not all(map(_finite, checked))], accelerator)[0]:
            raise InputError(
                f"weights are not finite after {done} steps; not saved, and those before are as they were ({older}): "
                "lower lr, name another folder with output=FOLDER"
            )
        random = {"cpu": torch.get_rng_state()}
        if accelerator.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        others = {"losses": losses, "random": gather_object([random])}
        state = {
            "step": done,
            "processes": accelerator.num_processes,
            "distribution": accelerator.distributed_type.value,
            "history": history,
            "settings": self.settings,
            "stateful": {name: item.state_dict() for name, item in self.stateful.items()},
            "versions": {package: version(package) for package in ("torch", "accelerate")},
        }
        try:
            _raise_on_all(on_main(remove_leftovers), self.folder)
            distributed.save(tensors, checkpoint_id=unfinished)
            _raise_on_all(on_main(self._finish), unfinished, state, others)
        except (OSError, CheckpointException) as problem:
            on_main(shutil.rmtree)(unfinished, True)
            why = f"cannot save a checkpoint after {done} steps in {self.folder} ({_cause(problem)})"
            raise InputError(f"{why}; those before are intact ({older}): mend that, then run the same again") from None

    def _finish(self, unfinished, state, others):
        """Write the small files, rename the folder, remove the oldest checkpoint."""
        buffer = io.BytesIO()
        torch.save(others, buffer)
        files = {STATE: json.dumps(state, indent=1).encode(), TENSORS: buffer.getvalue()}
        files[METADATA] = (unfinished / METADATA).read_bytes()
        files[MANIFEST] = json.dumps({name: zlib.crc32(content) for name, content in files.items()}).encode()
        for name, content in files.items():
            with (unfinished / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync(unfinished)
        os.replace(unfinished, self.folder / unfinished.name.removeprefix(UNFINISHED))
        _sync(self.folder)
        for folder in self.folders()[self.keep :]:
            shutil.rmtree(folder, ignore_errors=True)  # half removed, it is broken

    def restore(self, roles, accelerator) -> tuple[int, list]:
        """Load the newest whole checkpoint; returns (number of steps, history), (0, []) if there is none.

        The main process prints which one it is, and which newer ones are broken and why. These get another name:
        somebody may want to repair one.
        """
        broken, whole = [], None
        for folder in self.folders():
            try:
                _raise_on_all(check, folder, accelerator.process_index, accelerator.num_processes)
            except Broken as problem:
                broken.append(folder)
                warn(f"{folder} is not whole ({problem}); trying the one before", accelerator)
            except OSError as problem:
                raise _unreadable(folder, problem) from None
            else:
                whole = folder
                break
        _raise_on_all(accelerator.on_main_process(_set_aside), broken)
        if whole is None:
            if broken:
                why = f"no whole checkpoint in {self.folder}; those there are kept as {BROKEN}*, beginning anew"
                warn(why, accelerator)
            return 0, []
        state = self._load(whole, roles, accelerator)
        if accelerator.is_main_process:
            print(f"going on after {state['step']} steps, from {whole}", flush=True)
        return state["step"], state["history"]

    def _load(self, folder, roles, accelerator):
        """Put a whole checkpoint into roles, random generators and stateful objects; returns state.json."""
        try:
            distributed.load(_tensors(roles), checkpoint_id=folder)  # in place
        except CheckpointException as problem:
            expected = "expected the roles and sizes of this run: name another folder with output=FOLDER"
            raise InputError(f"{folder} does not fit ({_cause(problem)}); {expected}") from None
        others = torch.load(io.BytesIO(_read(folder, TENSORS)), map_location="cpu", weights_only=True)
        for name, loss in others["losses"].items():
            if loss:
                roles[name].loss.load_state_dict({key: value.to(accelerator.device) for key, value in loss.items()})
        if accelerator.process_index < len(others["random"]):
            random = others["random"][accelerator.process_index]
            torch.set_rng_state(random["cpu"])
            if "cuda" in random and accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(random["cuda"])
        state = _state(folder)
        for name, item in self.stateful.items():
            item.load_state_dict(state["stateful"][name])
        return state

    def remove(self) -> None:
        """Remove all checkpoints: a finished run's weights replace them. Other files in the folder stay."""
        for folder in self.folders():
            shutil.rmtree(folder, ignore_errors=True)
        remove_leftovers(self.folder)
        with contextlib.suppress(OSError):  # not empty, or a link to another disk
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()


def check(folder: Path, index: int = 0, count: int = 1) -> None:
    """Raise Broken unless a checkpoint is whole; as process `index` of `count`, look at every count-th tensor.

    A .distcp is a sequence of files of torch.save, one per tensor: zip files, whose CRC-32 is compared.
    Raises OSError if the disk cannot be read: that says nothing about the checkpoint.
    """
    for name in (METADATA, TENSORS):
        _read(folder, name)
    _state(folder)
    for place in [*distributed.FileSystemReader(folder).read_metadata().storage_data.values()][index::count]:
        content = io.BytesIO(_bytes(folder / place.relative_path, place.offset, place.length))
        try:
            torch.load(content, map_location="cpu", weights_only=True)  # looks at headers alone
            intact = zipfile.ZipFile(content).testzip() is None
        except Exception:  # whatever these raise for a changed byte
            intact = False
        if not intact:
            raise Broken(f"{place.relative_path} is cut short or changed")


def _read(folder, name):
    """The content of a file, if its CRC-32 is that of the manifest."""
    try:
        expected = json.loads(_bytes(folder / MANIFEST))[name]
    except (ValueError, KeyError, TypeError):
        raise Broken(f"{MANIFEST} is cut short or changed") from None
    content = _bytes(folder / name)
    if zlib.crc32(content) != expected:
        raise Broken(f"{name} is cut short or changed")
    return content


def _state(folder):
    """The fields of `State` of a checkpoint."""
    try:
        return check_json(json.loads(_read(folder, STATE)), State, folder / STATE, "expected what a run saved")
    except (ValueError, RecursionError) as problem:
        raise Broken(f"{problem}") from None


def _bytes(path, offset=0, length=-1):
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except ABSENT:
        raise Broken(f"no {path.name}") from None


def _tensors(roles):
    """Weights, averages and moments by name: the tensors themselves, so that loading into them is in place."""
    tensors = {}
    for name, role in roles.items():
        tensors |= {f"{name}/network/{key}": value for key, value in role.network.state_dict().items()}
        if role.average is not None:
            tensors |= {f"{name}/average/{key}": value for key, value in role.average.state_dict().items()}
        for group in role.optimizer.param_groups:
            for key, weight in zip(group["param_names"], group["params"], strict=True):
                state = role.optimizer.state[weight]
                if not state and "momentum" in group:  # the optimiser makes these, the same, at its first step
                    state["momentum_buffer"] = torch.zeros_like(weight)
                elif not state:
                    state["step"] = torch.zeros((), device=weight.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                tensors |= {f"{name}/optimizer/{key}/{kind}": value for kind, value in state.items()}
    return tensors


def _finite(tensor):
    return bool((tensor.to_local() if isinstance(tensor, DTensor) else tensor).isfinite().all())


def _raise_on_all(action, *arguments):
    """The result of `action` on this process; an error on any process is raised on all, so that none waits."""
    result = error = None
    try:
        result = action(*arguments)
    except (OSError, InputError, Broken) as problem:
        error = problem
    for problem in filter(None, gather_object([error])):
        raise problem
    return result


def _cause(problem):
    """The first cause of a failed save or load, in a few words. Raises Ctrl-C, which torch takes for a failure."""
    if isinstance(problem, CheckpointException):
        problem = next(iter(problem.failures.values()))[0]
        if isinstance(problem, KeyboardInterrupt):
            raise problem from None
        problem = problem.__cause__ or problem
    return " ".join((getattr(problem, "strerror", None) or str(problem)).split())


def _set_aside(folders):
    for folder in folders:
        names = (f"{BROKEN}{folder.name}{f'-{number}' if number else ''}" for number in itertools.count())
        os.replace(folder, next(path for path in map(folder.with_name, names) if not path.exists()))


def _unreadable(folder, problem):
    why = problem.strerror or problem
    return InputError(f"{folder} cannot be read ({why}); nothing was changed: mend the disk, then run the same again")


def _sync(folder):
    """Put a folder's list of files on the disk: then renames survive a loss of power."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)
