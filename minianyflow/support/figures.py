"""One colour, one mark and one name per method throughout the course; figures as small PNG files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = {
    "exact": "#000000",
    "euler": "#CC79A7",
    "eulerian": "#56B4E9",
    "lagrangian": "#E69F00",
    "semigroup": "#009E73",
    "mixed": "#0072B2",
    "consistency": "#D55E00",
}
MARKERS = dict(zip(COLOURS, ["", "v", "<", ">", "s", "o", "X"], strict=True))
LABELS = {
    "exact": "exact flow",
    "euler": "Euler,\nexact velocity",
    "eulerian": "flow map,\nEulerian",
    "lagrangian": "flow map,\nLagrangian",
    "semigroup": "flow map,\nsemigroup",
    "mixed": "flow map,\nmixed",
    "consistency": "consistency,\nre-noised",
}


def small_png(figure, dpi=110, colours=64):
    """A PNG of at most `colours` colours, small enough to commit; bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels, file = np.asarray(canvas.buffer_rgba())[..., :3], io.BytesIO()
    Image.fromarray(pixels).quantize(colours, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def save_figure(figure, path, dpi=110, colours=64):
    """Write a small PNG and close the figure; returns the path."""
    Path(path).write_bytes(small_png(figure, dpi, colours))
    import matplotlib.pyplot as plt

    plt.close(figure)
    return path
