"""The colours of the methods are told apart by everybody: simulated dichromats, by the distance that eyes go by."""

from itertools import combinations

import numpy as np
import pytest

from minianyflow.plane import exposure
from minianyflow.support.figures import COLOURS, LABELS, MARKERS

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
EYES = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
APART = 15.0  # CIELAB units: about 2.3 are just seen side by side


def lab(colour, eye):
    """CIELAB of #rrggbb as that eye sees it."""
    linear = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    seen = XYZ @ np.clip(np.array(EYES[eye]) @ linear, 0, 1) / XYZ.sum(1)
    root = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def nearest(colours, eye):
    return min(float(np.linalg.norm(lab(a, eye) - lab(b, eye))) for a, b in combinations(colours, 2))


@pytest.mark.parametrize("eye", EYES)
def test_methods_are_told_apart_with_any_colour_vision(eye):
    assert nearest(COLOURS.values(), eye) > APART
    assert nearest(exposure.COLOURS, eye) > APART


def test_the_measure_sees_what_is_confused():
    red, green = "#d62728", "#2ca02c"
    assert nearest([red, green], "usual") > 5 * APART
    assert nearest([red, green], "deuteranopia") < APART


def test_a_method_has_a_mark_and_a_name_of_its_own():
    for table in (COLOURS, MARKERS, LABELS):
        assert list(table) == list(COLOURS)
        assert len(set(table.values())) == len(table)
