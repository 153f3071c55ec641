"""The public face: names, where they are from, what importing them costs, and that all arguments have types."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

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


FOLDER = Path(minianyflow.__path__[0])
TYPED = [*FOLDER.glob("[!_]*.py"), *FOLDER.glob("networks/[!_]*.py")]


def public_functions(tree):
    """Public functions of a module, and methods of its public classes that a user calls."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        elif isinstance(node, ast.FunctionDef) and (node.name in ("__init__", "__call__") or node.name[0] != "_"):
            yield node


@pytest.mark.parametrize("file", TYPED, ids=lambda file: str(file.relative_to(FOLDER)))
def test_all_arguments_and_results_have_types(file):
    for function in public_functions(ast.parse(file.read_text())):
        spec = function.args
        arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        assert all(argument.annotation for argument in arguments if argument.arg != "self"), function.name
        assert function.returns or function.name == "__init__", function.name


def test_a_wrong_shape_is_an_error_while_tests_run():
    with pytest.raises(TypeCheckError):
        minianyflow.data_velocity(torch.zeros(4, 2), torch.zeros(4, 3))
