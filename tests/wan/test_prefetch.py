"""Prefetch: the next batch is drawn early, and the share of time that waits for data is right."""

import threading
from types import SimpleNamespace

from minianyflow.support.errors import InputError
from minianyflow.wan import prefetch as module
from minianyflow.wan.prefetch import prefetch, waiting_share
from tests.refused import refused


def test_the_next_batch_is_drawn_while_training_uses_this_one():
    drawn, early, main = [], threading.Event(), threading.get_ident()

    def draw(step):
        assert threading.get_ident() != main
        drawn.append(step)
        if step == 5:
            early.set()
        if step == 7:
            raise InputError("step 7 is broken")
        return step * 10

    batch = prefetch(draw, 9)
    assert batch(4) == 40
    assert early.wait(10)  # nobody has asked for batch 5
    assert [batch(5), batch(6)] == [50, 60]
    with refused("step 7"):
        batch(7)
    assert batch(8) == 80
    assert drawn == [4, 5, 6, 7, 8]  # once per step, and none beyond the end


def test_the_share_of_a_step_that_waits_for_data(monkeypatch):
    """Every batch is waited for during one second of a clock that this test sets; training takes three."""
    clock = SimpleNamespace(now=0)

    def submit(draw, step):
        return SimpleNamespace(result=lambda: setattr(clock, "now", clock.now + 1) or draw(step))

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda *_: SimpleNamespace(submit=submit))
    waits = []
    batch = prefetch(lambda step: step, 10, waits)
    for step in range(3, 10):
        assert batch(step) == step
        clock.now += 3
    assert waits == [(1, 4)] * 5  # without the first and the last step
    assert waiting_share(waits) == {"steps": 5, "median": 0.25, "all": 0.25}
    assert waiting_share([(1, 4), (0, 2), (0, 4)]) == {"steps": 3, "median": 0, "all": 0.1}
    assert waiting_share([]) is None
