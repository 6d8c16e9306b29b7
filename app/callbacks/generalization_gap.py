"""Difference between the metrics on training rows and on held-out rows, at the end of a fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Sized
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from app.callbacks.termination import Termination
from app.run.trainers import metrics_of
from datamodules.base import ResumableDataModule
from datamodules.errors import CallbackError, counted

_log = logging.getLogger(__name__)


class GeneralizationGap(L.Callback):
    """Measure the generalization gap: how much better the metrics are on training rows than on held-out rows.

    A sample of the training rows is evaluated as the held-out rows are: in eval mode, without augmentation, dropout or
    packing, by the same metrics. `train_eval/<metric>` is the metric on the sample. `gap/<metric>` is
    `train_eval/<metric>` minus `test/<metric>` after a fit with `test_after_fit`, and minus `val/<metric>` after any
    other fit. If the model overfits, the gap of an accuracy is positive, and the gap of a loss is negative.

    The sample and the held-out rows are evaluated with the same weights: the best checkpoint with `test_after_fit`,
    else the last weights. If the last validation evaluated earlier weights, there is no gap. The sample depends only on
    the rows and on `rows`, so that runs with other seeds are measured on the same rows.

    The measurement begins when everything else of the fit is saved, and changes nothing of the fit. The
    measurement takes about as long as one validation.

    Args:
        rows: Largest number of training rows, 0 or more; 0 measures nothing. The sample is at most as large as the
            validation data.
    """

    def __init__(self, rows: int = 1000) -> None:
        if rows < 0:
            raise CallbackError(f"generalization.rows: {rows} must be 0 or more.")
        self.rows = rows
        self._split = "val"  # split that the sample is compared with
        self._step = -1  # step of the weights that `_held_out` belongs to
        self._held_out: dict[str, float] = {}
        self._trains = False
        self._validation_rows = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember that training ran. A finished run that is resumed trains nothing, and keeps its figures."""
        self._trains = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the rows of the validation now, since a test removes the loaders of the validation."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ResumableDataModule):
            self._validation_rows = _validation_rows(trainer, data.batch_size)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the metrics of the newest validation of a fit."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._remember(trainer, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the metrics of the test after a fit."""
        self._remember(trainer, "test")

    def _remember(self, trainer: L.Trainer, split: str) -> None:
        self._split, self._step = split, trainer.global_step
        metrics = trainer.callback_metrics.items()
        self._held_out = {key: value.item() for key, value in metrics if key.startswith(f"{split}/")}

    def measure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        """Evaluate the sample after a fit and its test, and log the metrics.

        Returns:
            `train_eval/<metric>`, `gap/<metric>` and `time/generalization_seconds`; empty if nothing is measured.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self.rows or not self._trains or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return {}
        if not isinstance(data, ResumableDataModule):
            _log.info(
                f"generalization.rows: {type(data).__name__} gives no sample of its training rows. No gap is measured."
            )
            return {}
        start = time.perf_counter()
        step, split = trainer.global_step, self._split
        rows = int(min(self.rows, self._validation_rows or self.rows))
        if rows < trainer.world_size:
            _log.info(
                f"generalization.rows: {counted(rows, 'row')} cannot give a row to each process. No gap is measured."
            )
            return {}
        metrics = _evaluate(trainer, module, TrainingSample(data, rows), split)
        if not metrics:
            _log.info(
                f"generalization.rows: trainer.limit_{split}_batches leaves no batch to evaluate. No gap is measured."
            )
            return {}
        values = {f"train_eval/{name}": value for name, value in metrics.items()}
        if step == self._step:
            held_out = {key.removeprefix(f"{split}/"): value for key, value in self._held_out.items()}
            values |= {f"gap/{name}": metrics[name] - held_out[name] for name in metrics if name in held_out}
        elif self._step >= 0:
            _log.info(
                f"generalization.rows: the last validation was of step {self._step}, and the fit has ended at step "
                f"{step}. The metrics on training rows are logged without a gap."
            )
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
            logger.finalize("success")
        return values | {"time/generalization_seconds": round(time.perf_counter() - start, 2)}


class TrainingSample(L.LightningDataModule):
    """A data module whose validation and test rows are a fixed sample of another data module's training rows.

    Args:
        data: The data module, set up for `fit`.
        rows: Largest number of rows.
    """

    def __init__(self, data: ResumableDataModule, rows: int) -> None:
        super().__init__()
        self.data, self.rows = data, rows

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the sample."""
        return self.data.training_sample(self.rows)

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Prepare a batch as the data module does."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)


def _validation_rows(trainer: L.Trainer, batch_size: int) -> float:
    """Return the number of rows in a validation of a fit. The last batch of a loader may be smaller than the others."""
    loaders = trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    rows = 0.0
    # Without a validation, num_val_batches is empty.
    for batches, loader in zip(trainer.num_val_batches, loaders, strict=False):
        most = batches * batch_size * trainer.world_size
        is_sized = isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized)
        rows += min(most, len(loader.dataset)) if is_sized else most
    return rows


def _evaluate(trainer: L.Trainer, module: L.LightningModule, sample: TrainingSample, split: str) -> dict[str, float]:
    """Return the metrics of the current weights by name, without the prefix of the split.

    Other callbacks and loggers would mistake the metrics for metrics of the split, so only `Termination` is called.
    """
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks = [callback for callback in callbacks if isinstance(callback, Termination)]  # type: ignore[attr-defined]
    trainer.loggers = []
    try:
        evaluate = trainer.test if split == "test" else trainer.validate
        results = evaluate(module, datamodule=sample, verbose=False)
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
    return {key.removeprefix(f"{split}/"): value for key, value in metrics_of(results).items()}
