"""Directions of imports between folders, read from the syntax tree of every file.

Imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("app", "benchmarks", "datamodules", "modules", "tests")
CONTRACT = {"datamodules/contract.py", "datamodules/errors.py"}  # files of datamodules that modules may import
# files of this program that a folder may import besides its own
ALLOWED = {
    "main.py": ("app/",),
    "app/": ("modules/", "datamodules/"),
    "modules/": tuple(CONTRACT),
    "modules/adapters/": (),
    "modules/analysis/": ("modules/adapters/",),
    "datamodules/": (),
}
# libraries that modules/adapters and modules/analysis must not import
LIBRARIES = ("lightning", "timm", "transformers")
SHARED = {*CONTRACT, "datamodules/atomic.py"}  # files that every file may import
# modules that only define old names of classes, for saved runs and recipes
OLD_NAMES = {f"datamodules/{name}.py" for name in ("glue", "instructions", "mmlu")}


def names(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, including the names after `import`."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            for alias in node.names:
                yield ".".join([*start, *([node.module] if node.module else []), alias.name])


def file_of(name: str) -> str | None:
    """Return the file of this program that defines a dotted name, or None for names of libraries."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return None
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return str(candidate.relative_to(ROOT))
    raise AssertionError(f"nothing defines {name}")


@cache
def imports_by_file() -> dict[str, set[str]]:
    """Return the files of this program that each file imports."""
    files = [ROOT / "main.py", *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]
    imports = {str(path.relative_to(ROOT)): {file_of(name) for name in names(path)} for path in files}
    return {file: {target for target in targets if target not in (None, file)} for file, targets in imports.items()}  # type: ignore[misc]


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_allowed_folders(folder: str) -> None:
    allowed = (folder, *ALLOWED[folder])
    forbidden = {
        f"{file} imports {target}"
        for file, targets in imports_by_file().items()
        if file.startswith(folder)
        for target in targets
        if not target.startswith(allowed)
    }
    assert forbidden == set()


@pytest.mark.parametrize("folder", ["modules/adapters/", "modules/analysis/"])
def test_adapters_and_analysis_import_no_other_library_than_torch(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py")]
    assert files
    assert [(path.name, name) for path in files for name in names(path) if name.split(".")[0] in LIBRARIES] == []


def test_there_are_no_circular_imports() -> None:
    try:
        TopologicalSorter(imports_by_file()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


def test_nothing_imports_the_old_names() -> None:
    assert imports_by_file().keys() >= OLD_NAMES
    assert {file for file, targets in imports_by_file().items() if targets & OLD_NAMES} == set()


def imports_inside(package: str) -> dict[str, set[str]]:
    """Return the graph of imports between the files and folders directly inside a package."""
    inside = {file: targets - SHARED for file, targets in imports_by_file().items() if file.startswith(f"{package}/")}
    for file in SHARED | OLD_NAMES:
        inside.pop(file, None)

    def entry(file: str) -> str:
        return file.split("/")[1]

    graph: dict[str, set[str]] = {entry(file): set() for file in inside}
    for file, targets in inside.items():
        graph[entry(file)] |= {entry(target) for target in targets if target.startswith(f"{package}/")} - {entry(file)}
    return graph


def levels(graph: dict[str, set[str]]) -> int:
    """Return the number of nodes on the longest path of the graph."""
    heights: dict[str, int] = {}
    for entry in TopologicalSorter(graph).static_order():
        heights[entry] = 1 + max((heights[below] for below in graph[entry]), default=0)
    return max(heights.values())


@pytest.mark.parametrize(
    ("package", "most_levels", "most_imports"), [("app", 4, 30), ("modules", 4, 30), ("datamodules", 4, 30)]
)
def test_a_package_has_few_levels_and_few_imports_between_its_folders(
    package: str, most_levels: int, most_imports: int
) -> None:
    graph = imports_inside(package)
    assert levels(graph) <= most_levels
    assert sum(len(below) for below in graph.values()) <= most_imports, graph
