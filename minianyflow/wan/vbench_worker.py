"""What runs inside the Python that has the `vbench` package: it needs that and torch, and nothing of ours.

VBench 0.1.5 pins numpy < 2 and transformers 4.33, which nothing else here runs with; so it has an environment of its
own, and vbench_scores.py starts this file there. It says what it found, or the scores of each folder,
as a line of JSON after `answer: `.
"""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path


def found(dimensions):
    """{"package": its folder or None, "cache": where it keeps models, "broken": {dimension: why it does not load}}."""
    spec = importlib.util.find_spec("vbench")
    cache = os.environ.get("VBENCH_CACHE_DIR") or Path("~/.cache/vbench").expanduser()  # as vbench.utils has it
    broken = {}
    for dimension in dimensions if spec else ():
        try:
            importlib.import_module(f"vbench.{dimension}")
        except Exception as problem:  # a package that is missing, or one that does not fit another
            broken[dimension] = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return {"package": str(Path(spec.origin).parent) if spec else None, "cache": str(cache), "broken": broken}


def scores(asked):
    """{dimension: score} of the folder `videos` of each job; VBench's own files go to its `output`."""
    import torch
    from vbench import VBench

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    listed = Path(sys.modules["vbench"].__file__).parent / "VBench_full_info.json"
    options = {"prompt_list": asked["prompts"], "mode": "custom_input"} if asked["prompts"] else {}
    for job in asked["jobs"]:
        bench = VBench(device, str(listed), job["output"])
        bench.evaluate(job["videos"], "vbench", dimension_list=asked["dimensions"], local=True, **options)
        results = json.loads((Path(job["output"]) / "vbench_eval_results.json").read_text())
        yield {dimension: float(result[0]) for dimension, result in results.items()}


if __name__ == "__main__":
    question = json.loads(sys.stdin.read())
    for each in scores(question) if "jobs" in question else [found(question["dimensions"])]:
        print(f"\nanswer: {json.dumps(each)}", flush=True)
