"""The site: every page from a file and from http, wide and narrow, light and dark; no dead link."""

import functools
import http.server
import re
import threading
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from playwright.sync_api import sync_playwright

from benchmarks.browser import watched
from docs import site
from minianyflow.live.pages import chromium
from minianyflow.support.install import ROOT

# What a page links to, with the ids it has; pictures without words; how wide it is.
READ = """() => ({
  links: [...document.querySelectorAll("a, iframe, img, link, script")].map((part) => part.href || part.src || ""),
  ids: [...document.querySelectorAll("[id], a[name]")].map((part) => part.id || part.name),
  dumb: [...document.images].filter((image) => image.alt.trim().length < 4).map((image) => image.src),
  names: [...document.querySelectorAll("iframe")].filter((frame) => !frame.title).length,
  wide: document.documentElement.scrollWidth - innerWidth,
})"""


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


@pytest.mark.long
def test_every_page_is_whole_everywhere(tmp_path):
    pytest.importorskip("myst_nb")
    folder = site.build(tmp_path / "site", quiet=True).parent.resolve()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *words: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ids, links = {}, set()
    with sync_playwright() as playwright, chromium(playwright) as browser:
        for root in (folder.as_uri(), f"http://127.0.0.1:{server.server_port}"):
            for width in (1400, 390):
                with watched(browser, {"width": width, "height": 900}) as page:
                    for name in names:
                        page.goto(f"{root}/{name}")
                        for theme in ("light", "dark"):
                            page.emulate_media(color_scheme=theme)
                            read = page.evaluate(READ)
                            assert read["wide"] <= 0, (name, width, theme)
                        assert not read["dumb"], name
                        assert not read["names"], name
                        ids[name] = set(read["ids"])
                        links |= {(name, link) for link in read["links"] if link.startswith(root)}
                        assert page.complaints == [], name
                    assert page.blocked == []
    server.shutdown()
    for name, link in sorted(links):
        address, place = urldefrag(link)
        path = unquote(urlparse(address).path).removeprefix(str(folder)).lstrip("/")
        path = path + "index.html" if path.endswith("/") or not path else path
        assert (folder / path).is_file(), (name, link)
        assert not place or path not in ids or unquote(place) in ids[path], (name, link)
