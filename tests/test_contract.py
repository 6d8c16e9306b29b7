"""Protocols between tasks and data: every task and data module has its abilities, and attributes are not probed."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from datamodules.contract import (
    DataKind,
    HasClasses,
    HasDomains,
    HasFrozenPrefix,
    HasKind,
    HasKinds,
    HasLabelScaling,
    HasMetrics,
    HasPacking,
    HasPredictionFiles,
    HasPrompts,
    HasSets,
    HasTestSplit,
    ImageModel,
    TextModel,
)
from datamodules.domains import DomainData
from datamodules.errors import counted
from datamodules.image_classification import ImageClassificationData
from datamodules.language_modeling import LanguageModelingData
from datamodules.multiple_choice import MultipleChoiceData
from datamodules.summarization import SummarizationData
from datamodules.text_classification import TextClassificationData
from modules.adapters import AdapterConfig
from modules.generation.beam_search import Generation
from modules.generation.decoding import Decoding
from modules.image_classification import ImageClassifier
from modules.language_modeling import LanguageModel
from modules.summarization import Summarizer
from modules.text_classification import TextClassifier
from tests.conftest import ROOT

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}
OF_DATA = (
    *(HasClasses, HasDomains, HasLabelScaling, HasMetrics, HasPacking, HasPredictionFiles, HasPrompts, HasSets),
    HasTestSplit,
)
OF_TEXTS = {HasClasses, HasLabelScaling, HasMetrics, HasSets, HasPredictionFiles, HasTestSplit}


@pytest.mark.parametrize(
    ("kind", "keys", "abilities"),
    [
        (ImageClassificationData, {}, {HasClasses, HasTestSplit}),
        (DomainData, {"environment": "a"}, {HasClasses, HasDomains, HasTestSplit}),
        (TextClassificationData, {"task": "mnli"}, OF_TEXTS),
        (SummarizationData, {}, {HasSets, HasPredictionFiles, HasTestSplit}),
        (LanguageModelingData, {}, {HasSets, HasPacking, HasPrompts, HasPredictionFiles, HasTestSplit}),
        (MultipleChoiceData, {}, {HasSets, HasPredictionFiles, HasTestSplit}),
    ],
)
def test_data_modules_have_exactly_their_abilities(kind: type, keys: dict[str, Any], abilities: set[Any]) -> None:
    attributes = {*dir(kind), *vars(kind(path="somewhere", **keys))}
    assert {a for a in OF_DATA if members(a) <= attributes} == abilities
    assert isinstance(kind, HasKind)
    assert isinstance(kind.kind, DataKind)


def members(ability: type) -> set[str]:
    """Return the names of the attributes of an ability."""
    return {name for name in {*vars(ability), *ability.__annotations__} if not name.startswith("_")}


def test_models_have_their_abilities(roberta_path: Path, bart_path: Path, llama_path: Path) -> None:
    models = {
        ImageClassifier("vit_tiny_patch16_224", weights="none", backbone_args=TINY, image_size=16): ImageModel,
        TextClassifier(str(roberta_path)): TextModel,
        Summarizer(str(bart_path), generation=Generation(max_length=12)): TextModel,
        LanguageModel(str(llama_path), generation=Decoding(max_new_tokens=8), adapter=AdapterConfig(rank=2)): TextModel,
    }
    for model, ability in models.items():
        assert all(isinstance(model, each) for each in (HasClasses, HasFrozenPrefix, HasKinds, ability))
        assert isinstance(model, ImageModel) is (ability is ImageModel)
        assert all(isinstance(kind, DataKind) for kind in model.kinds)


@pytest.mark.parametrize(("folders", "most"), [(("modules", "datamodules"), 8)])
def test_few_attributes_are_probed_with_getattr_or_hasattr(folders: tuple[str, ...], most: int) -> None:
    """The remaining probes are of backbones of timm or transformers, never of a task or its data."""
    probes = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
        if isinstance(node.args[1], ast.Constant)
    ]
    assert len(probes) <= most, probes


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (1, ("row",), "1 row"),
        (1200, ("row",), "1,200 rows"),
        (0, ("batch",), "0 batches"),
        (2, ("class",), "2 classes"),
        (1, ("bad row is", "bad rows are"), "1 bad row is"),
        (2, ("bad row is", "bad rows are"), "2 bad rows are"),
    ],
)
def test_a_number_agrees_with_its_noun(count: int, words: tuple[str, ...], text: str) -> None:
    assert counted(count, *words) == text
