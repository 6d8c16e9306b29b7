"""Constructor keys of a base class are inherited by its subclasses: in Python, in the parser and in checkpoints."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from jsonargparse import ArgumentParser

from app.config.constructors import constructor_parameters
from datamodules.base import ResumableDataModule
from datamodules.domains import DomainData
from datamodules.image_classification import ImageClassificationData
from datamodules.language_modeling import LanguageModelingData
from datamodules.multiple_choice import MultipleChoiceData
from datamodules.summarization import SummarizationData
from datamodules.text_classification import TextClassificationData
from modules.adapters import AdapterConfig
from modules.base import AdaptedModule
from modules.image_classification import ImageClassifier
from modules.language_modeling import LanguageModel
from modules.summarization import Summarizer
from modules.text_classification import TextClassifier

TASKS = (ImageClassifier, TextClassifier, Summarizer, LanguageModel)
DATA = (
    ImageClassificationData,
    DomainData,
    TextClassificationData,
    SummarizationData,
    LanguageModelingData,
    MultipleChoiceData,
)


@pytest.mark.parametrize("kind", [*TASKS, *DATA])
def test_the_parser_knows_the_keys_of_a_class_and_of_its_base(kind: type) -> None:
    base = AdaptedModule if kind in TASKS else ResumableDataModule
    keys = constructor_parameters(kind)
    assert constructor_parameters(base).keys() < keys.keys()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "section")
    known = {key.split(".")[1] for key in vars(parser.get_defaults().as_flat())}
    assert known == keys.keys()
    redeclared = inspect.signature(kind.__init__).parameters.keys() & constructor_parameters(base).keys()  # type: ignore[misc]
    for name in redeclared:  # a key is redeclared only to change its default or type
        mine, inherited = keys[name], constructor_parameters(base)[name]
        assert (mine.default, mine.annotation) != (inherited.default, inherited.annotation)


def test_defaults_and_types_of_a_class_override_those_of_its_base() -> None:
    base, language_model = constructor_parameters(AdaptedModule), constructor_parameters(LanguageModel)
    assert (base["weight_decay"].default, language_model["weight_decay"].default) == (0.01, 0.0)
    assert language_model["warmup_ratio"].annotation is float
    assert language_model["adapter"].annotation is AdapterConfig
    assert base["schedule"] == language_model["schedule"]


def test_a_class_without_kwargs_has_no_other_keys() -> None:
    assert list(constructor_parameters(L.LightningDataModule)) == []

    class Own(ResumableDataModule):
        def __init__(self, path: str, *args: Any) -> None:
            super().__init__()

    assert list(constructor_parameters(Own)) == ["path"]


def test_hyperparameters_include_the_keys_of_the_base(llama_path: Path) -> None:
    options: dict[str, Any] = {"generation": {"max_new_tokens": 4}, "adapter": AdapterConfig(rank=2)}
    model = LanguageModel(str(llama_path), compile=True, **options)
    assert model.hparams.keys() == constructor_parameters(LanguageModel).keys()
    assert (model.hparams["compile"], model.hparams["weight_decay"], model.hparams["schedule"]) == (True, 0.0, "cosine")
    data = TextClassificationData("somewhere", task="cola", num_workers=2)
    assert data.hparams.keys() == constructor_parameters(TextClassificationData).keys()
    assert (data.hparams["task"], data.hparams["num_workers"], data.hparams["batch_size"]) == ("cola", 2, 32)
