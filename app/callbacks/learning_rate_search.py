"""Search for a learning rate with Lightning's range test, and draw the curve of the loss."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.parsing import lightning_setattr

from app.run.logger import log_picture, write_picture

FILE = "learning_rate.png"
SKIPPED = 10  # first steps, where the smoothed loss is of few batches
_log = logging.getLogger(__name__)


class LearningRateSearch(LearningRateFinder):
    """Try learning rates from 1e-5 to 0.3 in 100 steps. Choose the learning rate at the steepest decrease of the loss.

    The search takes 100 steps even if the fit is shorter. The search ends early if the loss exceeds four times the
    smallest loss. The learning rates of the parameter groups keep their ratios (Smith 2017, arXiv 1506.01186). Weights,
    optimizer and data are restored afterwards. RUN/learning_rate.png shows the loss over the learning rate.
    """

    def __init__(self) -> None:
        super().__init__(min_lr=1e-5, max_lr=0.3, num_training_steps=100, update_attr=False)

    def lr_find(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Search past the fit's last epoch and without validation. Set the learning rate, and draw the curve."""
        limits = trainer.fit_loop.max_epochs, trainer.check_val_every_n_epoch
        trainer.fit_loop.max_epochs = -1
        # None stays: the interval between validations may then be longer than an epoch
        trainer.check_val_every_n_epoch = limits[1] and sys.maxsize
        super().lr_find(trainer, pl_module)
        trainer.fit_loop.max_epochs, trainer.check_val_every_n_epoch = limits
        if self.optimal_lr is None:  # Lightning skips the search in a fast_dev_run
            return
        rates, losses = (self.optimal_lr.results[key] for key in ("lr", "loss"))
        suggestion = steepest_decrease(rates, losses)
        if suggestion is None:
            _log.warning("find_lr: the loss is not finite in enough steps. The learning rate stays as it was.")
        else:
            lightning_setattr(pl_module, "learning_rate", suggestion)
        self._draw(trainer, rates, losses, suggestion)

    @rank_zero_only
    def _draw(
        self, trainer: L.Trainer, rates: Sequence[float], losses: Sequence[float], suggestion: float | None
    ) -> None:
        from app.reports.range_test import draw_range_test  # so that other runs do not import matplotlib

        picture = draw_range_test(rates, losses, suggestion)
        path = Path(trainer.default_root_dir) / FILE
        write_picture(path, picture)
        _log.info(f"find_lr: {path} shows the training loss over the learning rate.")
        log_picture(trainer, "train/learning_rate_search", picture)


def steepest_decrease(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the learning rate at the steepest slope of the loss over the logarithm of the learning rate.

    The learning rates are tried in equal ratios. Over the learning rate itself, as in Lightning's suggestion, the same
    decrease is steeper at a smaller learning rate, so the suggestion is too small.

    Args:
        rates: Learning rates in the order of the steps, above 0.
        losses: Smoothed loss at each step. Steps with a loss that is not finite are left out.

    Returns:
        The learning rate; None with fewer than two steps after the first ten.
    """
    tried, loss = torch.tensor(rates)[SKIPPED:-1], torch.tensor(losses)[SKIPPED:-1]
    is_finite = loss.isfinite()
    tried, loss = tried[is_finite], loss[is_finite]
    if len(loss) < 2:
        return None
    (slopes,) = torch.gradient(loss, spacing=[tried.log()])
    return float(tried[slopes.argmin()])
