"""Contact sheets, players and curves. Videos are grey, (n, T, H, W) in [0, 1]; values outside are clipped."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from einops import rearrange, repeat
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from minianyflow.networks.codec import Codec
from minianyflow.support.errors import InputError
from minianyflow.support.figures import checked_video, contact_sheet, draw_any_step, save_figure
from minianyflow.times import generator
from toy_data import blobs

CURVES = ("teacher", "eulerian", "lagrangian", "semigroup", "mixed", "consistency", "on_policy")
SHOWN = {"teacher": (1, 4, 32), "eulerian": (1, 4, 32), "consistency": (1, 32), "on_policy": (1,), "causal": (4,)}
_GREYS = 64  # a quarter of all: smaller files, and no eye sees it


def save_figures(report: dict, ends: dict, clips: Sequence[int], codec: Codec, folder: Path) -> None:
    """Write any-step curves of two measures, and a contact sheet of `clips` from `ends`, {stage: {nfe: latents}}."""
    curves = report | {"methods": {name: method for name, method in report["methods"].items() if name in CURVES}}
    save_figure(any_step_curves(curves, "sliced_w2", "sliced W2 of latents"), folder / "any_step.png")
    save_figure(any_step_curves(curves, "from_ideal", "distance from ideal blobs"), folder / "from_ideal.png")
    rows = {"data": blobs.sample(2, generator(7)).video}
    for name, counts in SHOWN.items():
        label = "flow map" if name == "eulerian" else name.replace("_", "-")
        for nfe in counts:
            if nfe in ends.get(name, {}):
                rows[f"{label}, {nfe}"] = codec.decode(ends[name][nfe][clips])
    save_figure(contact_sheet(rows, blobs.PROMPTS), folder / "contact_sheet.png")


def player(video, titles=None, columns=8, scale=6, fps=8):
    """The videos side by side, in a loop: an animated PNG for a notebook's output, since nbconvert shows no GIF.

    video: (n, T, H, W), or {label: (n, T, H, W)}, a row per entry; the first `columns` clips, under `titles`.
    """
    from IPython.display import Image as NotebookImage

    rows = [" ".join(label.split()) for label in video] if isinstance(video, dict) else []
    words = "clips side by side, in a loop" + (f"; a row each for {'; '.join(rows)}" if rows else "")
    return NotebookImage(data=animated_png(video, titles, columns, scale, fps), format="png", alt=words)


def animated_png(video, titles: Sequence[str] | None = None, columns=8, scale=6, fps=8) -> bytes:
    """The bytes of `player`. A bar below shows the time; the last frame lasts half a second longer."""
    rows = video if isinstance(video, dict) else {"": video}
    rows = {label: checked_video(label, clips)[:columns] for label, clips in rows.items()}
    shapes = {clips.shape for clips in rows.values()}
    if len(shapes) != 1 or scale < 1 or fps <= 0:
        raise InputError(f"videos {shapes}, scale {scale}, fps {fps}; expected one shape for all rows, scale 1 or more")
    shades = np.round(np.clip(list(rows.values()), 0, 1) * (_GREYS - 1)) * 255 / (_GREYS - 1)
    large = repeat(shades.round(), "row clip t height width -> t row (height y) clip (width x)", y=scale, x=scale)
    gap = (0, max(4, scale))
    spaced = np.pad(large.astype(np.uint8), ((0, 0), (0, 0), gap, (0, 0), gap), constant_values=255)
    frames = rearrange(spaced, "t row height clip width -> t (row height) (clip width)")
    background, place, (left, top, right, bottom) = _background(list(rows), titles or [], next(iter(shapes)), scale)
    pictures = []
    for k, frame in enumerate(frames, 1):
        pictures.append(picture := background.copy())
        picture.paste(Image.fromarray(frame), place)
        done = left + (right - left) * k // len(frames)
        ImageDraw.Draw(picture).rectangle((left, top, done, bottom), fill=90)
    file, tick = io.BytesIO(), 1000 / fps
    hold = [tick] * (len(pictures) - 1) + [tick + 500]
    pictures[0].save(file, "png", save_all=True, append_images=pictures[1:], duration=hold, loop=0)
    return file.getvalue()


def _background(labels, titles, shape, scale):
    """The background: a picture with labels and titles, the corner of the clips, and the box of the bar."""
    count, _, height, width = shape
    font = ImageFont.load_default(16)
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    margin = max(int(pen.multiline_textbbox((0, 0), label, font=font)[2]) for label in labels)
    left, top, gap = margin + 14 if margin else 0, 26 if titles else 0, max(4, scale)
    step_x, step_y = width * scale + gap, height * scale + gap
    right, bottom = left + count * step_x - gap, top + len(labels) * step_y
    picture = Image.new("L", (right, bottom + 4), 255)
    pen = ImageDraw.Draw(picture)
    for k, title in enumerate(titles[:count]):
        pen.text((left + k * step_x + width * scale // 2, top // 2), title, fill=0, font=font, anchor="mm")
    for k, label in enumerate(labels):
        place = (left - 10, top + k * step_y + height * scale // 2)
        pen.multiline_text(place, label, fill=0, font=font, anchor="rm", align="right")
    bar = (left, bottom, right - 1, bottom + 3)
    pen.rectangle(bar, fill=225)
    return picture, (left, top), bar


def any_step_curves(report: dict, measure: str, ylabel: str | None = None) -> Figure:
    """A figure of `draw_any_step`, the legend beside it."""
    figure, axes = plt.subplots(figsize=(8.6, 5.2), layout="constrained")
    draw_any_step(axes, report, measure, ylabel)
    axes.legend(fontsize=12, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure
