"""Imports go one way, and nothing heavy is imported where `--help` or a recipe would wait for it.

cli → pipeline → {quantize, precision, train, partition, export, measure, report}
    → {model, calibrate, engine, artifact, recipe, demo} → {errors, progress, words}
"""

import ast
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmopt"

LAYERS = (
    {"cli", "__main__"},
    {"pipeline"},
    {"quantize", "precision", "train", "partition", "export", "measure", "report"},
    {"model", "calibrate", "engine", "artifact", "recipe", "demo"},
    {"errors", "progress", "scheme", "version", "words"},
)
# Two modules are lower than the room that they are in: what a scheme is, every room says in the same words, and the
# package itself holds nothing but the version.
RESIDENCE = {"llmopt.quantize.scheme": "scheme", "llmopt": "version"}

HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "huggingface_hub", "gguf"}
HEAVY |= {"scipy", "matplotlib", "pyarrow"}
LIGHT = (
    "__main__.py",
    "errors.py",
    "progress.py",
    "words.py",
    "cli/**/*.py",
    "recipe/*.py",
    "artifact/*.py",
    "report/*.py",
    "model/spec.py",
    "model/families/*.py",
    "measure/worker.py",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imports(tree):
    """Every module that a tree imports, wherever in it: a late import is an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_import_time(node):
    """The modules that are imported when the module is, which those under TYPE_CHECKING and in functions are not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module([child], []))
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from imports_at_import_time(ast.Module(child.orelse, []))
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_at_import_time(child)


def room(module):
    """The room that `module`, or a name in it, belongs to."""
    while module not in MODULES:
        module = module.rpartition(".")[0]
    return RESIDENCE.get(module) or module.split(".")[1]


def arrows():
    """(importing file, its room, imported name, its room), for imports within the package."""
    for path in FILES:
        for imported in imports(ast.parse(path.read_text())):
            if imported.split(".")[0] == "llmopt":
                yield path, room(module_name(path)), imported, room(imported)


def layer(name):
    return next(depth for depth, rooms in enumerate(LAYERS) if name in rooms)


def test_every_room_has_its_place():
    rooms = {room(module_name(path)) for path in FILES}
    assert rooms <= set().union(*LAYERS)


def test_imports_go_one_way():
    back = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for path, source, imported, target in arrows()
        if layer(target) < layer(source)
    ]
    assert back == []


def test_rooms_do_not_import_each_other_in_a_circle():
    graph = {}
    for _, source, _, target in arrows():
        if source != target:
            graph.setdefault(source, set()).add(target)
    assert circle(graph) is None


def circle(graph):
    """The rooms on a circle of imports, or None."""

    def walk(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        return next(filter(None, (walk(target, [*path, name]) for target in sorted(graph.get(name, ())))), None)

    return next(filter(None, (walk(name, []) for name in sorted(graph))), None)


@pytest.mark.parametrize("rooms", [("a", "b", "a"), ("a", "b", "c", "a")])
def test_a_circle_would_be_found(rooms):
    graph = {}
    for source, target in pairwise(rooms):
        graph.setdefault(source, set()).add(target)
    assert circle(graph) == list(rooms)
    assert circle({"a": {"b", "c"}, "b": {"c"}}) is None


@pytest.mark.parametrize("pattern", LIGHT)
def test_nothing_heavy_is_imported_at_the_top(pattern):
    paths = sorted(PACKAGE.glob(pattern))
    assert paths, f"nothing is at {pattern} any more"
    heavy = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for path in paths
        for imported in imports_at_import_time(ast.parse(path.read_text()))
        if imported.split(".")[0] in HEAVY
    ]
    assert heavy == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn", ["torch.nn"]),
        ("from torch import nn", ["torch.nn"]),
        ("try:\n    import torch\nexcept ImportError:\n    pass", ["torch"]),
        ("class A:\n    import torch", ["torch"]),
        ("def f():\n    import torch", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", ["typing.TYPE_CHECKING"]),
    ],
)
def test_what_is_imported_at_import_time_is_found(source, found):
    assert list(imports_at_import_time(ast.parse(source))) == found
