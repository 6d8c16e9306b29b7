"""Metrics of every classification: macro-averaged F1, calibration error, scores and weights of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from datamodules.errors import ModelError, counted

ClassWeights = Literal["balanced"] | list[float] | None


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits (batch, classes), in 15 bins of confidence (Guo et al. 2017).

    torchmetrics treats inputs in [0, 1] as probabilities. This class always applies the softmax.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: logits (batch, classes) and labels (batch,)."""
        super().update(preds.softmax(-1), target)


def shared_metrics(classes: int) -> dict[str, Metric | MetricCollection]:
    """Return `macro_f1` and `ece` (expected calibration error) of logits (batch, classes), both in [0, 1].

    The average of F1 is over the classes that occur among the labels or the predictions, as in scikit-learn.
    """
    return {"macro_f1": MulticlassF1Score(classes, average="macro"), "ece": CalibrationError(classes, n_bins=15)}


def class_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Return precision, recall, F1 and support of each class.

    Args:
        confusion: Counts (classes, classes), a row for each true class.

    Returns:
        `precision`, `recall`, `f1` (classes,) float64 in [0, 1], 0 if a denominator is 0; `support`
        (classes,) int64, the number of true samples.
    """
    counts = confusion.double()
    hits, predicted, true = counts.diagonal(), counts.sum(0), counts.sum(1)
    return {
        "precision": hits / predicted.clamp(min=1),
        "recall": hits / true.clamp(min=1),
        "f1": 2 * hits / (predicted + true).clamp(min=1),
        "support": confusion.sum(1),
    }


def check_class_weights(weights: ClassWeights) -> None:
    """Check the weights of the classes in the loss.

    Raises:
        ModelError: If a weight is negative or not finite, or if all weights are 0.
    """
    if isinstance(weights, list) and not (all(0 <= w < float("inf") for w in weights) and any(weights)):
        raise ModelError(f"model.class_weights: {weights} must be finite and 0 or more, with one above 0.")


def loss_weights(weights: ClassWeights, class_names: Sequence[str], counts: Sequence[int] | None) -> Tensor | None:
    """Return the weight of each class in the training loss.

    Args:
        weights: `balanced`, a weight for each class, or None for equal weights.
        class_names: Names by label.
        counts: Number of training rows of each class; None if unknown.

    Returns:
        (classes,) float32. Balanced weights are n / (classes · count), as in scikit-learn; a class without rows has 0.

    Raises:
        ModelError: If a regression has weights, if the number of weights is not the number of classes, or if `balanced`
            has no counts.
    """
    if weights is None:
        return None
    if not class_names:
        raise ModelError("model.class_weights: a regression has no classes. Remove the key.")
    if weights == "balanced":
        if counts is None:
            raise ModelError(
                "model.class_weights: these data have no counts of their classes for `balanced`. Give a list."
            )
        count = torch.tensor(counts, dtype=torch.float64)
        return torch.where(count > 0, count.sum() / (len(counts) * count.clamp(min=1)), 0.0).float()
    if len(weights) != len(class_names):
        raise ModelError(
            f"model.class_weights: {counted(len(weights), 'weight')} for {counted(len(class_names), 'class')} "
            f"({', '.join(class_names)}). Give one weight for each class, in this order."
        )
    return torch.tensor(weights, dtype=torch.float32)


def named_probabilities(probabilities: Tensor, class_names: Sequence[str]) -> list[dict[str, float]]:
    """Return the probabilities of each sample by the name of the class, to six decimals.

    Args:
        probabilities: (batch, classes). The last classes may be missing: a batch from a bank has only the classes of
            the adapters in the batch.
        class_names: Names by label.
    """
    return [{name: round(p, 6) for name, p in zip(class_names, row, strict=False)} for row in probabilities.tolist()]
