"""Not part of the wheel: comparisons, timings, and the tables of the docs, written from what they measured."""
