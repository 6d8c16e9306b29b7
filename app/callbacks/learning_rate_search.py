"""Search for a learning rate with Lightning's range test, and draw the curve of the loss."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_only

from app.run.logger import log_picture, write_picture

FILE = "learning_rate.png"
_log = logging.getLogger(__name__)


class LearningRateSearch(LearningRateFinder):
    """Try learning rates from 1e-5 to 0.3 in 100 steps. Choose the learning rate at the steepest decrease of the loss.

    The search ends early if the loss exceeds four times the smallest loss.
    The learning rates of the parameter groups keep their ratios (Smith 2017, arXiv 1506.01186). Weights, optimizer and
    data are restored afterwards. RUN/learning_rate.png shows the loss over the learning rate.
    """

    def __init__(self) -> None:
        super().__init__(min_lr=1e-5, max_lr=0.3, num_training_steps=100)

    def lr_find(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Search, then draw the curve."""
        super().lr_find(trainer, pl_module)
        self._draw(trainer)

    @rank_zero_only
    def _draw(self, trainer: L.Trainer) -> None:
        if self.optimal_lr is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        from app.reports.range_test import draw_range_test  # so that other runs do not import matplotlib

        results = self.optimal_lr.results
        picture = draw_range_test(results["lr"], results["loss"], self.optimal_lr.suggestion())
        path = Path(trainer.default_root_dir) / FILE
        write_picture(path, picture)
        _log.info(f"find_lr: {path} shows the training loss over the learning rate.")
        log_picture(trainer, "train/learning_rate_search", picture)
