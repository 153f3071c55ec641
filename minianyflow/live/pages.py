"""Each scene as one file: no server, no network. Time scrubs and steps switch, since every picture is in the page."""

import base64
import gzip
import json
from io import BytesIO
from pathlib import Path

from tqdm import tqdm

from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}
body {{ margin: 0 auto; padding: 8px 16px; background: #fff; color: #1a1a1a; }}
h1 {{ font: 600 calc(1.4 * var(--lm-size))/1.3 system-ui, sans-serif; margin: 8px 6px; }}
body {{ --lm-size: clamp(17px, min(1.3vw, 2.3vh), 40px); }}
.lm-player {{ max-width: max(640px, var(--lm-columns) * (100vh - 20em)); margin: 0 auto; }}
@media (max-width: 640px) {{ .lm-panels {{ grid-template-columns: 1fr 1fr; }}
  .lm-panels figure:last-child:nth-child(odd) {{ grid-column: 1 / -1; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<div id="scene"></div>
<noscript>This page draws with JavaScript, which is switched off here.</noscript>
<script type="module">
{script}
{{
  const packed = Uint8Array.from(atob("{payload}"), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const payload = new Uint8Array(await new Response(stream).arrayBuffer());
  window.player = mountPage(document.getElementById("scene"), {page}, payload);
}}
</script>
</body>
</html>
"""


def page_text(page, payload):
    """The whole page, text; page and payload as `Scene.payloads` returns them."""
    from minianyflow.live.player import STATIC

    return PAGE.format(
        title=page["title"],
        style=(STATIC / "player.css").read_text(),
        script=(STATIC / "player.js").read_text().replace("</", "<\\/"),  # `</script` would end the script
        page=json.dumps(page, separators=(",", ":")).replace("</", "<\\/"),
        payload=base64.b64encode(gzip.compress(payload, 9, mtime=0)).decode(),
    )


def write_pages(output="outputs/live", names=None, quiet=False):
    """Write NAME.html for each of those scenes (default: all), whole or not at all; returns the paths."""
    from minianyflow.live.scenes import SCENES, open_scene

    names = list(names or SCENES)
    for name in names:
        choose("scene", name, SCENES)
    with staging_folder(output) as folder:
        for name in tqdm(names, unit="page", disable=quiet or None):
            (folder / f"{name}.html").write_text(page_text(*open_scene(name).payloads()), encoding="utf-8")
    return [Path(output) / f"{name}.html" for name in names]


def animate(page, path, frames=36, size=(1180, 700), colours=64, milliseconds=100):
    """A looping GIF of an offline page, from noise to data: every frame a picture taken in the browser."""
    from PIL import Image

    from minianyflow.live.browser import READY, chromium, watched

    if Path(path).suffix != ".gif":
        raise InputError(f"an animation to {path}; expected a name that ends in .gif")
    with chromium() as browser, watched(browser, dict(zip(("width", "height"), size, strict=True))) as tab:
        tab.goto(Path(page).resolve().as_uri())
        tab.wait_for_selector(READY)
        tab.add_style_tag(content="body { --lm-size: 17px; }")
        pictures = []
        for frame in range(frames):
            now = frame / (frames - 1)
            tab.evaluate("(to) => player.seek(to)", now)
            tab.wait_for_function("(to) => player.root.dataset.position == to", arg=f"{now:.4f}")
            pictures.append(Image.open(BytesIO(tab.locator(".lm-player").screenshot())).convert("RGB"))
    method, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE  # white stays white
    palette = pictures[-1].quantize(colours, method, dither=plain)  # one for all: no pixel flickers
    pictures = [picture.quantize(palette=palette, dither=plain) for picture in pictures]
    first, *rest = pictures
    durations = [1200] + [milliseconds] * (frames - 2) + [2500]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True, disposal=1)
    return path
