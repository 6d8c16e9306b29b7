"""Record the validations of a trial for its sweep."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from app.callbacks.adapter_checkpoint import AdapterCheckpoint
from app.run.processes import SWEEP_PROCESS
from app.run.trainers import find_callback
from datamodules.contract import HasTestSplit
from datamodules.errors import CallbackError


class MetricRecorder(L.Callback):
    """Append a metric of each validation to a file of JSON lines, and stop the run when its sweep has ended.

    The first line of each attempt has four keys: `started`, the step at which the attempt starts; `steps`, the last
    step of the fit; `monitor` and `mode` of the best checkpoint. Each validation adds a line with `step`, `value` of
    the metric, and the value of the monitor. Values that are not finite are null.

    Args:
        path: The file.
        metric: Name of the metric, such as `val/score`.
        check_test: If true, refuse data without a test split, since a later trial is tested.
    """

    def __init__(self, path: str, metric: str, check_test: bool = False) -> None:
        self.path, self.metric, self.check_test = Path(path), metric, check_test
        self._sweep_process = int(os.environ.get(SWEEP_PROCESS, 0))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the test split if a later trial is tested."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and self.check_test and isinstance(data, HasTestSplit):
            data.check_test_split()

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that training begins."""
        checkpoint = _checkpoint(trainer)
        steps = trainer.estimated_stepping_batches
        line = {"started": trainer.global_step, "steps": int(steps) if steps < float("inf") else None}
        self._append(line | {"monitor": checkpoint.monitor, "mode": checkpoint.mode})

    @rank_zero_only
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop as on SIGTERM if the process of the sweep has ended."""
        if self._sweep_process and os.getppid() != self._sweep_process:
            self._sweep_process = 0
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the metric.

        Raises:
            CallbackError: If the model does not log the metric; the sanity check before training raises this error.
        """
        if trainer.state.fn != "fit":
            return
        logged = trainer.callback_metrics
        if self.metric not in logged:
            names = ", ".join(sorted(name for name in logged if name.startswith("val/"))) or "none"
            raise CallbackError(f"select.metric: {self.metric} is not logged at validation. Choose one of {names}.")
        if not trainer.sanity_checking and trainer.is_global_zero:
            checkpoint = _checkpoint(trainer)
            values = {"value": self.metric, "monitor": checkpoint.monitor}
            line = {key: _finite(logged.get(str(name))) for key, name in values.items()}
            self._append({"step": trainer.global_step, **line})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _checkpoint(trainer: L.Trainer) -> AdapterCheckpoint:
    checkpoint = find_callback(trainer, AdapterCheckpoint)
    assert checkpoint is not None  # the command line adds the callback to every run
    return checkpoint


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and value.isfinite() else None
