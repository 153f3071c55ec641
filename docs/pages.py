"""Tables in the pages, made from the committed reports. A page has `<!-- table NAME -->`, the table, `<!-- end -->`."""

import json
import re
from functools import partial, reduce
from importlib import import_module
from itertools import product
from operator import getitem

from minianyflow.support.cli import Parser
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT

MARKED = re.compile(r"<!-- table (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def table(function: str, report: str | None = None, *keys: str) -> str:
    """What "module:name" makes of report[key][key]... in docs/, or of nothing."""
    module, name = function.split(":")
    arguments = [reduce(getitem, keys, json.loads((ROOT / "docs" / report).read_text("utf-8")))] if report else []
    return getattr(import_module(module), name)(*arguments)


def _peers(report, *targets):
    """Two tables for each target of a comparison with other libraries."""
    made_by = {"": "benchmarks.peers:table", "_ratios": "benchmarks.peers:ratio_table"}
    return {name + end: (made_by[end], report, "targets", name) for name, end in product(targets, made_by)}


_TABLES, _VIDEO = "docs.tables:", "video/any_step.json"
TABLES = {  # {page: {name: arguments of `table`}}
    "README.md": {"any_step": (_TABLES + "text_block", "plane/any_step.json")},
    "docs/plane.md": {
        "ablation": (_TABLES + "text_block", "plane/ablation.json"),
        "fresh": (_TABLES + "text_block", "plane/fresh.json"),
        "fresh_path": (_TABLES + "path_block", "plane/fresh.json"),
    },
    "docs/video.md": {
        "any_step": (_TABLES + "video_table", _VIDEO),
        "motion": (_TABLES + "video_motion", "video/motion.json"),
        "draws": (_TABLES + "video_draws", "video/motion.json", "draws"),
        "tries": ("benchmarks.motion:table", "video/motion_tries.json"),
        "costs": (_TABLES + "video_costs", _VIDEO),
        "causal": (_TABLES + "video_causal", _VIDEO),
        "exposure": (_TABLES + "exposure_table", "video/exposure.json"),
        "exposure_map": (_TABLES + "exposure_map_table", "video/exposure_map.json"),
        "exposure_long": (_TABLES + "exposure_long_table", "video/exposure.json"),
        "padding": (_TABLES + "video_padding", _VIDEO),
        "stream": ("benchmarks.stream:table", "video/stream.json"),
    },
    "docs/wan.md": {
        "evaluations": (_TABLES + "evaluations_per_sample",),
        "choices": ("benchmarks.published:table", "wan/choices.json"),
    },
    "docs/evaluation.md": {"evaluation": (_TABLES + "evaluation",)},
    "docs/healthy.md": {"healthy": ("benchmarks.healthy:table", "healthy/healthy.json")},
    "docs/plan.md": {
        "bill": ("minianyflow.planner.report:bill_table", "plan/plans.json"),
        "plan": ("minianyflow.planner.report:stage_table", "plan/plans.json"),
        "stream": ("minianyflow.planner.stream:table", "plan/stream.json"),
    },
    "docs/peers.md": _peers("peers/peers.json", "spiral") | _peers("peers/others.json", "ring8", "checkerboard"),
}


def docs(argv):
    """Write the tables of README.md and docs/ from the committed reports; --check only compares."""
    parser = Parser("minianyflow docs", description=docs.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not current")
    check = parser.parse_args(argv).check
    stale = write(check)
    print("\n".join(f"{page}: {'not current' if check else 'written'}" for page in stale) or "all tables are current")
    return int(check and bool(stale))


def write(check: bool = False) -> list[str]:
    """Write the tables of all pages (check: of none); returns those not current. InputError if one lacks some."""
    stale = []
    for page, tables in TABLES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        found = MARKED.findall(text)
        if sorted(found) != sorted(tables):
            raise InputError(f"{page} has the tables {found}; expected each of {list(tables)} once, with an end mark")
        current = MARKED.sub(partial(_marked, tables), text)
        if current != text:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(current, encoding="utf-8")
    return stale


def _marked(tables, match):
    return f"<!-- table {match[1]} -->\n{table(*tables[match[1]])}\n<!-- end -->"
