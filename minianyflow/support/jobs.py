"""Long jobs in parallel, each in its own process."""

import contextlib
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process

from tqdm import tqdm

from minianyflow.support.errors import InputError


def run_jobs(jobs, workers=2, after=None):
    """The results of `jobs`, {name: (function, arguments)}, by name; at most `workers` of them run at a time.

    They start in the given order: put the longest first. after: {name: the job that must end before it starts}. The
    last argument of a function is its `position` among the progress bars. An error or Ctrl-C stops all jobs.
    """
    if workers < 1:
        raise InputError(f"{workers} workers; expected at least 1")
    context, others, after = get_context("spawn"), set(active_children()), after or {}
    positions = {name: position for position, name in enumerate(jobs)}
    waiting, running, results = dict(jobs), {}, {}
    with ProcessPoolExecutor(
        min(workers, max(1, len(jobs))), context, initializer=_start_worker, initargs=(context.RLock(),)
    ) as pool:
        try:
            while waiting or running:
                ready = [name for name in waiting if name not in after or after[name] in results]
                for name in ready[: workers - len(running)]:
                    function, arguments = waiting.pop(name)
                    with _held_back():
                        running[pool.submit(function, *arguments, positions[name])] = name
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running.pop(job)] = job.result()
        except BrokenProcessPool:
            raise InputError("a process was killed, perhaps for want of memory; try again with one worker") from None
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise
    return {name: results[name] for name in jobs}


@contextlib.contextmanager
def _held_back():
    """Ctrl-C waits for the end of this context; a process that is started in it never gets one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(lock):
    """Share one lock of all progress bars, leave Ctrl-C to the parent process, and end when that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(lock)


def _end_with_parent():
    parent_process().join()
    os._exit(1)
