"""Metrics of every classification task, compared with scikit-learn and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight

from datamodules.errors import ModelError
from modules.metrics.classification import check_class_weights, class_scores, loss_weights, shared_metrics


def batch(classes: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return scale * torch.rand(200, classes, generator=generator), torch.randint(classes, (200,), generator=generator)


def calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = 15) -> float:
    """Return the mean over bins of |accuracy − confidence|, weighted by the samples of each bin."""
    confidence, right = probability.max(1), probability.argmax(1) == label
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    parts = [(places == i) for i in range(bins)]
    return sum(part.mean() * abs(right[part].mean() - confidence[part].mean()) for part in parts if part.any())


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("scale", [1.0, 6.0])  # logits in [0, 1] must not be taken for probabilities
def test_macro_f1_and_calibration_error_equal_the_references(classes: int, scale: float) -> None:
    logits, label = batch(classes, scale)
    metrics = shared_metrics(classes)
    for metric in metrics.values():
        metric.update(logits[:150], label[:150])
        metric.update(logits[150:], label[150:])
    expected = f1_score(label, logits.argmax(-1), average="macro")
    assert float(metrics["macro_f1"].compute()) == pytest.approx(expected, abs=1e-6)
    expected = calibration_error(logits.softmax(-1).double().numpy(), label.numpy())
    assert float(metrics["ece"].compute()) == pytest.approx(expected, abs=1e-5)


def test_scores_of_each_class_with_an_absent_and_a_never_predicted_class() -> None:
    logits, label = batch(5)
    label[label == 3] = 0
    predicted = logits.argmax(-1)
    predicted[predicted == 4] = 1
    scores = class_scores(torch.from_numpy(confusion_matrix(label, predicted, labels=range(5))))
    expected = precision_recall_fscore_support(label, predicted, labels=range(5), zero_division=0.0)
    for (name, values), values_expected in zip(scores.items(), expected, strict=True):
        np.testing.assert_allclose(values.numpy(), values_expected, err_msg=name)
    assert list(scores) == ["precision", "recall", "f1", "support"]


def test_balanced_weights_equal_scikit_learns() -> None:
    label = np.repeat([0, 1, 2], [10, 3, 7])
    weights = loss_weights("balanced", ["a", "b", "c"], [10, 3, 7])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=label)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)  # type: ignore[union-attr]
    assert loss_weights("balanced", ["a", "b"], [4, 0]).tolist() == [0.5, 0.0]  # type: ignore[union-attr]
    assert loss_weights([1.0, 0.0], ["a", "b"], None).tolist() == [1.0, 0.0]  # type: ignore[union-attr]
    assert loss_weights(None, ["a", "b"], [1, 2]) is None


@pytest.mark.parametrize(
    ("weights", "names", "counts", "words"),
    [
        ("balanced", [], [], "regression"),
        ("balanced", ["a", "b"], None, "no counts of their classes"),
        ([1.0], ["a", "b"], [1, 2], "1 weight for 2 classes"),
        ([-1.0, 1.0], ["a", "b"], [1, 2], "0 or more"),
        ([0.0, 0.0], ["a", "b"], [1, 2], "above 0"),
        ([float("nan"), 1.0], ["a", "b"], [1, 2], "finite"),
    ],
)
def test_bad_class_weights_are_refused(weights: Any, names: list[str], counts: list[int] | None, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        check_class_weights(weights)
        loss_weights(weights, names, counts)
