"""The 90 minutes of notebooks/INSTRUCTOR.md as slides: a page of the site, from its plan, scenes and saved figures."""

import html
import json
import re
from string import Template

from minianyflow.live.scenes import SCENES
from minianyflow.support.install import ROOT

PAGE = Template((ROOT / "docs/class.html").read_text("utf-8"))


def deck() -> str:
    """The text of the page: a slide per row of the plan, with its prediction above what answers it."""
    text = (ROOT / "notebooks/INSTRUCTOR.md").read_text("utf-8")
    title = "<section><h1>One network, any number of steps</h1><p>90 minutes. Arrow keys turn the slides.</p></section>"
    slides = [title]
    for start, minutes, what, ask in _rows(text.partition("**In 90 minutes")[2]):
        body = "".join(_scene(text, int(number)) for number in re.findall(r"Scene (\d)", what))
        body += "".join(figures(*place) for place in re.findall(r"\]\((\w+)\.ipynb#([\w-]+)\)", what))
        head = f"<header>minute {start} to {int(start) + int(minutes)}</header><h2>{_inline(what)}</h2>"
        slides.append(f'<section>{head}<p class="ask">{_inline(ask)}</p>{body}</section>')
    return PAGE.substitute(slides="\n".join(slides))


def figures(notebook: str, section: str) -> str:
    """The saved figures of one section of a notebook, folded."""
    here, images, words = "", [], ""
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text("utf-8"))["cells"]
    for k, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            heading = next((line.strip("# \n") for line in reversed(cell["source"]) if line.startswith("#")), "")
            here = slug(heading) if heading else here
            words = heading if here == section and heading else words
        elif here == section:
            after = next(("".join(other["source"]) for other in cells[k:] if other["cell_type"] == "markdown"), "")
            for output in (output for output in cell["outputs"] if "image/png" in output.get("data", {})):
                alt = html.escape(alternative(words, "".join(cell["source"]), after, output))
                data = "".join(output["data"]["image/png"]).strip()
                images.append(f'<img alt="{alt}" loading="lazy" src="data:image/png;base64,{data}">')
    return f"<details><summary>{words}</summary>{''.join(images)}</details>" if images else ""


def alternative(heading: str, code: str, after: str, output: dict | None = None) -> str:
    """What a figure shows, in words: its section, its titles and labels, the first sentence after it.

    output: the saved one, which has its titles as they were drawn; those in the code may be made of figures.
    """
    saved = (output or {}).get("metadata", {}).get("image/png", {}).get("alt", "")
    named = [saved] * bool(saved) + re.findall(
        r"(?:set_title|suptitle|set_[xy]?label|label=|title=)\(?\s*f?[\"']([^\"'{}]+)[\"']", code
    )
    plain = re.sub(r"^#.*$|[*`$_]|<summary>.*</summary>|<[^>]*>", "", after, flags=re.M)
    first = re.split(r"(?<=[.:?!])\s", plain.strip())[0]
    parts = [heading.strip("# "), "; ".join(dict.fromkeys(named)), "" if first.startswith("Predict") else first]
    return re.sub(r"\s+", " ", ". ".join(part.strip(" .:") for part in parts if part)).replace('"', "'") + "."


def slug(heading: str) -> str:
    """The name of a heading in links, as Markdown readers make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def _scene(text, number):
    """A scene, and what to ask about it, with the answers folded."""
    name, (_, _, title) = list(SCENES.items())[number - 1]
    about = re.split(r"^### ", text, flags=re.M)[number]
    asks = "".join(
        f"<details><summary>{_inline(ask)} <small>({_inline(then)})</small></summary><p>{_inline(seen)}</p></details>"
        for ask, then, seen in _rows(about)
    )
    return f'<iframe src="scenes/{name}.html" title="{title}" loading="lazy"></iframe>{asks}'


def _rows(text):
    """The cells of all rows of the first table in a text, without its head."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _inline(words):
    """Markdown within a line as HTML; links lead into the site."""
    from markdown_it import MarkdownIt

    for old, new in (
        (r"\]\(([\w/]+)\.(?:ipynb|py)", r"](notebooks/\1.html"),
        (r"\]\(#", "](notebooks/INSTRUCTOR.html#"),
        (r"\]\(\.\./(docs/\w+)\.md", r"](\1.html"),
    ):
        words = re.sub(old, new, words)
    return MarkdownIt().renderInline(words)
