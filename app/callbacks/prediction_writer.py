"""Write predictions as tables in the run directory."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from app.console import escape_controls
from datamodules.atomic import atomic_write_text
from datamodules.base import ResumableDataModule
from datamodules.contract import HasPredictionFiles
from datamodules.errors import DataError, counted

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class PredictionWriter(BasePredictionWriter):
    """Write predictions in the order of the data. `predict_step` returns a dict of columns, with `index`.

    A data module may name the files and complete their rows (`datamodules.contract.HasPredictionFiles`). Otherwise
    everything but the index goes to `predictions.csv`.

    Files of an earlier prediction stay: later files are called `predictions-1.csv`, `predictions-2.csv`, …
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather the rows of all processes and write them on rank zero."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        files, complete = ["predictions.csv"], _without_index
        if isinstance(data, HasPredictionFiles):
            files, complete = list(data.prediction_files), data.complete_prediction
        paths = unused_paths(Path(trainer.default_root_dir), files)
        for number, (path, batches) in enumerate(
            zip(paths, predictions if len(files) > 1 else [predictions], strict=True)
        ):
            rows = [
                dict(zip(batch, cells, strict=True)) for batch in batches for cells in zip(*batch.values(), strict=True)
            ]
            shares: list[Any] = [rows]
            if trainer.world_size > 1:
                shares = [None] * trainer.world_size
                torch.distributed.all_gather_object(shares, rows)
            failed = data.failed_rows(number) if isinstance(data, ResumableDataModule) else []
            ordered = sorted([*(row for share in shares for row in share), *failed], key=lambda row: row["index"])
            _check_errors(ordered)
            if trainer.is_global_zero:
                write_rows(path, [complete(row, number) for row in ordered])
                kept = "" if path.name == files[number] else f" ({files[number]} of an earlier prediction is kept)"
                _log.info(f"{counted(len(ordered), 'prediction')}: {path}{kept}")
                if len(ordered) == 1:  # one cell a line
                    for name, cell in _flat(complete(ordered[0], number)).items():
                        print(escape_controls(f"{name}: {cell}"))


def _check_errors(rows: list[Row]) -> None:
    """Warn of unusable inputs. If any input is unusable, give all rows a column `error`.

    Raises:
        DataError: If no row has a prediction.
    """
    errors = [row["error"] for row in rows if row.get("error")]
    if errors and len(errors) == len(rows):
        raise DataError(
            f"data.predict_path: none of {counted(len(rows), 'input')} can be used; the first: {errors[0]}."
        )
    if errors:
        _log.warning(
            f"{len(errors):,} of {len(rows):,} inputs could not be predicted; the column `error` gives the reason."
        )
        for row in rows:
            row.setdefault("error", "")


def unused_paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return a path for each name, all with the same number after their stems: the smallest unused number."""

    def numbered(number: int) -> list[Path]:
        suffix = f"-{number}" if number else ""
        return [folder / f"{Path(name).stem}{suffix}{Path(name).suffix}" for name in names]

    return next(paths for paths in map(numbered, itertools.count()) if not any(map(os.path.lexists, paths)))


def _without_index(row: Row, file: int) -> Row:
    return {key: value for key, value in row.items() if key != "index"}


def _flat(row: Row) -> Row:
    """Return a row without nested cells."""
    cells = {key: value for key, value in row.items() if key != "probabilities"}
    by_class = {f"probability_{name}": share for name, share in row.get("probabilities", {}).items()}
    return {
        key: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for key, v in cells.items()
    } | by_class


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows atomically, in the format of the suffix: .csv, .tsv or .jsonl.

    In CSV and TSV, `probabilities` by class become a column for each class.
    """
    if path.suffix != ".jsonl":
        rows = [_flat(row) for row in rows]
    with atomic_write_text(path) as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.DictWriter(
            file,
            fieldnames=sorted(dict.fromkeys(name for row in rows for name in row), key="error".__eq__),  # error last
            dialect="excel-tab" if path.suffix == ".tsv" else "excel",
            lineterminator="\n",
        )
        writer.writeheader()
        writer.writerows(rows)
