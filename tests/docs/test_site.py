"""The site: every page from a file and from http, wide and narrow, light and dark; no dead link."""

import functools
import io
import re

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.browser import page_faults
from docs import site, slides
from minianyflow.live.pages import chromium
from minianyflow.live.scenes import SCENES
from minianyflow.support.install import ROOT


def test_links_lead_to_pages_and_lines():
    pages = {"docs/plane.md": None, "notebooks/exercises/00_the_claim.py": None}
    link = functools.partial(site.linked, folder=ROOT / "docs", pages=pages)
    assert link("[words](plane.md#a) [other](https://x.y)") == "[words](plane.md#a) [other](https://x.y)"
    assert link("[licence](../LICENSE)") == "licence"
    assert link("[three](../notebooks/exercises/00_the_claim.py)") == "[three](../notebooks/exercises/00_the_claim.md)"
    address, line = link("[`rollout`](../minianyflow/flow_map.py)").split('"')[1].split("#L-")
    assert address == "../code/minianyflow/flow_map.py.html"
    assert (ROOT / "minianyflow/flow_map.py").read_text().splitlines()[int(line) - 1].startswith("def rollout")
    for equation in (ROOT / "docs/equations.md").read_text().split("](../")[1:]:
        name = equation.split(".py)")[0]
        assert (ROOT / f"{name}.py").exists()
    unresolved = [line for line in link((ROOT / "docs/equations.md").read_text()).splitlines() if '.py.html"' in line]
    assert unresolved == []  # every symbol has its line


def test_references_hold_what_the_citation_names():
    named, listed = (
        set(re.findall(r"\d{4}\.\d{5}", (ROOT / name).read_text())) for name in ("CITATION.cff", "docs/references.md")
    )
    assert named <= listed


def test_a_figure_is_described_by_its_section_its_titles_and_what_follows():
    words = site.alternative(
        "Two curves", 'axes.set_title("path error")\naxes.plot(x, label="Euler")', "It *falls*. More."
    )
    assert words == "Two curves. path error; Euler. It falls."


def test_the_slides_are_the_90_minutes_of_the_plan():
    text, plan = slides.deck(), (ROOT / "notebooks/INSTRUCTOR.md").read_text().partition("**In 90 minutes")[2]
    rows = slides._rows(plan)
    assert [int(start) for start, *_ in rows] == [sum(int(row[1]) for row in rows[:k]) for k in range(len(rows))]
    assert sum(int(minutes) for _, minutes, *_ in rows) == 90
    assert text.count("<section") == 1 + len(rows)
    places = re.findall(r"\]\((\w+)\.ipynb#([\w-]+)\)", " ".join(row[2] for row in rows))
    assert [place for place in places if not slides.figures(*place)] == []  # every section is there, with its figures
    shown = [name for name in SCENES if f'src="scenes/{name}.html"' in text]
    assert len(shown) == sum("Scene" in row[2] for row in rows) == 4
    assert min(map(len, re.findall(r'alt="([^"]*)"', text))) > 20
    assert not re.search(r'(?:src|href)="https?:', text)


def test_diagrams_turn_dark_and_clips_do_not():
    paper, clip = (Image.new("L", (9, 9), shade) for shade in (255, 30))
    for picture, drawn in ((paper, True), (clip, False)):
        file = io.BytesIO()
        picture.save(file, "png")
        assert site.on_paper(file.getvalue()) == drawn


@pytest.mark.long
def test_every_page_is_whole_everywhere(tmp_path):
    pytest.importorskip("myst_nb")
    folder = site.build(tmp_path / "site", quiet=True).parent.resolve()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6
    with sync_playwright() as playwright, chromium(playwright) as browser:
        seen, faults = page_faults(browser, folder)
    assert faults == []
    assert seen > 8 * 50  # a file and http, two widths, two themes
