"""A scene as one HTML file without server or network, and all of them in one window for a class."""

import base64
import gzip
import html
import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from string import Template

from PIL import Image
from tqdm import tqdm

from minianyflow.live.player import STATIC, script
from minianyflow.live.scenes import SCENES, open_scene
from minianyflow.support import install
from minianyflow.support.errors import InputError
from minianyflow.support.files import staging_folder

READY = '.lm-player[data-ready="1"]'  # the first picture is drawn
DONE = '.lm-player[data-done="1"]'  # and all of its particles and measures


def page_text(page: dict, payload: bytes, picture: Path | None = None) -> str:
    """The text of an HTML file; page and payload as `Scene.offline_page` returns them. picture: where none is drawn."""
    return Template((STATIC / "page.html").read_text("utf-8")).substitute(
        title=page["title"],
        style=(STATIC / "player.css").read_text("utf-8"),
        script=script().replace("</", "<\\/"),  # `</script` would end the script
        page=json.dumps(page, separators=(",", ":")).replace("</", "<\\/"),
        payload=base64.b64encode(gzip.compress(payload, 9, mtime=0)).decode(),
        picture="data:image/png;base64," + base64.b64encode(smaller(picture) if picture else b"").decode(),
    )


def smaller(picture: Path, width: int = 560, colours: int = 16) -> bytes:
    """A picture small enough to stay unseen in every page, about 20 kB of PNG."""
    image, file = Image.open(picture).convert("RGB"), BytesIO()
    image.thumbnail((width, width))
    image.quantize(colours, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def write_pages(output="outputs/live", names: Sequence[str] | None = None, quiet: bool = False) -> list[Path]:
    """Write NAME.html for those scenes (default: all) and index.html, all files or none; returns the scenes' paths."""
    names = list(names or SCENES)
    with staging_folder(output) as folder:
        for name in tqdm(names, unit="page", disable=quiet or None):
            scene = open_scene(name)
            text = page_text(*scene.offline_page(), scene.saved if scene.saved.exists() else None)
            (folder / f"{name}.html").write_text(text, encoding="utf-8")
        (folder / "index.html").write_text(index_text(names), encoding="utf-8")
    return [Path(output) / f"{name}.html" for name in names]


def index_text(names: Sequence[str]) -> str:
    """A menu of scenes above the chosen one; the first is open."""
    titles = {name: html.escape(SCENES[name][2]) for name in names}
    links = "".join(
        f'<a href="{name}.html" target="scene">{k}  {title}</a>' for k, (name, title) in enumerate(titles.items(), 1)
    )
    return Template((STATIC / "index.html").read_text("utf-8")).substitute(links=links, first=f"{names[0]}.html")


def chromium(playwright):
    """A headless Chromium of `playwright`, its Browser. Raises InputError if none is installed."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's sandbox does not start as root
    return playwright.chromium.launch(executable_path=install.browser(), args=["--no-sandbox"] if root else [])


def opened(browser, page: Path, size=(1180, 700), **options):
    """A tab of that size that shows an offline page, complete."""
    tab = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)), **options)
    tab.set_default_timeout(180_000)  # the cores may have other work
    tab.goto(Path(page).resolve().as_uri())
    tab.wait_for_selector(DONE)
    tab.add_style_tag(content="body { --lm-size: 17px; }")
    return tab


def seek(tab, position: float) -> Image.Image:
    """The picture of the player at that position of the time, 0 to 1."""
    tab.evaluate("(to) => player.seek(to)", position)
    tab.wait_for_function("(to) => player.root.dataset.position == to", arg=f"{position:.4f}")
    return Image.open(BytesIO(tab.locator(".lm-player").screenshot())).convert("RGB")


def write_pictures(pages: Sequence[Path], folder: Path = STATIC / "pictures") -> list[Path]:
    """Each scene at its last time as a small PNG, which saved notebooks show where no kernel runs."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(exist_ok=True)
    with sync_playwright() as playwright, chromium(playwright) as browser:
        for page in pages:
            path, tab = folder / f"{SCENES[Path(page).stem][1].lower()}.png", opened(browser, page)
            for button in tab.get_by_role("button", name="Learn").all():
                button.click()
                tab.wait_for_selector(DONE)
            seek(tab, 1.0).quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    return sorted(folder.glob("*.png"))


def animate(page, path, frames: int = 36, colours: int = 64, milliseconds: int = 100) -> Path:
    """Write a looping GIF of an offline page, from noise to data, its frames taken in a browser; returns its path."""
    from playwright.sync_api import sync_playwright

    path = Path(path)
    if path.suffix != ".gif":
        raise InputError(f"an animation to {path}; expected a name that ends in .gif")
    with sync_playwright() as playwright, chromium(playwright) as browser:
        tab = opened(browser, page)
        pictures = [seek(tab, frame / (frames - 1)) for frame in range(frames)]
    method, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE  # white stays white
    palette = pictures[-1].quantize(colours, method, dither=plain)  # one palette for all frames: no pixel flickers
    first, *rest = (picture.quantize(palette=palette, dither=plain) for picture in pictures)
    durations = [1200] + [milliseconds] * (frames - 2) + [2500]
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True, disposal=1)
    return path
