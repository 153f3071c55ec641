"""The colours of the methods differ for everybody: simulated dichromats, by the distance that eyes go by."""

from itertools import combinations

import numpy as np
import pytest

from minianyflow.plane import exposure
from minianyflow.support.figures import COLOURS, LABELS, MARKERS

EYES = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB; rows of (red, green, blue)
    "usual": [1, 0, 0, 0, 1, 0, 0, 0, 1],
    "protanopia": [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998],
    "deuteranopia": [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.01182, 0.04294, 0.968881],
    "tritanopia": [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.3039],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])
APART = 15.0  # CIELAB units: about 2.3 are just seen side by side


def nearest(colours, eye):
    """The smallest CIELAB distance of two colours #rrggbb as that eye sees them."""
    encoded = np.array([[int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in colours])
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.reshape(EYES[eye], (3, 3)).T, 0, 1) @ XYZ.T / XYZ.sum(1)
    x, y, z = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(lab, 2))


@pytest.mark.parametrize("eye", EYES)
def test_methods_differ_for_any_colour_vision_and_the_measure_sees_what_is_confused(eye):
    assert min(nearest(COLOURS.values(), eye), nearest(exposure.COLOURS, eye)) > APART
    red_and_green = nearest(["#d62728", "#2ca02c"], eye)
    assert (red_and_green < APART) == (eye == "deuteranopia") or eye == "protanopia"


def test_a_method_has_a_mark_and_a_name_of_its_own():
    for table in (COLOURS, MARKERS, LABELS):
        assert list(table) == list(COLOURS)
        assert len(set(table.values())) == len(table)
