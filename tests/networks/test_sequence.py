"""Which numbers of processes can share the tokens of a clip; test_processes.py trains with two that do."""

import pytest

from minianyflow.networks.sequence import check_tokens
from tests.refused import refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((8, 12, 1560), "sequence_parallel=8 with 12 heads; expected one of 2, 3, 4, 6, 12"),
        ((4, 40, 1560, 390), "sequence_parallel=4 with 390 tokens per coarse frame; expected one of 2, 5, 10"),
        ((2, 3, 7), "sequence_parallel=2 with 3 heads; expected 1: no other number fits"),
    ],
)
def test_what_does_not_divide_is_one_line_that_names_what_does(given, message):
    with refused(message):
        check_tokens(*given)


def test_what_divides_passes():
    check_tokens(2, 12, 1560, 390)
