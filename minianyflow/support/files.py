"""Files and folders that appear whole or not at all, and folders that one run alone writes to."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from minianyflow.support.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK, UNFINISHED = ".lock", ".unfinished-"


def lock_folder(folder):
    """Make `folder`, and let nobody else hold it as long as what this returns is kept; a killed process lets go.

    Raises InputError if it is held, or cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as problem:
        raise InputError(f"cannot write to {folder} ({problem.strerror}); name one that you may write to") from None
    if not _locked(file):
        raise InputError(f"another run is at work in {folder}; wait for it, or name another folder")
    return file


def _locked(file):
    """Whether an open file is locked for this process alone, or there are no locks here."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        return problem.errno != errno.EWOULDBLOCK
    return True


@contextlib.contextmanager
def staging_folder(output):
    """A folder to write into; its files take their place in `output` only when everything went well."""
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=output))
    except OSError as problem:
        why = f"cannot write to {output} ({problem.strerror})"
        raise InputError(f"{why}; name a folder you may write to (commands: with --output)") from None
    try:
        with _claimed(folder):
            yield folder
            for file in sorted(folder.iterdir()):  # run.json, null.safetensors last: they say that all is there
                place = output / file.name
                if file.is_dir() and place.is_dir():  # of a killed run; a folder replaces none that is full
                    os.replace(place, Path(tempfile.mkdtemp(dir=folder, prefix="old-")))
                os.replace(file, place)
    except OSError as problem:
        why = f"cannot write {problem.filename2 or problem.filename or output} ({problem.strerror})"
        raise InputError(f"{why}; make room and run the same again, or name another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder):
    """Remove what killed processes left unfinished in a folder; what a living one is still writing stays."""
    for left in Path(folder).glob(f"{UNFINISHED}*"):
        with _claimed(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _claimed(folder):
    """Whether nobody else is writing into an unfinished folder, and nobody sweeps it as long as this lasts."""
    try:
        number = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError:  # gone meanwhile
        number = None
    try:
        yield number is None or _locked(number)
    finally:
        if number is not None:
            os.close(number)


@contextlib.contextmanager
def new_folder(folder):
    """A folder to write into that becomes `folder`, new or empty until then, only when everything went well."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; expected a new one: name another")
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
        inside = unfinished / folder.name
        inside.mkdir()
        mode = inside.stat().st_mode & 0o666
        with _claimed(unfinished):
            yield inside
            for file in inside.rglob("*.safetensors"):  # written for their owner alone; make them as the rest is
                file.chmod(mode)
            if folder.exists():
                folder.rmdir()
            inside.rename(folder)
    except OSError as problem:
        raise InputError(f"cannot write {folder} ({problem.strerror}); name a folder you may write to") from None
    finally:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
