"""The table of how quickly scenes answer; its measuring is driven by hand: `python -m benchmarks.scene_speed`."""

import pytest

from benchmarks import scene_speed
from minianyflow.support.errors import InputError


def test_the_table_says_which_bar_is_missed():
    figures = {"scrub": [29, 10, 31], "control": [200, 100, 149], "notebook": [3.0], "live": [6.1, 7]}
    assert scene_speed.missed(figures) == ["scrub", "live"]
    lines = scene_speed.table(figures).splitlines()
    assert ["MISSED" in line for line in lines] == [False, True, False, False, True, False]
    assert "150" in lines[2]
    with pytest.raises(InputError, match="at least 1"):
        scene_speed.run(repeats=0)
