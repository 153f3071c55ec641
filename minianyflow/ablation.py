"""What limits the mixed flow map on the plane, and what moves it: one change at a time, all else as in the demo."""

import json
from dataclasses import replace

from minianyflow.demo import BUDGET, check, exact_flow, in_report, run_method
from minianyflow.running import run_jobs, staged
from toy_data import plane

# Factors on the budget, and settings of the flow-map loss or of the pairs drawn.
CHANGES = {
    "as in the demo": ({}, {}),
    "twice the steps": ({"steps": 2}, {}),
    "half the steps": ({"steps": 1 / 2}, {}),
    "twice the width": ({"width": 2}, {}),
    "half the width": ({"width": 1 / 2}, {}),
    "two layers": ({"depth": 1 / 2}, {}),
    "lr / 3": ({"lr": 1 / 3}, {}),
    "squares": ({}, {"adaptive": 0.0}),
    "1/4 on r = t": ({}, {"diagonal": 0.25, "end": 0.375}),
    "3/4 on r = t": ({}, {"diagonal": 0.75, "end": 0.125}),
    "none at r = 0": ({}, {"end": 0.0}),
    "exact derivative": ({}, {"derivative": "jvp"}),
    "data velocity": ({}, {"velocity": None, "adaptive": 0.0}),
}


def run(dataset="spiral", seeds=(0, 1, 2), budget=BUDGET, output="outputs/ablation", workers=2, quiet=False):
    """Train the mixed flow map once for each of CHANGES; writes `ablation.json`, in the form of the demo's."""
    plane.load(dataset)
    check(seeds, budget)
    with staged(output) as folder:
        jobs = {"exact": (exact_flow, (dataset,))}
        for name, (factors, changes) in CHANGES.items():
            changed = {
                key: type(getattr(budget, key))(getattr(budget, key) * factor) for key, factor in factors.items()
            }
            jobs[name] = (run_method, ("mixed", dataset, tuple(seeds), replace(budget, **changed), changes, quiet))
        results = run_jobs(jobs, workers)
        ends = results.pop("exact")[0]
        methods = {name: in_report(result, seeds, ends) for name, result in results.items()}
        report = {"dataset": dataset, "seeds": list(seeds), "methods": methods}
        (folder / "ablation.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
