"""Comparisons and timings, not part of the wheel: other libraries, how quickly scenes answer, other transformers."""
