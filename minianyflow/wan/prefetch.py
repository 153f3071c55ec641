"""The next batch is drawn while the current one is trained on, and how long training waited for data."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor


def prefetch(draw, steps, waits=None):
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


def waiting_share(waits):
    """Of the steps of `prefetch`, the share that was waiting for data: {"median": of a step, "all": of all steps}."""
    if not waits:
        return None
    shares = [waited / seconds for waited, seconds in waits]
    waited, seconds = map(sum, zip(*waits, strict=True))
    return {"steps": len(waits), "median": statistics.median(shares), "all": waited / seconds}
