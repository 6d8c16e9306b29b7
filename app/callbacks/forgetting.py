"""Forgetting: scores of the pretrained backbone on data of another task, before and after a fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.errors import CallbackError, DataError
from modules.base import AdaptedModule
from modules.scaling.frozen_prefix import evaluating

_log = logging.getLogger(__name__)
HIGHER_IS_BETTER = {"knn_acc"}


class Forgetting(L.Callback):
    """Score the pretrained backbone on data of another task, before and after the fit.

    - Image classification: `knn_acc`, the accuracy of a 20-nearest-neighbour classifier on the backbone's features, by
      cosine similarity, for a second labelled set of images. No image counts among its own neighbours.
    - Instruction tuning: `loss` (nats a token) and `perplexity` on plain text. Each row is cut at 512 tokens, or at the
      backbone's limit if it is lower. All tokens after the first are predicted.

    `forgetting/before/<score>` belongs to the untouched backbone: the adapters are switched off. With tuning `full`
    this score is measured before the first step and kept in checkpoints. `forgetting/after/<score>` belongs to the
    weights that are tested: the best checkpoint with `test_after_fit`, else the last weights. `forgetting/<score>` is
    the loss of ability: before minus after for `knn_acc`, after minus before for `loss` and `perplexity`. Tuning `head`
    gives 0.

    The scores draw no random numbers and change nothing of the fit. In a distributed run every process scores all rows.

    Args:
        path: Data to score on; None scores nothing. Images: the training split of anything that
            `ImageClassificationData` reads. Text: the test, else validation, else training split of a file, a
            directory of tables, or a name on the hub.
        rows: Size of a seeded sample of the rows; more than 20 for images.
        text_column: Column of the text in a table.
    """

    def __init__(self, path: str | None = None, rows: int = 1000, text_column: str = "text") -> None:
        if rows < 1:
            raise CallbackError(f"forgetting.rows: {rows} must be 1 or more.")
        self.path, self.rows, self.text_column = path, rows, text_column
        self._source = [path, rows, text_column]
        self.waits_for_test = False  # True if the best checkpoint is tested after the fit
        self.values: dict[str, float] = {}  # figures for metrics.json
        self._probe: Callable[[AdaptedModule], dict[str, float]] | None = None
        self._keeps_before = False  # True if the scores before the fit cannot be measured again
        self._before: dict[str, float] = {}
        self._saved: dict[str, Any] = {}  # state from a checkpoint
        self._seconds = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the data before training.

        Raises:
            CallbackError: If the task has no score of forgetting, or the data cannot be used.
        """
        if self.path is None or stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, AdaptedModule)
        self._keeps_before = pl_module.tuning == "full"
        from app.callbacks.forgetting_probes import open_probe  # imports image readers, which other runs do not need

        with _renamed_keys():
            self._probe = open_probe(pl_module, self.path, self.rows, self.text_column)

    # --------------------------------------------------------------------------------------------------- measurement

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the untouched backbone."""
        if self._probe is None:
            return
        assert isinstance(pl_module, AdaptedModule)
        if self._keeps_before and trainer.ckpt_path is not None:
            self._before = self._scores_of_checkpoint()
            if not self._before:
                _log.warning(
                    "forgetting.path: the checkpoint has no scores of these rows from before the fit, and full tuning "
                    "has changed the backbone since. Nothing is scored."
                )
                self._probe = None
            return
        with pl_module.pretrained():
            self._before = self._score(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the last weights, unless a test follows. A resumed run with nothing left to train is scored too.

        `RunSummary` has written the figures of training already, so a stop during the scoring loses no figure.
        """
        if not self.waits_for_test:
            self._finish(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the tested weights."""
        if trainer.state.fn == TrainerFn.TESTING:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Score the current backbone, and log all figures."""
        if not self._before or self._probe is None:
            return
        assert isinstance(module, AdaptedModule)
        after = self._score(trainer, module)
        values = self.values
        for name, before in self._before.items():
            sign = 1 if name in HIGHER_IS_BETTER else -1
            values |= {f"forgetting/before/{name}": before, f"forgetting/after/{name}": after[name]}
            values[f"forgetting/{name}"] = sign * (before - after[name])
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        values["time/forgetting_seconds"] = round(self._seconds, 2)
        self._probe = None  # score once

    def _score(self, trainer: L.Trainer, module: AdaptedModule) -> dict[str, float]:
        assert self._probe is not None
        start = time.perf_counter()
        uncompiled: Any = torch.compiler.set_stance("force_eager") if module.compiles else nullcontext()
        with _renamed_keys(), evaluating(module), uncompiled, trainer.precision_plugin.forward_context():
            scores = self._probe(module)
        self._seconds += time.perf_counter() - start
        return scores

    # --------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return the scores before the fit, if they cannot be measured again."""
        return {"before": self._before, "source": self._source} if self._keeps_before and self._before else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the fit starts."""
        self._saved = state_dict

    def _scores_of_checkpoint(self) -> dict[str, float]:
        """Return the scores before the fit from the resumed checkpoint; empty if the scores belong to other rows."""
        before = self._saved.get("before")
        if self._saved.get("source") != self._source or not isinstance(before, dict):
            return {}
        return {str(name): float(value) for name, value in before.items() if isinstance(value, float)}


@contextmanager
def _renamed_keys() -> Iterator[None]:
    """Replace the keys of data modules by the keys of this callback in errors of the data readers.

    Raises:
        CallbackError: Instead of a DataError.
    """
    try:
        yield
    except DataError as error:
        message = str(error)
        for key in ("path", "text_column"):
            message = message.replace(f"data.{key}", f"forgetting.{key}")
        raise CallbackError(message) from error
