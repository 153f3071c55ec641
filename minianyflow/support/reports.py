"""Any-step reports: the JSON that experiments write, and its tables.

A report is {"methods": {name: {"nfe": [...], measure: [[value per step count] per seed], ...}}, ...}.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev


def rounded(value, digits: int = 6):
    """Numbers and tensors inside dicts and lists to `digits` places, and NaN to None, as JSON can hold them."""
    if hasattr(value, "tolist"):
        return rounded(value.tolist(), digits)
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry, digits) for entry in value]
    return (round(value, digits) if math.isfinite(value) else None) if isinstance(value, float) else value


def write_report(report: dict, path: Path) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def mean(values) -> float:
    """The mean of some numbers."""
    values = list(values)
    return sum(values) / len(values)


def seed_means(by_seed: list[list[float]]) -> list[float]:
    """The mean over the seeds, per step count."""
    return [mean(column) for column in zip(*by_seed, strict=True)]


def text_table(report: dict, measure: str = "sliced_w2") -> str:
    """One measure as text, times 1000: a row per method, a column per step count, mean over seeds (and their range).

    Floors below, (with their deviation): {"floors": {name: {measure: its readings}}}.
    """
    methods = report["methods"]
    nfe = next(iter(methods.values()))["nfe"]
    rows = {f"{measure} x 1000": nfe}
    for name, method in methods.items():
        for label, key in ((name, measure), (f"{name}, pooled", f"{measure}_pooled")):
            if key in method:
                rows[label] = [spread(values, max(values) - min(values)) for values in zip(*method[key], strict=True)]
    for name, floor in report.get("floors", {}).items():
        if measure in floor:
            values = floor[measure] if isinstance(floor[measure], list) else [floor[measure]]
            rows[name] = [spread(values, stdev(values) if len(values) > 1 else 0.0)]
    width, column = max(26, 2 + max(map(len, rows))), 2 + max(max(map(len, map(str, row))) for row in rows.values())
    return "\n".join(label.ljust(width) + "".join(f"{cell:>{column}}" for cell in row) for label, row in rows.items())


def spread(values: Sequence[float], width: float) -> str:
    """The mean of some values, times 1000, and their range or deviation in brackets; of a single one itself."""
    return f"{1000 * mean(values):.1f}" + (f" ({1000 * width:.1f})" if len(values) > 1 else "")


def markdown_table(header: list, rows: list[list]) -> str:
    """A Markdown table; cells are written as they are."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
