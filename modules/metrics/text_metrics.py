"""The metrics that GLUE and its like are scored by, from torchmetrics."""

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
    """F1 of the class with label 1, of logits (batch, 2): as GLUE scores MRPC and QQP."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch: logits (batch, 2) and labels (batch,)."""
        super().update(preds.argmax(-1), target)


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews' correlation of logits (batch, classes), 0 for a constant guess, as GLUE scores CoLA.

    It counts a class more than there are, which nothing is in: of exactly two classes torchmetrics would give a
    constant guess a small number of either sign instead.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes + 1)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch: logits (batch, classes) and labels (batch,)."""
        super().update(preds.argmax(-1), target)


CLASSIFICATION: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: PositiveF1() if classes == 2 else MulticlassF1Score(classes, average="macro"),
    "macro_f1": lambda classes: MulticlassF1Score(classes, average="macro"),
    "matthews": Matthews,
}
REGRESSION: dict[str, Callable[[], Metric]] = {"pearson": PearsonCorrCoef, "spearman": SpearmanCorrCoef}


def build_metrics(names: Sequence[str], classes: int) -> MetricCollection:
    """A collection of metrics.

    Args:
        names: Of `accuracy`, `f1` (of label 1 if there are two classes, otherwise the macro average), `macro_f1`,
            `matthews`, or, in regression, `pearson` and `spearman`.
        classes: Number of classes; 0 for regression.

    Raises:
        ModelError: If there is none, or one that is not for this kind of task.
    """
    known = list(CLASSIFICATION if classes else REGRESSION)
    if not names or (wrong := [name for name in names if name not in known]):
        given = ", ".join(wrong) if names else "[]"
        kind = f"classification into {classes} classes" if classes else "regression"
        raise ModelError(f"model.metrics: {given} is not for {kind}; choose from {', '.join(known)}.")
    built: dict[str, Metric | MetricCollection] = {
        name: CLASSIFICATION[name](classes) if classes else REGRESSION[name]() for name in names
    }
    return MetricCollection(built, compute_groups=False)
