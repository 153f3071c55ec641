"""`from minianyflow import ...`: which names, from where, and what importing them costs."""

import importlib
import pkgutil
import subprocess
import sys

import minianyflow


def python(code, *options):
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_public_name_is_the_one_of_its_module_and_documented():
    for name in minianyflow.__all__:
        value = getattr(minianyflow, name)
        assert value is getattr(importlib.import_module(f"minianyflow.{minianyflow._MODULE_OF[name]}"), name)
        assert value.__doc__
    assert set(minianyflow.__all__) <= set(dir(minianyflow))
    assert not hasattr(minianyflow, "sample_flow_mpa")


def test_no_public_name_is_that_of_a_module():
    """Importing the module would put it in the place of the name."""
    modules = {module.name for module in pkgutil.iter_modules(minianyflow.__path__)}
    assert not modules & set(minianyflow.__all__)


def test_the_package_needs_nothing_but_python():
    loaded = "import minianyflow, sys; dir(minianyflow); print([n for n in sys.modules if n.startswith('minianyflow')])"
    assert python(loaded, "-S") == "['minianyflow']\n"


def test_all_names_together_need_neither_diffusers_nor_matplotlib_nor_many_modules():
    """Modules are counted, not seconds: they are the same on every machine."""
    loaded = python(
        "from torch import nn; import sys; before = set(sys.modules); from minianyflow import *; "
        "print(*(set(sys.modules) - before))"
    ).split()
    assert "minianyflow.training" in loaded
    packages = {name.partition(".")[0] for name in loaded}
    assert not packages & {"diffusers", "transformers", "accelerate", "peft", "matplotlib", "scipy", "torchdiffeq"}
