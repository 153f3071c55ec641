"""Checkpoints of a run: everything that training goes on from, whole or not at all.

A folder of checkpoints holds one folder each, named by the steps that were done, written beside and renamed once whole:
    000500/*.distcp, .metadata   tensors (torch.distributed.checkpoint), each process its part: weights, averages,
                                 optimisers, what losses remember, torch's random state
    000500/state.json            steps done, history, what the run was told and its hash, what else goes on
    000500/manifest.json         size and SHA-256 of every other file
Learning rates and batches are functions of the step. Any number of processes may read what another number wrote.
`.metadata` is a pickle of torch's: resume from what you wrote yourself alone.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed
from accelerate.utils import gather_object
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from minianyflow.support.errors import InputError
from minianyflow.support.files import LOCK, UNFINISHED, lock_folder, remove_leftovers
from minianyflow.wan.guard import any_process
from minianyflow.wan.trainer import loss_state

MANIFEST, STATE = "manifest.json", "state.json"
BROKEN = "not-whole-"  # before the names of those put aside
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # other errors of a disk may pass


@dataclass
class Checkpoints:
    """What `training.train` saves every `every` steps and at the end, in `folder`; the last `keep` stay.

    settings: what the run was told, {name: value}; going on with another is refused. stateful: objects that go on, too,
    {name: object}, each with `state_dict()`, plain enough for JSON, and `load_state_dict(state)`.
    """

    folder: Path
    every: int = 500
    keep: int = 3
    settings: dict = field(default_factory=dict)
    stateful: dict = field(default_factory=dict)

    def __post_init__(self):
        self.folder = Path(self.folder)
        if self.every < 1 or self.keep < 1:
            raise InputError(f"checkpoints every {self.every} steps, {self.keep} kept; expected at least 1 of each")

    def folders(self):
        """The folders that stand for whole checkpoints, newest first; whether they are, `problem_of` says."""
        named = [path for path in self.folder.glob("*") if path.name.isdecimal() and path.is_dir()]
        return sorted(named, key=lambda path: int(path.name), reverse=True)

    def lock(self, accelerator):
        """Keep other runs away as long as this one lives. Raises InputError if there is one, or writing is refused."""
        self.held, problem = None, None
        try:
            self.held = lock_folder(self.folder) if accelerator.is_main_process else None
        except InputError as error:
            problem = str(error)
        problem = next(filter(None, gather_object([problem])), None)
        if problem:
            raise InputError(problem)

    def check_settings(self):
        """Raise InputError, one line, if the run was told something else when its newest checkpoint was made."""
        for folder in self.folders():
            try:
                digest = json.loads((folder / MANIFEST).read_text())["files"][STATE]
                before = json.loads((folder / STATE).read_text())["settings"]
                whole = digest == [*_digest(folder / STATE)]
            except (*GONE, ValueError, KeyError, TypeError):
                continue  # not whole; restore will say so
            except OSError as problem:
                raise _unreadable(folder, problem) from None
            if not whole:
                continue
            names = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
            if names:
                changes = "; ".join(
                    f"{name} was {before.get(name)}, is {self.settings.get(name)}" for name in names[:5]
                )
                expected = "put back what changed, or name another folder with output=FOLDER"
                raise InputError(f"{folder} was made by another configuration: {changes}; {expected}")
            return

    def check_room(self, roles):
        """Raise InputError where those still to come have no room: better at the start than after hours."""
        size = 0
        for role in roles.values():
            averages = role.average.state_dict().values() if role.average is not None else ()
            moments = [weight for _, weight in _optimised(role)] * 2
            kept = (*role.network.state_dict().values(), *averages, *moments)
            size += sum(each.numel() * each.element_size() for each in kept)
        needed = size * max(1, self.keep + 1 - len(self.folders()))  # an old one goes when a new one is whole
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed > free:
            expected = "make room, set checkpoints.keep lower, or name another folder with output=FOLDER"
            raise InputError(
                f"checkpoints need {needed / 1e9:.3g} GB more in {place}, and {free / 1e9:.3g} GB are free; {expected}"
            )

    def due(self, done, steps):
        """Whether to save after `done` of `steps` steps."""
        return done % self.every == 0 or done == steps

    def save(self, roles, done, history, accelerator):
        """Save what stands after `done` steps. Raises InputError where it cannot; older ones stay as they are."""
        part, main = self.folder / f"{UNFINISHED}{done:06}", accelerator.is_main_process
        tensors = _tensors(roles, accelerator)
        if any_process(not all(_finite(each) for each in tensors.values()), accelerator):
            kept = ", ".join(folder.name for folder in self.folders()) or "none"
            raise InputError(
                f"weights are not finite after {done} steps; not saved, and those before are as they were ({kept}): "
                "lower lr, name another folder with output=FOLDER"
            )
        state = {"step": done, "processes": accelerator.num_processes, "history": history, "settings": self.settings}
        state |= {"distribution": accelerator.distributed_type.value}
        state |= {"hash": hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()}
        state |= {"stateful": {name: each.state_dict() for name, each in self.stateful.items()}}
        state |= {"versions": {package: version(package) for package in ("torch", "accelerate")}}
        try:
            _together(_renew, part, on=main)
            try:
                with _alone(accelerator) as alone:
                    distributed.save(tensors, checkpoint_id=part, no_dist=alone)
                _together(_write, part / STATE, state, on=main)
                mine = slice(accelerator.process_index, None, accelerator.num_processes)
                digests = _together(lambda: {path.name: _digest(path) for path in sorted(part.iterdir())[mine]})
                files = dict(sorted((name, each) for share in digests for name, each in share.items()))
                _together(self._finish, part, {"files": files}, on=main)
            except (OSError, CheckpointException):
                _together(shutil.rmtree, part, True, on=main)
                raise
        except (OSError, CheckpointException) as problem:
            kept = ", ".join(folder.name for folder in self.folders()) or "none"
            why = f"cannot save a checkpoint after {done} steps in {self.folder} ({_why(problem)})"
            raise InputError(f"{why}; those before are intact ({kept}): mend that, then run the same again") from None

    def restore(self, roles, accelerator):
        """Put the newest whole checkpoint in place: (steps done, history); (0, []) if there is none.

        Says on the main process which it is, and which newer ones are not whole and why.
        """
        folders = self.folders()
        for folder in folders:
            try:
                problem = _together(problem_of, folder, accelerator.process_index, accelerator.num_processes)
            except OSError as refused:
                raise _unreadable(folder, refused) from None
            problem = next(filter(None, problem), None)
            if problem is None:
                break
            if accelerator.is_main_process:
                print(f"warning: {folder} is not whole ({problem}); trying the one before", file=sys.stderr, flush=True)
        else:
            if folders and accelerator.is_main_process:
                why = f"no whole checkpoint in {self.folder}; those there are kept as {BROKEN}*, beginning anew"
                print(f"warning: {why}", file=sys.stderr, flush=True)
                for folder in folders:
                    _keep_broken(folder)
            return 0, []
        try:
            _load(folder, roles, accelerator)
        except CheckpointException as why:
            expected = "expected the roles and sizes of this run: name another folder with output=FOLDER"
            raise InputError(f"{folder} does not fit ({_why(why)}); {expected}") from None
        state = json.loads((folder / STATE).read_text())
        for name, each in self.stateful.items():
            each.load_state_dict(state["stateful"][name])
        if accelerator.is_main_process:
            print(f"going on after {state['step']} steps, from {folder}", flush=True)
        return state["step"], state["history"]

    def remove(self):
        """Remove all of them: what a finished run leaves says the same in less room. What is not theirs stays."""
        for folder in self.folders():
            shutil.rmtree(folder, ignore_errors=True)
        remove_leftovers(self.folder)
        with contextlib.suppress(OSError):  # not empty, or a link to another disk
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

    def _finish(self, part, manifest):
        """Give a whole checkpoint its name, then let old ones and what was never finished go."""
        _write(part / MANIFEST, manifest)
        _sync(part)
        whole = self.folder / part.name.removeprefix(UNFINISHED)
        if whole.exists():  # it was found not to be whole
            _put_aside(whole)
        os.replace(part, whole)
        _sync(self.folder)
        before = [old for old in self.folders() if int(old.name) <= int(whole.name)]
        later = [old for old in self.folders() if old not in before]  # found not to be whole: they must not count
        for old in (*later, *before[self.keep :]):
            _put_aside(old)
        remove_leftovers(self.folder)


def problem_of(folder, index=0, parts=1):
    """What is wrong with a checkpoint, in a few words, or None. With parts, every parts-th file from `index` on.

    Raises OSError where the disk does not let itself be read: that says nothing about the checkpoint.
    """
    try:
        files = json.loads((Path(folder) / MANIFEST).read_text())["files"]
        for name, (size, digest) in list(files.items())[index::parts]:
            path = Path(folder) / name
            try:
                found, content = _digest(path)
            except GONE:
                return f"no {name}"
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if content != digest:
                return f"{name} has another SHA-256 than when it was written"
    except (*GONE, ValueError, KeyError, TypeError, AttributeError):
        return f"no {MANIFEST} that can be read"
    return None


# Tensors


def _tensors(roles, accelerator):
    """All that is kept as tensors, by name; the tensors themselves, so that loading into them is in place."""
    tensors = {}
    for name, role in roles.items():
        tensors |= {f"{name}/network/{key}": value for key, value in role.network.state_dict().items()}
        if role.average is not None:
            tensors |= {f"{name}/average/{key}": value for key, value in role.average.state_dict().items()}
        for key, weight in _optimised(role):
            state = role.optimizer.state.get(weight, {})
            tensors |= {f"{name}/optimizer/{key}/{kind}": value for kind, value in state.items()}
        tensors |= {f"{name}/loss/{key}": value for key, value in loss_state(role.loss).items()}
    index = accelerator.process_index
    tensors[f"random/{index}/cpu"] = torch.get_rng_state()
    if accelerator.device.type == "cuda":
        tensors[f"random/{index}/cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return tensors


def _load(folder, roles, accelerator):
    saved = distributed.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, role in roles.items():
        for key, weight in _optimised(role):
            prefix = f"{name}/optimizer/{key}/"
            kinds = {full.removeprefix(prefix): saved[full].size for full in saved if full.startswith(prefix)}
            role.optimizer.state[weight] = {
                kind: torch.zeros_like(weight) if size == weight.shape else torch.zeros(size, device=weight.device)
                for kind, size in kinds.items()
            }
    tensors = _tensors(roles, accelerator)
    here = (*(f"{name}/loss/" for name in roles), f"random/{accelerator.process_index}/")
    tensors |= {
        name: torch.zeros(each.size, dtype=each.properties.dtype)
        for name, each in saved.items()
        if name.startswith(here)
    }
    tensors = {name: each for name, each in tensors.items() if name in saved or not name.startswith(here)}
    with _alone(accelerator) as alone:
        distributed.load(tensors, checkpoint_id=folder, no_dist=alone)
    for name, role in roles.items():
        prefix = f"{name}/loss/"
        state = {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
        if state:
            role.loss.load_state_dict({key: each.to(accelerator.device) for key, each in state.items()})
    index = accelerator.process_index
    if f"random/{index}/cpu" in tensors:
        torch.set_rng_state(tensors[f"random/{index}/cpu"])
    if f"random/{index}/cuda" in tensors and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"random/{index}/cuda"], accelerator.device)


@contextlib.contextmanager
def _alone(accelerator):
    """Whether there is one process; torch then warns of what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield accelerator.num_processes == 1


def _finite(tensor):
    return bool((tensor.to_local() if isinstance(tensor, DTensor) else tensor).isfinite().all())


def _optimised(role):
    for group in role.optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


# Files


def _together(action, *arguments, on=True):
    """What `action` returns on each process that is to do it, a list; an OSError of one is raised on all."""
    try:
        result, problem = (action(*arguments) if on else None), None
    except OSError as error:
        result, problem = None, error.strerror or str(error)
    results = gather_object([(result, problem)])
    problem = next((each for _, each in results if each), None)
    if problem:
        raise OSError(problem)
    return [each for each, _ in results]


def _why(problem):
    """The first cause, in a few words."""
    if isinstance(problem, CheckpointException):
        problem = next(iter(problem.failures.values()))[0]
        problem = problem.__cause__ or problem
    return " ".join((getattr(problem, "strerror", None) or str(problem)).split())


def _renew(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _put_aside(folder):
    """Rename what is to be removed: under its own name a checkpoint is never half there."""
    aside = folder.with_name(f"{UNFINISHED}old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)


def _keep_broken(folder):
    """Under a name that no checkpoint has: somebody may want to mend it."""
    aside, count = folder.with_name(f"{BROKEN}{folder.name}"), 1
    while aside.exists():
        aside, count = folder.with_name(f"{BROKEN}{folder.name}-{count}"), count + 1
    os.replace(folder, aside)


def _unreadable(folder, problem):
    why = problem.strerror or problem
    return InputError(f"{folder} cannot be read ({why}); nothing was changed: mend the disk, then run the same again")


def _write(path, content):
    with path.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(folder):
    """Renames survive a loss of power once the folder itself is on disk."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def _digest(path):
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
