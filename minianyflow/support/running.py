"""Running long jobs: side by side in processes of their own, and results that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
import signal
import statistics
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path

from tqdm import tqdm

from minianyflow.support.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK, UNFINISHED = ".lock", ".unfinished-"


def run_jobs(jobs, workers=2, after=None):
    """The results of `jobs`, {name: (function, arguments)}, by name; at most `workers` of them run at a time.

    They start in the order given: put the longest first. after: {name: a job that must be done before}. Each gets its
    `position` among the progress bars as a last argument. An error or Ctrl-C stops them all.
    """
    if workers < 1:
        raise InputError(f"{workers} workers; expected at least 1")
    context, others, after = get_context("spawn"), set(active_children()), after or {}
    places = {name: position for position, name in enumerate(jobs)}
    waiting, running, results = dict(jobs), {}, {}
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(context.RLock(),)) as pool:
        try:
            while waiting or running:
                ready = [name for name in waiting if name not in after or after[name] in results]
                for name in ready[: workers - len(running)]:
                    function, arguments = waiting.pop(name)
                    running[pool.submit(function, *arguments, places[name])] = name
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running.pop(job)] = job.result()
        except BrokenProcessPool:
            raise InputError("a process was killed, perhaps for want of memory; try again with --workers 1") from None
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise
    return {name: results[name] for name in jobs}


def _start_worker(lock):
    """One lock for all progress bars; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(lock)


def ahead(draw, steps, waits=None):
    """`draw(step)` whose next batch, up to `steps`, is drawn in a thread while this one is worked on.

    What is drawn must depend on the step alone; an error is raised when its batch is asked for.
    waits: a list that gets (seconds waited for its batch, seconds until the next was asked for) of each step, once the
    next begins; for the first batch every run waits, and it is left out.
    """
    pool, waiting, last = ThreadPoolExecutor(1, "draw"), {}, []

    def drawn(step):
        asked, begun = time.perf_counter(), step not in waiting
        batch = waiting.pop(step, None) or pool.submit(draw, step)
        if step + 1 < steps:
            waiting[step + 1] = pool.submit(draw, step + 1)
        result = batch.result()
        if last and waits is not None:
            start, waited = last.pop()
            waits.append((waited, asked - start))
        last[:] = [] if begun else [(asked, time.perf_counter() - asked)]
        return result

    return drawn


def share_waited(waits):
    """Of the steps of `ahead`, the share that was waiting for data: {"median": of a step, "all": of them together}."""
    if not waits:
        return None
    shares = [waited / seconds for waited, seconds in waits]
    waited, seconds = map(sum, zip(*waits, strict=True))
    return {"steps": len(waits), "median": statistics.median(shares), "all": waited / seconds}


def hold(folder):
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
def staged(output):
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


def sweep(folder):
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
def whole_folder(folder):
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
