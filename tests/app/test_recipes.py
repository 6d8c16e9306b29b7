"""Every file of conf/ parses, alone or as an overlay. Its first lines have a command that uses the file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.callbacks.termination import Termination
from app.cli import AsymmetryCLI
from app.config.constructors import constructor_parameters
from tests.conftest import ROOT


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


ALL = sorted((ROOT / "conf").glob("*.yaml"))
RECIPES = [p for p in ALL if "class_path" in read(p).get("model", {})]
OVERLAYS = [p for p in ALL if p not in RECIPES]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], AsymmetryCLI]:
    """Return a function that parses a command line without constructing or running anything."""
    monkeypatch.setattr(AsymmetryCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(AsymmetryCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda words: AsymmetryCLI(words, Termination(), ExitStack())


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_parses(path: Path, parsed: Callable[[list[str]], AsymmetryCLI]) -> None:
    config = parsed(["fit", "--config", str(path)]).config["fit"]
    assert config["model"]["class_path"].startswith("modules.")
    assert config["data"]["init_args"]["path"]


def keys_of(overlay: Path, part: str) -> dict[str, Any]:
    return read(overlay).get(part, {}).get("init_args", {})


def has_keys(recipe: Path, overlay: Path) -> bool:
    """Return True if a recipe's model and data have the keys that an overlay sets."""
    for part in ("model", "data"):
        module, _, cls = read(recipe)[part]["class_path"].rpartition(".")
        if not keys_of(overlay, part).keys() <= constructor_parameters(getattr(import_module(module), cls)).keys():
            return False
    return True


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_overlay_parses_with_every_recipe_that_has_its_keys(
    overlay: Path, parsed: Callable[[list[str]], AsymmetryCLI]
) -> None:
    recipes = [recipe for recipe in RECIPES if has_keys(recipe, overlay)]
    assert recipes
    assert recipes == RECIPES or keys_of(overlay, "model")  # an overlay without keys of a model fits every recipe
    # recipes of the same classes have the same keys
    by_classes = {tuple(read(recipe)[part]["class_path"] for part in ("model", "data")): recipe for recipe in recipes}
    for recipe in by_classes.values():
        config = parsed(["fit", "--config", str(recipe), "--config", str(overlay)]).config["fit"]
        assert config["model"]["class_path"] == read(recipe)["model"]["class_path"]
        for part, keys in (("model", "init_args"), ("data", "init_args"), ("trainer", None)):
            given = read(overlay).get(part, {}) if keys is None else keys_of(overlay, part)
            final = config[part] if keys is None else config[part][keys]
            assert {key: final[key] for key in given} == given


@pytest.mark.parametrize("path", RECIPES + OVERLAYS, ids=name)
def test_first_lines_have_a_command_with_the_file(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = ("python main.py fit --config", "python main.py test --config")
    assert any(command in line and path.name in line for line in head for command in commands)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_advice_for_a_cpu_names_the_overlay(path: Path) -> None:
    text = path.read_text()
    assert text.count("On a CPU add") == text.count("conf/cpu.yaml")
