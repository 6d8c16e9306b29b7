"""Log the findings of the data module, and list the rows that it skipped."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import lightning as L

from datamodules.atomic import atomic_write_text
from datamodules.base import ResumableDataModule
from datamodules.errors import counted
from datamodules.sources.findings import SkippedRow

FILE = "skipped.csv"
FEW_STEPS = 50  # a fit with fewer optimizer steps gets a warning
_log = logging.getLogger(__name__)


class DataReport(L.Callback):
    """Log the splits, classes and assumptions of the data before the first batch.

    RUN/skipped.csv lists the skipped rows, if there are any. The file keeps the rows that an earlier command skipped in
    other splits.
    """

    def __init__(self) -> None:
        self._reported = 0
        self._counted = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Report once the data module is set up."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ResumableDataModule) or not trainer.is_global_zero:
            return
        for line in data.findings.take_lines():
            _log.info(line)
        skipped = data.findings.skipped
        if len(skipped) > self._reported:  # the test after a fit may have skipped no further rows
            self._reported = len(skipped)
            path = Path(trainer.default_root_dir) / FILE
            _log.warning(
                f"{counted(len(skipped), 'bad row is', 'bad rows are')} skipped; {path} lists the skipped rows."
            )
            splits = {row.split for row in skipped}
            kept = [row for row in _read(path) if row.split not in splits]
            with atomic_write_text(path) as file:
                csv.writer(file, lineterminator="\n").writerows([SkippedRow._fields, *kept, *skipped])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of a fit with few optimizer steps, unless `trainer.max_steps` sets their number."""
        if self._counted or not trainer.is_global_zero or trainer.max_steps != -1 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._counted = True
        steps = trainer.estimated_stepping_batches
        if steps < FEW_STEPS:
            _log.warning(
                f"The whole fit has {counted(int(steps), 'optimizer step')}, which may be too few to learn from. Lower "
                "data.batch_size, or raise trainer.max_epochs."
            )


def _read(path: Path) -> list[SkippedRow]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [SkippedRow(*row) for row in list(csv.reader(file))[1:] if len(row) == len(SkippedRow._fields)]
