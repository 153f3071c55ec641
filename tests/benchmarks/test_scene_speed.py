"""The table of how quickly scenes answer; its measuring is driven by hand: `python -m benchmarks.scene_speed`."""

import pytest

from benchmarks import scene_speed
from minianyflow.support.errors import InputError


def test_the_table_says_which_bar_is_missed():
    figures = {name: [bar] for name, (_, _, _, bar) in scene_speed.BARS.items()}
    assert scene_speed.missed(figures) == []
    figures |= {"scrub": [29, 10, 31], "drag": [20, 10, 15], "page": [2.1, 7]}
    assert scene_speed.missed(figures) == ["scrub", "page"]
    lines = scene_speed.table(figures).splitlines()
    assert [line for line in lines if "MISSED" in line] == [
        lines[1 + list(scene_speed.BARS).index(name)] for name in ("scrub", "page")
    ]
    with pytest.raises(InputError, match="at least 1"):
        scene_speed.run(repeats=0)
