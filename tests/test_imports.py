"""Directions of the imports between folders, read from the syntax tree of every file.

Imports inside functions and under TYPE_CHECKING count like any others.
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
CONTRACT = {"datamodules/contract.py", "datamodules/errors.py"}  # what modules may import of the data's package
# what a folder may import of this program besides its own files
ALLOWED = {
    "main.py": ("app/",),
    "app/": ("modules/", "datamodules/"),
    "modules/": tuple(CONTRACT),
    "modules/adapters/": (),
    "modules/analysis/": ("modules/adapters/",),
    "datamodules/": (),
}
LIBRARIES = ("lightning", "timm", "transformers")  # which adapters and their analysis do without
SHARED = {*CONTRACT, "datamodules/atomic.py"}  # what every file may import, whatever room it is in
# a task has a file of the same name in both packages; each further task imports more, and nothing below imports it
TASKS = {path.name for path in (ROOT / "modules").glob("*.py")} & {
    path.name for path in (ROOT / "datamodules").glob("*.py") if path.stem not in ("__init__", "base")
}
# modules with nothing but an earlier name of a class, for saved runs and recipes
OLD_NAMES = {f"datamodules/{name}.py" for name in ("glue", "instructions", "mmlu")}


def names(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, with what it takes from each."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            for alias in node.names:
                yield ".".join([*start, *([node.module] if node.module else []), alias.name])


def file_of(name: str) -> str | None:
    """The file of this program that a dotted name means, or that defines what the name means."""
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
def arrows() -> dict[str, set[str]]:
    """The files of this program that each file imports."""
    files = [ROOT / "main.py", *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]
    found = {str(path.relative_to(ROOT)): {file_of(name) for name in names(path)} for path in files}
    return {file: {target for target in targets if target not in (None, file)} for file, targets in found.items()}  # type: ignore[misc]


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_what_is_below_it(folder: str) -> None:
    own = (folder, *ALLOWED[folder])
    above = {
        f"{file} imports {target}"
        for file, targets in arrows().items()
        if file.startswith(folder)
        for target in targets
        if not target.startswith(own)
    }
    assert above == set()


@pytest.mark.parametrize("folder", ["modules/adapters/", "modules/analysis/"])
def test_adapters_and_their_analysis_are_pure_torch(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py")]
    assert files
    assert [(path.name, name) for path in files for name in names(path) if name.split(".")[0] in LIBRARIES] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


def test_nothing_imports_the_old_names() -> None:
    assert arrows().keys() >= OLD_NAMES
    assert {file for file, targets in arrows().items() if targets & OLD_NAMES} == set()


def rooms(package: str) -> dict[str, set[str]]:
    """The files and folders right inside a package, each with those of them that it imports."""
    inside = {file: targets - SHARED for file, targets in arrows().items() if file.startswith(f"{package}/")}
    for file in SHARED | OLD_NAMES:
        inside.pop(file, None)

    def room(file: str) -> str:
        return file.split("/")[1]

    found: dict[str, set[str]] = {room(file): set() for file in inside}
    for file, targets in inside.items():
        found[room(file)] |= {room(target) for target in targets if target.startswith(f"{package}/")} - {room(file)}
    return found


def levels(graph: dict[str, set[str]]) -> int:
    """The number of rooms on the longest way down."""
    heights: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        heights[room] = 1 + max((heights[below] for below in graph[room]), default=0)
    return max(heights.values())


@pytest.mark.parametrize(
    ("package", "most_levels", "most_arrows"), [("app", 4, 30), ("modules", 4, 12), ("datamodules", 4, 15)]
)
def test_the_rooms_of_a_package_stand_on_few_levels(package: str, most_levels: int, most_arrows: int) -> None:
    graph = rooms(package)
    assert levels(graph) <= most_levels
    assert sum(len(below) for room, below in graph.items() if room not in TASKS) <= most_arrows, graph
