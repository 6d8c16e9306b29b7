"""Table of precision, recall, F1 and support of each class in a test."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L

from app.callbacks.confusion_picture import HasConfusion
from datamodules.atomic import atomic_write_text
from modules.metrics.classification import class_scores

FILE = "per_class.csv"


class ClassScores(L.Callback):
    """Write RUN/per_class.csv: a row for each class with its precision, recall, F1 and support."""

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table when all batches are counted."""
        if not isinstance(pl_module, HasConfusion):
            return
        scores = class_scores(pl_module.confusion.compute().cpu())  # on every rank, since compute gathers
        if not trainer.is_global_zero or not scores["support"].any():
            return
        with atomic_write_text(Path(trainer.default_root_dir) / FILE) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["class", *scores])
            for name, *row in zip(pl_module.class_names or (), *(s.tolist() for s in scores.values()), strict=True):
                table.writerow([name, *(round(value, 6) for value in row)])
