"""Picture of the confusion matrix of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L
from torchmetrics import Metric

from app.run.logger import log_picture, write_picture

FILE = "confusion_matrix.png"


@runtime_checkable
class HasConfusion(Protocol):
    """A module that counts a confusion matrix in a test.

    Args:
        confusion: Metric that computes the matrix, (classes, classes), a row for each true class.
        class_names: Names by label.
    """

    confusion: Metric
    class_names: list[str] | None


class ConfusionPicture(L.Callback):
    """Draw the confusion matrix in the run directory and for the loggers."""

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the picture when all batches are counted."""
        if not isinstance(pl_module, HasConfusion):
            return
        matrix = pl_module.confusion.compute()  # on every rank, since compute gathers
        if not trainer.is_global_zero or matrix.sum() == 0:
            return
        from app.reports.confusion import draw_confusion  # a run without a test imports no matplotlib

        picture = draw_confusion(matrix, pl_module.class_names or ())
        write_picture(Path(trainer.default_root_dir) / FILE, picture)
        log_picture(trainer, "test/confusion_matrix", picture)
