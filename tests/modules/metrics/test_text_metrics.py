"""Metrics of texts, compared with scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from datamodules.errors import ModelError
from modules.metrics.text_metrics import CLASSIFICATION, REGRESSION, build_metrics
from tests.support.refusals import refuses

Reference = Callable[[Any, Any], float]


def guesses(classes: int, size: int = 200) -> tuple[Tensor, Tensor]:
    """Return logits that are mostly right, and labels of unbalanced classes."""
    label = torch.multinomial(torch.arange(1.0, classes + 1), size, replacement=True)
    return torch.randn(size, classes) + 1.2 * torch.eye(classes)[label], label


def scores(size: int = 200) -> tuple[Tensor, Tensor]:
    """Return scores in the range of STS-B, with ties."""
    label = (torch.rand(size) * 25).round() / 5
    return (label + torch.randn(size)).round(decimals=1), label


def compute(name: str, classes: int, preds: Tensor, label: Tensor) -> float:
    metrics = build_metrics([name], classes)
    metrics.update(preds, label)
    return float(metrics.compute()[name])


def macro_f1(label: Any, preds: Any) -> float:
    return f1_score(label, preds, average="macro")


@pytest.mark.parametrize(
    ("name", "classes", "reference"),
    [
        ("accuracy", 2, accuracy_score),
        ("accuracy", 3, accuracy_score),
        ("f1", 2, f1_score),
        ("f1", 3, macro_f1),
        ("matthews", 2, matthews_corrcoef),
        ("matthews", 3, matthews_corrcoef),
    ],
)
def test_classification_metrics_equal_scikit_learns(name: str, classes: int, reference: Reference) -> None:
    logits, label = guesses(classes)
    expected = reference(label.numpy(), logits.argmax(-1).numpy())
    assert 0.2 < expected < 0.95
    assert compute(name, classes, logits, label) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("name", "reference"), [("pearson", pearsonr), ("spearman", spearmanr)])
def test_regression_metrics_equal_scipys(name: str, reference: Callable[..., Any]) -> None:
    preds, label = scores()
    expected = reference(preds.double().numpy(), label.double().numpy()).statistic
    assert 0.2 < expected < 0.99
    assert compute(name, 0, preds, label) == pytest.approx(expected, abs=1e-5)


def test_f1_of_two_classes_is_that_of_class_1() -> None:
    label = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    logits = torch.eye(2)[torch.tensor([0, 0, 0, 0, 0, 1, 1, 0])]
    assert compute("f1", 2, logits, label) == pytest.approx(0.5)  # F1 of class 0 would be 5/6
    assert compute("f1", 2, logits.flip(-1), 1 - label) == pytest.approx(5 / 6)


@pytest.mark.parametrize("preds", [0, 1])
@pytest.mark.parametrize(("name", "reference"), [("f1", f1_score), ("matthews", matthews_corrcoef)])
def test_metrics_of_a_constant_prediction(name: str, reference: Reference, preds: int) -> None:
    label = (torch.arange(100) % 10 > 2).long()  # as unbalanced as CoLA, where untrained models often predict one class
    prediction = torch.full((100,), preds)
    expected = reference(label.numpy(), prediction.numpy())
    assert compute(name, 2, torch.eye(2)[prediction], label) == pytest.approx(expected)


def test_metrics_of_a_collection_equal_separate_metrics() -> None:
    preds, label = guesses(3)
    together = build_metrics(list(CLASSIFICATION), 3)
    together.update(preds, label)
    separate = {name: compute(name, 3, preds, label) for name in CLASSIFICATION}
    assert {name: float(value) for name, value in together.compute().items()} == pytest.approx(separate)
    # with three classes, f1 is macro_f1
    assert len(set(np.round(list(separate.values()), 6))) == len(CLASSIFICATION) - 1


@pytest.mark.parametrize(
    ("names", "classes", "message", "known"),
    [
        (["acc"], 2, "acc is not for classification into 2 classes", CLASSIFICATION),
        (["accuracy", "pearson"], 3, "pearson is not for classification into 3 classes", CLASSIFICATION),
        (["accuracy", "f1"], 0, "accuracy, f1 is not for regression", REGRESSION),
        (["Spearman"], 0, "Spearman is not for regression", REGRESSION),
        ([], 2, "[] is not for classification", CLASSIFICATION),
        ([], 0, "[] is not for regression", REGRESSION),
    ],
)
def test_a_metric_of_another_task_is_refused(
    names: list[str], classes: int, message: str, known: dict[str, Any]
) -> None:
    with refuses(f"model.metrics: {message}", f"Choose from {', '.join(known)}.", error=ModelError):
        build_metrics(names, classes)
