"""Every shipped configuration parses, alone or as an overlay, and its first lines say how to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from app.cli import AsymmetryCLI
from tests.conftest import ROOT

RECIPES = [p for p in sorted((ROOT / "conf").glob("*.yaml")) if "model" in yaml.safe_load(p.read_text())]
OVERLAYS = [p for p in sorted((ROOT / "conf").glob("*.yaml")) if p not in RECIPES]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> type[AsymmetryCLI]:
    """The command line up to its configuration: nothing is built, nothing run."""
    monkeypatch.setattr(AsymmetryCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(AsymmetryCLI, "_run_subcommand", lambda self, subcommand: None)
    return AsymmetryCLI


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_parses(path: Path, parsed: type[AsymmetryCLI]) -> None:
    config = parsed(["fit", "--config", str(path)]).config["fit"]
    assert config["model"]["class_path"].startswith("modules.")
    assert config["data"]["init_args"]["path"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_overlay_goes_with_every_recipe(overlay: Path, parsed: type[AsymmetryCLI]) -> None:
    for recipe in RECIPES:
        words = ["fit", "--config", str(recipe), "--config", str(overlay)]
        trainer = parsed(words).config["fit"]["trainer"]
        for key, value in yaml.safe_load(overlay.read_text())["trainer"].items():
            assert trainer[key] == value


@pytest.mark.parametrize("path", RECIPES + OVERLAYS, ids=name)
def test_recipe_says_how_to_run_it(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("python main.py fit --config" in line and path.name in line for line in head)


def test_vit_cifar_is_the_recipe_of_the_issue(parsed: type[AsymmetryCLI]) -> None:
    config: Any = parsed(["fit", "--config", "conf/vit_cifar.yaml"]).config["fit"]
    model = config["model"]["init_args"]
    assert model["backbone"] == "vit_base_patch16_224.augreg_in21k"
    assert (model["adapter"]["train"], model["adapter"]["rank"]) == ("B", 8)
    assert model["adapter"]["targets"] == ["query", "value"]
    assert config["trainer"]["precision"] == "bf16-mixed"


def test_imports_run_one_way() -> None:
    """Main → app → (modules, datamodules) → modules/adapters; the adapters know torch alone."""
    forbidden = {
        "modules/adapters": ["lightning", "timm", "transformers", "app", "datamodules", "modules.base"],
        "modules": ["app", "datamodules"],
        "datamodules": ["app", "modules"],
    }
    for folder, names in forbidden.items():
        for path in (ROOT / folder).rglob("*.py"):
            lines = [line.split() for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
            for words in lines:
                assert not any(words[1] == n or words[1].startswith(f"{n}.") for n in names), (path, words)


def test_lightning_is_not_a_bad_release() -> None:
    assert L.__version__ not in {"2.5.5", "2.6.2", "2.6.3"}
