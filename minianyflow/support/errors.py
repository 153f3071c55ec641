"""The one error a user meets: a single line that says what was wrong, what was expected, what to do."""

import difflib


class InputError(ValueError):
    """Bad input. The command line prints it without a stack trace."""

    def __init__(self, words=""):
        super().__init__(" ".join(str(words).splitlines()))  # what it quotes may have lines


def choose(kind, name, known):
    """Return `known[name]`; raise InputError that names the nearest known names otherwise."""
    try:
        return known[name]
    except (KeyError, TypeError):  # a list is no name
        pass
    near = difflib.get_close_matches(str(name), list(known), n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of these."
    raise InputError(f"unknown {kind} {name!r}; known: {', '.join(known)}; {hint}")
