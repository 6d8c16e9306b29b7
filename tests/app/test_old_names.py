"""Old names of data modules, as in saved runs and recipes, resolve to the current classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.cli import main
from app.config.imports import resolve, same_class
from datamodules.language_modeling import LanguageModelingData
from datamodules.multiple_choice import MultipleChoiceData
from datamodules.text_classification import TextClassificationData
from tests.app.conftest import CommandLine

OLD_NAMES = {
    "datamodules.glue.GlueData": TextClassificationData,
    "datamodules.instructions.InstructionData": LanguageModelingData,
    "datamodules.mmlu.MMLUData": MultipleChoiceData,
}


@pytest.mark.parametrize(("name", "kind"), OLD_NAMES.items())
def test_an_old_name_resolves_to_the_current_class(name: str, kind: type) -> None:
    assert resolve(name) is kind
    assert same_class(name, f"{kind.__module__}.{kind.__name__}")


def test_a_recipe_with_an_old_name_saves_the_new_name(text_cli: CommandLine, tmp_path: Path) -> None:
    new_name, old_name = "datamodules.text_classification.TextClassificationData", "datamodules.glue.GlueData"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path("tests/conf/text.yaml").read_text().replace(new_name, old_name))
    assert old_name in recipe.read_text()

    def run(command: str, *options: str) -> int:
        words = [str(recipe) if word.endswith("text.yaml") else word for word in text_cli.words(command, *options)]
        return main(words)

    assert run("fit", "--trainer.max_steps=1") == 0
    assert yaml.safe_load((text_cli.run() / "config.yaml").read_text())["data"]["class_path"] == new_name
    assert text_cli.checkpoint()["datamodule_hyper_parameters"]["_class_path"] == new_name
    last = text_cli.run() / "checkpoints" / "last.ckpt"
    assert run("validate", f"--ckpt_path={last}") == 0  # the checkpoint has the new name, the recipe has the old name
    assert run("fit", f"--ckpt_path={last}", "--trainer.max_steps=2") == 0
