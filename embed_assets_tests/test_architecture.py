"""Which package may import which, and that loading the definitions imports no heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import embed_assets

ROOT = Path(embed_assets.__file__).parent
ALLOWED = {
    "errors": set(),
    "spelling": set(),
    "locations": set(),
    "metadata": set(),
    "settings": {"metadata", "spelling", "errors"},
    "records": set(),
    "scratch": {"errors"},
    "sample": {"errors"},
    "children": set(),
    "arrow_startup": set(),
    "workers": {"children", "arrow_startup"},
    "corpus": {"metadata", "records", "scratch", "children", "settings", "locations", "errors"},
    "engine": {"records", "scratch", "children", "arrow_startup", "settings", "locations", "errors"},
    "cluster": {"engine", "children", "errors"},
    "lake": {"metadata", "records", "scratch", "settings", "locations", "errors"},
    "quality": {"records", "errors"},
    "report": {"records", "errors"},
    "stages": {
        "corpus",
        "quality",
        "report",
        "engine",
        "cluster",
        "lake",
        "metadata",
        "records",
        "scratch",
        "workers",
        "settings",
        "locations",
        "errors",
    },
    "pictures": set(),
    "defs": {
        "report",
        "stages",
        "corpus",
        "engine",
        "cluster",
        "lake",
        "pictures",
        "records",
        "scratch",
        "settings",
        "locations",
        "errors",
    },
    "definitions": {"defs", "stages", "settings"},
    "component": {"definitions", "defs", "settings", "spelling"},
    "commands": {"console", "stages", "arrow_startup", "settings", "errors"},
    "console": {"defs", "stages", "engine", "lake"},
    "plots": {"engine", "errors"},
    "progress": {"stages"},
    "reading": {"stages", "lake", "records", "scratch", "settings", "errors"},
    "cli_search": {"commands", "console", "stages", "lake", "records", "errors"},
    "cli_spaces": {
        *("commands", "console", "defs", "stages", "lake", "report", "arrow_startup", "records", "settings", "errors"),
    },
    "cli": {
        "cli_search",
        "cli_spaces",
        "commands",
        "definitions",
        "defs",
        "stages",
        "engine",
        "lake",
        "records",
        "sample",
        "console",
        "plots",
        "progress",
        "arrow_startup",
        "settings",
        "locations",
        "errors",
    },
}
"""The arrows: definitions, cli -> defs -> stages -> {corpus, cluster -> engine, lake} -> records."""
HEAVY = {
    *("torch", "sentence_transformers", "transformers", "ray", "openvino", "nncf", "matplotlib", "pynvml"),
    *("sklearn", "pytrec_eval"),
}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path, only_module_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if only_module_level else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    mine = room(path)
    if mine == "__init__":
        return
    others = {n.split(".")[1] for n in imports(path) if n.startswith("embed_assets.")} - {mine}
    assert others <= ALLOWED[mine], f"{mine} must not import {sorted(others - ALLOWED[mine])}"


def module_name(path: Path) -> str:
    return ".".join(["embed_assets", *path.relative_to(ROOT).with_suffix("").parts])


def imported_modules(path: Path) -> set[str]:
    """The package's modules that a module imports anywhere, including those imported by name from their package."""
    known = {module_name(p) for p in MODULES}
    found = imports(path)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


def test_there_are_no_import_cycles() -> None:
    graph = {module_name(path): imported_modules(path) for path in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_dagster_packages_import_dagster(path: Path) -> None:
    uses = any(name.split(".")[0] == "dagster" for name in imports(path))
    assert not uses or room(path) in {"defs", "definitions", "component", "cli"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path, only_module_level=True)} & HEAVY


def test_only_the_package_itself_exports_names() -> None:
    assert [p for p in ROOT.rglob("__init__.py") if p.read_text("utf-8").strip()] == [ROOT / "__init__.py"]
    assert all(getattr(embed_assets, name).__name__ == name for name in embed_assets.__all__)


def test_definitions_load_without_the_heavy_libraries() -> None:
    code = (
        "import sys, embed_assets.definitions; "
        f"loaded = {sorted(HEAVY)!r}; print(','.join(m for m in loaded if m in sys.modules))"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"definitions loaded in {time.perf_counter() - started:.2f} s")
    assert done.stdout.strip() == ""
