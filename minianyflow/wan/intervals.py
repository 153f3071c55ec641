"""Intervals of a run: so many steps, or so much time, as a step takes seconds or minutes."""

import re
import time

UNITS = {"s": 1, "min": 60, "h": 3600}
WORDS = "a number of steps, or a time like '30 min', '90 s' or '2 h'"


def seconds_of(text: str) -> float:
    """The seconds of a time like '30 min'. Raises ValueError for what is none."""
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*(s|min|h)\s*", text)
    if not match or not float(match[1]):
        raise ValueError(f"it should be {WORDS}")
    return float(match[1]) * UNITS[match[2]]


class Every:
    """Says when something is due: after every `interval` steps (0: never), or where so much time has passed."""

    def __init__(self, interval: int | str):
        self.steps = interval if isinstance(interval, int) else 0
        self.seconds = None if isinstance(interval, int) else seconds_of(interval)
        self.last = time.monotonic()

    def due(self, done: int) -> bool:
        """Whether it is due after `done` steps. Processes have clocks of their own: ask the main one."""
        if self.seconds is None:
            return bool(self.steps) and done % self.steps == 0
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
