"""Short names of tasks and data on the command line."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
from jsonargparse import ArgumentError

from app.cli import main, parse_fit
from app.config.classes import BASES, CLASS_PATHS, class_keys, expand_class_names, find_classes
from datamodules.base import ResumableDataModule
from modules.base import AdaptedModule
from tests.conftest import ROOT
from tests.support.refusals import refused

IMAGES = CLASS_PATHS["model"]["ImageClassifier"]
TEXTS = CLASS_PATHS["data"]["TextClassificationData"]


@pytest.mark.parametrize(
    ("section", "folder", "base"), [("model", "modules", AdaptedModule), ("data", "datamodules", ResumableDataModule)]
)
def test_every_task_has_a_short_name(section: str, folder: str, base: type) -> None:
    found = {}
    for file in (ROOT / folder).glob("*.py"):
        for name, kind in vars(import_module(f"{folder}.{file.stem}")).items():
            if inspect.isclass(kind) and issubclass(kind, base) and kind.__module__ == f"{folder}.{file.stem}":
                found[name] = f"{kind.__module__}.{name}"
    without_a_task = {"AdaptedModule", "ResumableDataModule", "ImageData", "TextData", "TrainingTextData"}
    assert {name: path for name, path in found.items() if name not in without_a_task} == CLASS_PATHS[section]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "ImageClassifier"], ["--model", IMAGES]),
        (["--model=ImageClassifier"], [f"--model={IMAGES}"]),
        (["--model.help", "ImageClassifier", "--x"], ["--model.help", IMAGES, "--x"]),
        (["--model.class_path=ImageClassifier"], [f"--model.class_path={IMAGES}"]),
        (["--data.help=TextClassificationData"], [f"--data.help={TEXTS}"]),
        (["--data", "my.package.Data"], ["--data", "my.package.Data"]),
        (["--model.help", "--data.path", "ImageClassifier"], ["--model.help", "--data.path", "ImageClassifier"]),
        (["--model.backbone", "ImageClassifier"], ["--model.backbone", "ImageClassifier"]),
    ],
)
def test_short_names_become_class_paths(words: list[str], expected: list[str]) -> None:
    assert expand_class_names(words) == expected


def test_a_misspelt_short_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match="data: there is no class TextClasificationData; did you mean TextClassi"):
        expand_class_names(["--data", "TextClasificationData"])
    refused(capsys, main(["fit", "--model.help", "ImageClasifier"]), "did you mean ImageClassifier?")


def test_short_names_work_in_a_command() -> None:
    config = parse_fit(["--model", "ImageClassifier", "--data=ImageClassificationData", "--data.path=x"])
    assert (config.model.class_path, config.data.class_path) == (
        IMAGES,
        IMAGES.replace("modules", "datamodules", 1).replace("ImageClassifier", "ImageClassificationData"),
    )


def test_help_accepts_the_short_name_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model.help", "ImageClassifier"]) == 0
    assert "--model.image_size" in capsys.readouterr().out
    assert main(["fit", "--data.help", "TextClassificationData"]) == 0
    assert "--data.max_length" in capsys.readouterr().out


def test_classes_are_found_in_files_and_options(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{class_path: {IMAGES}}}\ndata: {{class_path: os.system}}\n")
    bases = {section: path.rpartition(".")[2] for section, path in BASES.items()}
    assert {s: kind.__name__ for s, kind in find_classes([], []).items()} == bases
    assert {s: kind.__name__ for s, kind in find_classes([str(recipe)], []).items()} == bases | {
        "model": "ImageClassifier"
    }
    named = find_classes([str(recipe)], ["--model", "Summarizer", "--data=SummarizationData"])
    assert {kind.__name__ for kind in named.values()} == {"Summarizer", "SummarizationData"}


def test_keys_of_a_class_start_with_the_section() -> None:
    keys = class_keys(AdaptedModule, "model")
    assert {"model.learning_rate", "model.adapter.rank"} <= set(keys)
