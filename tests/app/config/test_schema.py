"""The command `schema`: recipes validate against their schema, and a wrong key or value does not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli import FIT_KEYS, main, restricted_imports
from app.config.schema import recipe_schema
from tests.conftest import ROOT
from tests.support.json_schema import problems
from tests.support.refusals import refused

RECIPES = ("vit_cifar", "roberta_glue", "bart_xsum", "llama2_alpaca")  # one of each family


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())
    return content


@pytest.fixture(scope="module")
def schemas() -> Callable[[str], dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}

    def schema_of(name: str) -> dict[str, Any]:
        if name not in made:
            with restricted_imports():
                made[name] = recipe_schema(str(ROOT / "conf" / f"{name}.yaml"), FIT_KEYS)
        return made[name]

    return schema_of


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_validates_against_its_own_schema(schemas: Callable[[str], dict[str, Any]], name: str) -> None:
    schema = schemas(name)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert problems(read(name), schema, schema) == []
    others = [other for other in RECIPES if other != name]
    assert all(problems(read(other), schema, schema) for other in others)


@pytest.mark.parametrize("overlay", ["cpu", "debug", "ddp", "checkpointing", "fsdp"])
def test_overlays_validate_against_the_schema_of_a_recipe(
    schemas: Callable[[str], dict[str, Any]], overlay: str
) -> None:
    schema = schemas("llama2_alpaca")
    assert problems(read(overlay), schema, schema) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("traner.max_epochs", 1),
        ("trainer.max_epoch", 1),
        ("trainer.max_epochs", "many"),
        ("model.init_args.learning_rat", 0.1),
        ("model.init_args.learning_rate", "fast"),
        ("model.init_args.tuning", "adaptor"),
        ("model.init_args.adapter.rnk", 4),
        ("model.init_args.adapter.rank", 4.5),
        ("model.init_args.adapter.train", "C"),
        ("model.class_path", "modules.image_classification.ImageClasifier"),
        ("data.init_args.batchsize", 4),
        ("checkpoint.mode", "maximum"),
        ("spectrum.every_n_epoch", 1),
    ],
)
def test_a_wrong_key_or_value_does_not_validate(
    schemas: Callable[[str], dict[str, Any]], path: str, value: Any
) -> None:
    schema, recipe = schemas("vit_cifar"), read("vit_cifar")
    *parents, last = path.split(".")
    section = recipe
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    messages = problems(recipe, schema, schema)
    assert messages
    assert all(path.partition(".")[0] in problem for problem in messages)


def test_keys_have_help_types_and_defaults(schemas: Callable[[str], dict[str, Any]]) -> None:
    keys = schemas("vit_cifar")["properties"]["model"]["properties"]["init_args"]["properties"]
    assert keys["learning_rate"]["type"] == "number"
    assert keys["learning_rate"]["default"] == 0.001
    assert "pixels" in keys["image_size"]["description"]
    assert keys["tuning"]["enum"] == ["adapter", "head", "full", "adalora", "ia3"]


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["schema", "conf/quickstart.yaml"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["schema", "--config", "conf/quickstart.yaml"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    recipe = yaml.safe_load((ROOT / "conf" / "quickstart.yaml").read_text())
    assert problems(recipe, first, first) == []


def test_callbacks_and_loggers_of_the_trainer_validate(schemas: Callable[[str], dict[str, Any]]) -> None:
    schema, recipe = schemas("vit_cifar"), copy.deepcopy(read("vit_cifar"))
    recipe["trainer"]["callbacks"] = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}]
    recipe["trainer"]["logger"] = False
    recipe["$schema"] = "vit.schema.json"
    assert problems(recipe, schema, schema) == []


def test_wrong_use_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {class_path: os.system}\n")
    refused(capsys, main(["schema"]), "RECIPE: 0 recipes are given.")
    refused(capsys, main(["schema", "a.yaml", "--config", "b.yaml"]), "RECIPE: 2 recipes are given.")
    refused(capsys, main(["schema", str(tmp_path / "none.yaml")]), "there is no file")
    refused(capsys, main(["schema", str(recipe)]), "model.class_path: os.system is no class that a recipe may name.")
    recipe.write_text("model: {class_path: modules.image_classification.ImageClasifier}\n")
    refused(capsys, main(["schema", str(recipe)]), "did you mean ImageClassifier?")
