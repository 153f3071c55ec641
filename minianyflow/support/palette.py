"""One colour, one mark and one name a method, throughout the course: pictures, scenes and pages take them from here."""

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
