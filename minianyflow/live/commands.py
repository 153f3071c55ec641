"""Commands of the live scenes: `live` and `live-html`."""

import webbrowser
from pathlib import Path

from minianyflow.support.cli import Parser
from minianyflow.support.install import browser


def live(argv: list[str]) -> int:
    """Write the scenes as pages that need no server, in one window for a class, and open it."""
    parser = Parser("minianyflow live", description=live.__doc__)
    parser.add_argument("--scene", default="race", help="the scene that is open first (default: race)")
    parser.add_argument("--output", default="outputs/live", help="folder of the pages (default: outputs/live)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open no browser")
    arguments = parser.parse_args(argv)
    from minianyflow.live.pages import write_pages
    from minianyflow.live.scenes import SCENES
    from minianyflow.support.errors import choose

    choose("scene", arguments.scene, SCENES)
    names = [arguments.scene, *(name for name in SCENES if name != arguments.scene)]
    page = (write_pages(arguments.output, names)[0].parent / "index.html").resolve()
    print(f"open {page.as_uri()}")
    if not arguments.no_browser:
        webbrowser.open(page.as_uri())
    return 0


def live_html(argv: list[str]) -> int:
    """Write each scene as one page that needs no server and no network; with --animation a GIF of the first instead."""
    parser = Parser("minianyflow live-html", description=live_html.__doc__)
    parser.add_argument("--scene", action="append", help="only this scene; can be repeated (default: all)")
    parser.add_argument("--output", default="outputs/live", help="folder of the pages (default: outputs/live)")
    parser.add_argument("--animation", metavar="GIF", help="a file for a GIF, from noise to data, instead of all pages")
    parser.add_argument("--pictures", action="store_true", help="also write the pictures that saved notebooks show")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    from minianyflow.live.pages import animate, write_pages, write_pictures

    if arguments.animation or arguments.pictures:
        browser()
    names = arguments.scene or (["race"] if arguments.animation else None)
    written = pages = write_pages(arguments.output, names, arguments.quiet)
    if arguments.animation:
        written = [animate(pages[0], arguments.animation)]
    if arguments.pictures:
        written = [*written, *write_pictures(pages)]
    for path in written:
        print(f"written: {path}, {Path(path).stat().st_size / 1e6:.2f} MB")
    return 0
