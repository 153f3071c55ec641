"""Commands of the live scenes: `live` and `live-html`."""

import time
import webbrowser
from pathlib import Path

from minianyflow.support.cli import Parser
from minianyflow.support.install import browser


def live(argv: list[str]) -> int:
    """Serve the scenes as a full-window app for a class, offline, with the first one drawn before it is opened."""
    parser = Parser("minianyflow live", description=live.__doc__)
    parser.add_argument("--scene", default="race", help="the scene that is drawn first (default: race)")
    parser.add_argument("--port", default=8866, type=int, help="of this machine; 0 for any free one (default: 8866)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open no browser")
    arguments = parser.parse_args(argv)
    from minianyflow.live.app import serve

    start = time.perf_counter()
    print(f"drawing {arguments.scene} (some seconds)", flush=True)
    with serve(arguments.scene, arguments.port) as (address, process):
        print(f"ready after {time.perf_counter() - start:.0f} s: {address} (Ctrl-C ends it)", flush=True)
        if not arguments.no_browser:
            webbrowser.open(address)
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("\nended")
            return 0


def live_html(argv: list[str]) -> int:
    """Write each scene as one page that needs no server and no network; with --animation a GIF of the first instead."""
    parser = Parser("minianyflow live-html", description=live_html.__doc__)
    parser.add_argument("--scene", action="append", help="only this scene; can be repeated (default: all)")
    parser.add_argument("--output", default="outputs/live", help="folder of the pages (default: outputs/live)")
    parser.add_argument("--animation", metavar="GIF", help="a file for a GIF, from noise to data, instead of all pages")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    from minianyflow.live.pages import animate, write_pages

    if arguments.animation:
        browser(install=True)
    names = arguments.scene or (["race"] if arguments.animation else None)
    pages = write_pages(arguments.output, names, arguments.quiet)
    for path in [animate(pages[0], arguments.animation)] if arguments.animation else pages:
        print(f"written: {path}, {Path(path).stat().st_size / 1e6:.2f} MB")
    return 0
