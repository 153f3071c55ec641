"""Any-step reports: the JSON that experiments write, and its tables.

A report is {"methods": {name: {"nfe": [...], measure: [[value per step count] per seed], ...}}, ...}.
"""

import json
import math
from pathlib import Path


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
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def mean(values) -> float:
    """The mean of some numbers."""
    values = list(values)
    return sum(values) / len(values)


def seed_means(by_seed: list[list[float]]) -> list[float]:
    """The mean over the seeds, per step count."""
    return [mean(column) for column in zip(*by_seed, strict=True)]


def text_table(report: dict, measure: str = "sliced_w2") -> str:
    """One measure as text: a row per method, a column per step count; mean over seeds, times 1000; floors below."""
    methods = report["methods"]
    width = max(26, 10 + max(map(len, methods)))
    nfe = next(iter(methods.values()))["nfe"]
    rows = {f"{measure} x 1000": "".join(f"{steps:>8}" for steps in nfe)}
    for name, method in methods.items():
        for label, key in ((name, measure), (f"{name}, pooled", f"{measure}_pooled")):
            if key in method:
                rows[label] = "".join(f"{1000 * value:>8.1f}" for value in seed_means(method[key]))
    rows |= {name: f"{1000 * floor[measure]:>8.1f}" for name, floor in report.get("floors", {}).items()}
    return "\n".join(label.ljust(width) + figures for label, figures in rows.items())


def markdown_table(header: list, rows: list[list]) -> str:
    """A Markdown table; cells are written as they are."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
