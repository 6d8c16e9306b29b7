"""Predictions as a table in the run directory."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from rich import print as rich_print


class PredictionWriter(BasePredictionWriter):
    """Write what `predict_step` returns, a dict of columns for each batch, to `predictions.csv`."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather the rows of all processes in the order of the data and write them on rank zero."""
        rows = [
            dict(zip(batch, cells, strict=True)) for batch in predictions for cells in zip(*batch.values(), strict=True)
        ]
        shares: list[Any] = [rows]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, rows)
        if not trainer.is_global_zero:
            return
        # rank k holds rows k, k + world, k + 2·world, …
        longest = max(len(share) for share in shares)
        ordered = [share[i] for i in range(longest) for share in shares if i < len(share)]
        path = Path(trainer.default_root_dir) / "predictions.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(ordered[0]))
            writer.writeheader()
            writer.writerows(ordered)
        rich_print(f"{len(ordered)} predictions: {path}")
