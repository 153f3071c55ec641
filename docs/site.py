"""The course as a site: notebooks, exercises, docs and code in one folder that any host or a USB stick serves, offline.

Sphinx with myst-nb builds it from the saved notebooks; formulas become MathML, which browsers draw without a script.
"""

import base64
import html
import json
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from docs.slides import alternative, deck
from minianyflow.live.pages import write_pages
from minianyflow.live.player import STATIC
from minianyflow.live.scenes import SCENES
from minianyflow.support.cli import Parser
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder
from minianyflow.support.install import ROOT

DOCS = (
    "map",
    "equations",
    "conventions",
    "references",
    "plane",
    "video",
    "wan",
    "first-week",
    "healthy",
    "scope",
    "evaluation",
    "plan",
    "scaling",
    "gpu",
)
DOCS = (*DOCS, "peers", "backbones")
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FRAME = '<iframe class="scene" src="{up}scenes/{name}.html" title="{title}" loading="lazy" height="640"></iframe>'

FIRST = """# One network, any number of steps

The same 1000 noises, four ways to data. **Predict** first: with one, two, four, 64 *steps*, which panels are right, and
which large dots end where the thick grey path ends? Then play, move *steps*, drag a ring: it is a noise.

{frame}

<details><summary>When you have played it</summary>

**Euler** walks along the velocity: far off with few steps, right with many. The **flow map** jumps along the exact
path: near with one step, nearer with more. The **consistency** map is near with one step, too; for more it adds fresh
noise and jumps again, so its samples stay good (sliced W2), and its dots leave their paths (path error). *A flow map
goes on; a consistency map starts over.*

</details>

Go on: [draw a target and watch it learn](scenes.md#draw-and-learn) · [ten minutes](notebooks/ten_minutes.ipynb) ·
[the course](notebooks/course.md) · teaching: <a href="class.html">90 minutes of slides</a>

"""


def site(argv: list[str]) -> int:
    """Build the course as a site, offline: one folder for any static host or a USB stick."""
    parser = Parser("minianyflow site", description=site.__doc__)
    parser.add_argument("--output", default="outputs/site", help="its folder (default: outputs/site)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    first = build(arguments.output, arguments.quiet)
    size = sum(path.stat().st_size for path in first.parent.rglob("*") if path.is_file())
    print(f"written: {first}, {size / 1e6:.1f} MB in all")
    return 0


def build(output="outputs/site", quiet: bool = False) -> Path:
    """Write the site into the folder `output`, all of it or nothing; returns its first page."""
    try:
        from sphinx.application import Sphinx
    except ModuleNotFoundError as missing:
        raise InputError(
            f"{missing.name} is missing; expected the packages of the extra `site`: pip install -e .[site]"
        ) from None

    with TemporaryDirectory() as work, staging_folder(output) as target:
        source, extra, built, words = Path(work, "source"), Path(work, "extra"), Path(work, "built"), StringIO()
        write_pages(extra / "scenes", quiet=quiet)
        write_sources(source)
        write_code(extra / "code", source)
        (extra / "class.html").write_text(deck(), encoding="utf-8")
        settings = {"html_extra_path": [str(extra)]} | SETTINGS
        with redirect_stdout(words), redirect_stderr(words):
            app = Sphinx(source, None, built, Path(work, "trees"), "html", settings, warning=words, status=None)
            app.build()
        problems = [line for line in words.getvalue().splitlines() if "WARNING" in line or "ERROR" in line]
        if problems:
            raise InputError(f"the site has {len(problems)} faults; the first: {problems[0]}")
        for rest in (".buildinfo", "objects.inv", "_sources"):
            shutil.rmtree(built / rest, True) if (built / rest).is_dir() else (built / rest).unlink(missing_ok=True)
        for path in (*built.rglob("*.map"), *built.rglob("*webpack-macros.html")):
            path.unlink()
        shutil.copytree(built, target, dirs_exist_ok=True)  # myst_nb leaves copies of all figures beside its folder
    return Path(output) / "index.html"


SETTINGS = {
    "project": "minianyflow",
    "author": "the minianyflow authors",
    "extensions": ["myst_nb", "docs.site"],
    "html_theme": "sphinx_book_theme",
    "html_title": "minianyflow: any-step generation",
    "html_css_files": ["site.css"],
    "html_js_files": ["site.js"],
    "html_static_path": [str(STATIC / "site")],
    "html_context": {"default_mode": "auto"},
    "html_copy_source": False,
    "html_show_sourcelink": False,
    "html_theme_options": {
        "use_download_button": False,
        "use_fullscreen_button": False,
        "show_navbar_depth": 1,
        "secondary_sidebar_items": {"**": ["page-toc"], "index": [], "scenes": []},  # scenes want the width
    },
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "myst_enable_extensions": ["dollarmath", "amsmath", "attrs_inline"],
    "myst_heading_anchors": 3,
    "html_math_renderer": "mathml",
    "suppress_warnings": ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure", "config.cache"],
}


def setup(app) -> dict:
    """Sphinx's extension point: formulas as MathML."""
    from docutils import nodes
    from latex2mathml.converter import convert

    def renderer(display):
        def visit(self, node):
            inner = convert(node.astext(), display=display)
            self.body.append(f'<div class="formula">{inner}</div>' if display == "block" else inner)
            raise nodes.SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", renderer("inline"), renderer("block"))
    return {"parallel_read_safe": True}


def write_sources(source: Path) -> None:
    """What Sphinx reads: notebooks, docs, exercises and a first page, with links that hold in the site."""
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    readme = (ROOT / "notebooks/README.md").read_text("utf-8")
    source.mkdir(parents=True)
    pages = {f"notebooks/{path.name}": path for path in notebooks}
    pages |= {
        f"notebooks/exercises/{path.name}": path for path in sorted((ROOT / "notebooks/exercises").glob("[0-9]*.py"))
    }
    pages |= {f"docs/{name}.md": ROOT / f"docs/{name}.md" for name in DOCS}
    pages |= {"notebooks/INSTRUCTOR.md": ROOT / "notebooks/INSTRUCTOR.md"}
    for name, path in pages.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            (source / name).write_text(json.dumps(notebook_source(path, pages)), encoding="utf-8")
        elif path.suffix == ".py":
            (source / name).with_suffix(".md").write_text(exercise_source(path), encoding="utf-8")
        else:
            text = path.read_text(encoding="utf-8").replace("`class.html`", '<a href="../class.html">class.html</a>')
            for whole, picture in re.findall(r"(!\[[^\]]*\]\(([^)\s]+\.png)\))", text):
                if on_paper((path.parent / picture).read_bytes()):
                    text = text.replace(whole, whole + "{.paper}")
            (source / name).write_text(linked(text, path.parent, pages), encoding="utf-8")
    for picture in (path for kind in ("png", "gif") for path in (ROOT / "docs").rglob(f"*.{kind}")):
        (source / picture.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, source / picture.relative_to(ROOT))
    claim = (ROOT / "README.md").read_text("utf-8").split("## The claim, in five sentences\n")[1].split("\n## ")[0]
    parts = {
        "The course": ["notebooks/course", *(f"notebooks/{path.stem}" for path in notebooks)],
        "Exercises": [name.removesuffix(".py") for name in pages if name.endswith(".py")],
        "Look up": [f"docs/{name}" for name in DOCS[:4]],
        "What was measured": [f"docs/{name}" for name in DOCS[4:]],
        "Teaching": ["notebooks/INSTRUCTOR", "scenes"],
    }
    branch = "```{{toctree}}\n:hidden:\n:caption: {}\n{}\n```".format
    tree = "\n".join(branch(caption, "\n".join(names)) for caption, names in parts.items())
    frame = FRAME.replace("lazy", "eager").format(up="", name="race", title=SCENES["race"][2])
    (source / "index.md").write_text(
        FIRST.format(frame=frame) + f"## The claim, in five sentences\n{linked(claim, ROOT, pages)}\n\n{tree}\n",
        encoding="utf-8",
    )
    (source / "notebooks/course.md").write_text(linked(readme, ROOT / "notebooks", pages), encoding="utf-8")
    frames = "\n\n".join(
        f"## {title}\n\n{FRAME.format(up='', name=name, title=title)}" for name, (_, _, title) in SCENES.items()
    )
    (source / "scenes.md").write_text(f"# The scenes\n\n{frames}\n", encoding="utf-8")
    (source / "conf.py").touch()


def linked(text: str, folder: Path, pages: dict) -> str:
    """Markdown whose links into the repository lead into the site: a page, or the lines of a function; else words."""

    def replace(match):
        words, address = match.groups()
        if re.match(r"[a-z]+:|#", address):
            return match[0]
        path, _, place = address.partition("#")
        full = Path(os.path.normpath(folder / path))
        name = full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else ""
        up = "../" * len(folder.relative_to(ROOT).parts)
        if name in ("notebooks/README.md", "README.md", "notebooks"):
            return f"[{words}]({up}{'index' if name == 'README.md' else 'notebooks/course'}.md)"
        if name in pages:
            target = name.removesuffix(".py") + ".md" if name.endswith(".py") else name
            return f"[{words}]({os.path.relpath(target, folder.relative_to(ROOT))}{'#' + place if place else ''})"
        if full.suffix == ".py" and full.is_file():
            shown = re.sub("`([^`]*)`", r"<code>\1</code>", words)
            return f'<a href="{up}code/{name}.html{line_of(full, words)}">{shown}</a>'
        return words

    return LINK.sub(replace, text)


def line_of(path: Path, words: str) -> str:
    """ "#L-12" if `words` name something that the file defines in line 12, else ""."""
    name = re.fullmatch(r"`?(\w+)`?", words)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if name and re.match(rf"\s*(def|class) {name[1]}\b|{name[1]} =", line):
            return f"#L-{number}"
    return ""


CODE_STYLE = (
    "body{margin:1em;font-size:15px}h2{overflow-wrap:anywhere}"
    "pre{overflow-x:auto;max-width:calc(100vw - 2em)}:target{background:#fe9}"
    "@media(prefers-color-scheme:dark){html{filter:invert(.9) hue-rotate(180deg);background:#fff}}"
)
CODE_HEAD = '<head><meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'


def write_code(folder: Path, source: Path) -> None:
    """Every file of code that a page links to, with a place for every line."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    texts = [path.read_text(encoding="utf-8") for kind in ("md", "ipynb") for path in source.rglob(f"*.{kind}")]
    for name in sorted({name for text in texts for name in re.findall(r"code/([\w/]+\.py)\.html", text)}):
        form = HtmlFormatter(linenos="inline", lineanchors="L", title=name, full=True)
        page = highlight((ROOT / name).read_text(encoding="utf-8"), PythonLexer(), form)
        page = re.sub(r"<!DOCTYPE[^>]*>\s*<html>", '<!doctype html>\n<html lang="en">', page).replace(
            "<head>", f"{CODE_HEAD}<style>{CODE_STYLE}</style>", 1
        )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")


def notebook_source(path: Path, pages: dict) -> dict:
    """A saved notebook with live scenes in place of their pictures, words for every figure, and its references."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    heading, cells = "", notebook["cells"]
    for k, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = next(iter(re.findall(r"^#+ (.*)$", text, re.M)[::-1]), heading)
            cell["source"] = linked(text, path.parent, pages)
            continue
        if cell["metadata"].get("jupyter", {}).get("outputs_hidden"):
            cell["metadata"]["tags"] = ["hide-output"]
        if "except ModuleNotFoundError" in text:  # the cell that installs
            cell["metadata"]["tags"] = ["hide-input"]
        scene = re.search(r"^scenes\.(\w+)\(", text, re.M)
        after = next(("".join(other["source"]) for other in cells[k + 1 :] if other["cell_type"] == "markdown"), "")
        for output in cell["outputs"]:
            if scene and "data" in output:
                title = SCENES[scene[1]][2]
                output["data"] = {"text/html": FRAME.format(up="../", name=scene[1], title=title)}
            elif "image/png" in output.get("data", {}):
                output["data"].pop("text/plain", None)
                image = {"alt": alternative(heading, text, after, output)}
                if on_paper(base64.b64decode("".join(output["data"]["image/png"]))):
                    image["classes"] = "paper"
                cell["metadata"]["mystnb"] = {"image": image}
    listed = [
        row
        for row in (ROOT / "docs/references.md").read_text("utf-8").splitlines()
        if re.search(rf"notebooks?.*\b{number_of(path)}\b|whole", row)
    ]
    table = "\n".join(["## References", "", "| | paper | here |", "|---|---|---|", *listed])
    cells.append({"cell_type": "markdown", "metadata": {}, "source": table, "id": "references"})
    return notebook


def on_paper(picture: bytes) -> bool:
    """Whether a picture is drawn on white paper, as diagrams are and clips are not: dark pages then turn it dark."""
    shades = Image.open(BytesIO(picture)).convert("L").histogram()
    return sum(shades[240:]) > sum(shades) / 2


def number_of(path: Path) -> str:
    """A notebook's number in words: "3" of 03_flow_map.ipynb, "7a" of 07a_circle.ipynb."""
    return path.name.split("_")[0].removeprefix("0")


def exercise_source(path: Path) -> str:
    """The page of an exercise file: the file, and what each check compares, with its hint to unfold."""
    text = path.read_text(encoding="utf-8")
    checks = re.findall(
        r"check\(\s*\"([^\"]+)\",.*?(\"[^\"]+\"(?:\s*\"[^\"]+\")*),?\s*(?:(?:tolerance|rows)=[^\n]*\n?)?\)\n",
        text,
        re.S,
    )
    hints = {name: html.escape(" ".join(re.findall('"([^"]+)"', hint))) for name, hint in checks}
    hints = "".join(
        f"<details><summary>Hint to {name}</summary><p>{hint}</p></details>\n\n" for name, hint in hints.items()
    )
    words = "A check calls your function and compares what it returns with what the library computes."
    words += " Run the file in your copy; the lines to write are marked."
    solution = f'<a href="../../code/notebooks/solutions/{path.name}.html">A solution</a>, when you have tried.'
    back = f"[Back to the notebook](../{path.stem}.ipynb)"
    title = f"# Exercises to notebook {number_of(path)}"
    return f"{title}\n\n{words}\n\n```python\n{text}```\n\n{hints}\n{solution}\n\n{back}\n"
