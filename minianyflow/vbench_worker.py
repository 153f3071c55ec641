"""What runs inside the Python that has the `vbench` package: it needs that and torch, and nothing of ours.

VBench 0.1.5 pins numpy < 2 and transformers 4.33, which nothing else here runs with; so it has an environment of its
own, and vbench_scores.py starts this file there. Says what it found, or the scores, as one line of JSON, the last.
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


def scores(job):
    """{dimension: score} of the folder `videos`; VBench's own files go to `output`."""
    import torch
    from vbench import VBench

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    listed = Path(sys.modules["vbench"].__file__).parent / "VBench_full_info.json"
    bench, name = VBench(device, str(listed), job["output"]), job["name"]
    options = {"prompt_list": job["prompts"], "mode": "custom_input"} if job["prompts"] else {}
    bench.evaluate(job["videos"], name, dimension_list=job["dimensions"], local=True, **options)
    results = json.loads((Path(job["output"]) / f"{name}_eval_results.json").read_text())
    return {dimension: float(result[0]) for dimension, result in results.items()}


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    print(f"\n{json.dumps(scores(asked) if 'videos' in asked else found(asked['dimensions']))}")
