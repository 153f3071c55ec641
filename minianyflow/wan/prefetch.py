"""Prefetch: the next batch is drawn in a thread while training uses the current one; and how long training waited."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor


def prefetch(draw, steps, waits=None):
    """`draw(step)`, with the batch of the next step, below `steps`, drawn in a thread.

    A batch must depend on its step alone; an error of `draw` is raised when that batch is needed.
    waits: a list that gets, per step, (seconds waited for its batch, seconds until the next batch was needed).
    The first step is left out, since every run waits for it, and the last, whose end is not seen.
    """
    pool, waiting, last = ThreadPoolExecutor(1, "draw"), {}, []

    def drawn(step):
        start, first = time.perf_counter(), step not in waiting
        batch = waiting.pop(step, None) or pool.submit(draw, step)
        if step + 1 < steps:
            waiting[step + 1] = pool.submit(draw, step + 1)
        result = batch.result()
        if last and waits is not None:
            before, waited = last.pop()
            waits.append((waited, start - before))
        last[:] = [] if first else [(start, time.perf_counter() - start)]
        return result

    return drawn


def waiting_share(waits):
    """The share of a step's time that is waiting for data: {"steps", "median" over steps, "all": of all steps}."""
    if not waits:
        return None
    shares = [waited / seconds for waited, seconds in waits]
    waited, seconds = map(sum, zip(*waits, strict=True))
    return {"steps": len(waits), "median": statistics.median(shares), "all": waited / seconds}
