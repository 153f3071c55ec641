"""Any-step reports: the JSON that experiments write, and its tables."""

import math


def rounded(value):
    """Numbers to six places, NaN to None, all the way down: what JSON can hold and people can read."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return (round(value, 6) if math.isfinite(value) else None) if isinstance(value, float) else value
