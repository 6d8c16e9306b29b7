"""Metrics of text classification and regression, as GLUE defines the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from datamodules.errors import ModelError


class PositiveF1(BinaryF1Score):
    """F1 score of label 1, as in GLUE's MRPC and QQP."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits (batch, 2) and labels (batch,)."""
        super().update(preds.argmax(-1), target)


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation, as in GLUE's CoLA; 0 for a constant prediction.

    The metric counts one extra class, which never occurs. With exactly two classes, torchmetrics would give a constant
    prediction a small nonzero correlation.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes + 1)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits (batch, classes) and labels (batch,)."""
        super().update(preds.argmax(-1), target)


CLASSIFICATION: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: PositiveF1() if classes == 2 else MulticlassF1Score(classes, average="macro"),
    "macro_f1": lambda classes: MulticlassF1Score(classes, average="macro"),
    "matthews": Matthews,
}
REGRESSION: dict[str, Callable[[], Metric]] = {"pearson": PearsonCorrCoef, "spearman": SpearmanCorrCoef}


def build_metrics(names: Sequence[str], classes: int) -> MetricCollection:
    """Return a collection of metrics.

    Args:
        names: For classification `accuracy`, `f1` (of label 1 with two classes, otherwise the macro average),
            `macro_f1` and `matthews`; for regression `pearson` and `spearman`.
        classes: Number of classes; 0 for regression.

    Raises:
        ModelError: If the list is empty, or a metric is not for this kind of task.
    """
    known = list(CLASSIFICATION if classes else REGRESSION)
    if not names or (wrong := [name for name in names if name not in known]):
        rejected = ", ".join(wrong) if names else "[]"
        kind = f"classification into {classes} classes" if classes else "regression"
        raise ModelError(f"model.metrics: {rejected} is not for {kind}. Choose from {', '.join(known)}.")
    built: dict[str, Metric | MetricCollection] = {
        name: CLASSIFICATION[name](classes) if classes else REGRESSION[name]() for name in names
    }
    return MetricCollection(built, compute_groups=False)
