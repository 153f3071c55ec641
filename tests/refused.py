"""The contract of bad input: an InputError of one line."""

from contextlib import contextmanager

import pytest
from jaxtyping import config

from minianyflow.support.errors import InputError


@contextmanager
def refused(words):
    """The block raises InputError, in one line that `words` (a regular expression) matches; types are not checked."""
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(InputError, match=words) as problem:
            yield
    finally:
        config.update("jaxtyping_disable", False)
    assert "\n" not in str(problem.value)
