"""For all tests: types are checked, one thread (fastest for small networks, repeatable bit for bit), targets, times.

The root and networks/ are imported with a check of all annotations (jaxtyping, beartype): shapes agree within a call.
A test of bad input gets its InputError from the function itself: see `tests/refused.py`.
"""

import contextlib
import io
import os
import pkgutil
from importlib.util import cache_from_source

import pytest
import torch
from jaxtyping import _import_hook, install_import_hook

import minianyflow

ROOT = [f"minianyflow.{module.name}" for module in pkgutil.iter_modules(minianyflow.__path__) if not module.ispkg]
CHECKED = [*ROOT, "minianyflow.networks"]
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")  # int is a float
tagged = _import_hook._optimized_cache_from_source


def _cached(tag, path, *options):
    """Where bytecode lies. The libraries that a checked module imports are not checked: their own is read."""
    ours = path.startswith(os.path.join(minianyflow.__path__[0], ""))
    return tagged(tag, path, *options) if ours else cache_from_source(path, *options)


_import_hook._optimized_cache_from_source = _cached

from toy_data import plane  # noqa: E402

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def seeded():
    """Tests draw the same random numbers in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def spiral():
    """The spiral in float64."""
    return plane.spiral().to(torch.float64)


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory):
    """The folder and the printed text of a short `demo` of all methods: two seeds, few steps, few points."""
    from minianyflow.plane import commands, race

    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--evaluations", "30000", "--seeds", "4,5", "--quiet", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        for name, value in {"POINTS": 256, "PIECE": 128, "NFE": (1, 2, 4, 16, 64), "DRAWS": 2}.items():
            patch.setattr(race, name, value)
        patch.setattr(
            race, "run_jobs", lambda jobs, workers: {name: job(*given) for name, (job, given) in jobs.items()}
        )
        assert commands.demo(arguments) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder in Wan2.1's layout, 16 clips in latents/, the null prompt "ugly": read or copy, never write."""
    from minianyflow.wan.folders import make_tiny_wan

    folder = tmp_path_factory.mktemp("wan") / "tiny"
    torch.manual_seed(4)
    before = torch.get_rng_state()
    make_tiny_wan(folder, null="ugly")
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers move
    return folder
