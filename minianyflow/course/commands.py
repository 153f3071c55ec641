"""Commands of the course: `course`, `exercises` and `lab`."""

import os
import subprocess
import sys
from contextlib import nullcontext

from minianyflow.support.cli import Parser
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT


def course(argv: list[str]) -> int:
    """Run the notebooks in fresh kernels and save them with their outputs, or compare them with what is saved."""
    parser = Parser("minianyflow course", description=course.__doc__)
    parser.add_argument("--only", help="the number of one notebook, say 03 or 07a")
    parser.add_argument("--compare", action="store_true", help="write nothing; print where claims differ from saved")
    parser.add_argument("--figures", metavar="FOLDER", help="write every figure there too, for slides")
    arguments = parser.parse_args(argv)
    import nbformat
    from tqdm import tqdm

    from minianyflow.course.notebooks import compare, execute, notebooks
    from minianyflow.support.files import staging_folder

    chosen = [path for path in notebooks() if not arguments.only or path.name.startswith(arguments.only)]
    if not chosen:
        known = ", ".join(path.name.split("_")[0] for path in notebooks())
        raise InputError(f"no notebook begins with {arguments.only!r}; expected one of {known}")
    differences = []
    with staging_folder(arguments.figures) if arguments.figures else nullcontext() as figures:
        for path in tqdm(chosen, unit="notebook"):
            fresh = execute(path, figures)
            if arguments.compare:
                differences += [f"{path.name}: {line}" for line in compare(nbformat.read(path, as_version=4), fresh)]
            else:
                nbformat.write(fresh, path)
    print("\n".join(differences) or f"{len(chosen)} notebooks run, every claim holds")
    return 1 if differences else 0


def exercises(argv: list[str]) -> int:
    """Write the student's exercise files from the solutions."""
    Parser("minianyflow exercises", description=exercises.__doc__).parse_args(argv)
    from minianyflow.course.exercises import write_exercises

    print("\n".join(str(path.relative_to(ROOT)) for path in write_exercises()))
    return 0


def lab(argv: list[str]) -> int:
    """Open the course in JupyterLab."""
    Parser("minianyflow lab", description=lab.__doc__).parse_args(argv)
    command = [sys.executable, *lab_command(), "--LabApp.default_url=/lab/tree/notebooks/README.md"]
    return subprocess.call(command, cwd=ROOT)


def lab_command(alone: int = 600) -> list[str]:
    """The arguments of python that start JupyterLab, for the command and for the tests.

    A kernel ends when its notebook is closed (notebooks/.lab), or `alone` seconds after its page is gone.
    """
    options = {"LabApp.app_settings_dir": ROOT / "notebooks/.lab", "MappingKernelManager.cull_idle_timeout": alone}
    options |= {"MappingKernelManager.cull_interval": min(alone, 30), "MappingKernelManager.cull_connected": False}
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # or it refuses, in a container
    return ["-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items()), *root]
