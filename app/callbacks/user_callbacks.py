"""Validate the callbacks of a configuration: refuse callbacks of Lightning that do not work with adapters."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from app.callbacks.adapter_averaging import TrainedWeightAveraging
from datamodules.errors import CallbackError

_log = logging.getLogger(__name__)

REFUSED: dict[type[L.Callback], str] = {
    StochasticWeightAveraging: "copies the frozen backbone and replaces the learning rate schedule. Use "
    "WeightAveraging or EMAWeightAveraging instead.",
    GradientAccumulationScheduler: "changes the number of steps of an epoch, which the learning rate schedule "
    "and a resumed run take as constant. Use trainer.accumulate_grad_batches instead.",
    BackboneFinetuning: "freezes the backbone together with its adapters. Use model.tuning instead: adapter, head or "
    "full.",
    ModelPruning: "replaces the weights by masked copies, which no checkpoint or export holds. Remove the callback.",
}


def usable_callbacks(callbacks: Sequence[L.Callback], resumes: bool) -> list[L.Callback]:
    """Return the callbacks of a configuration that a run uses.

    Weight averaging of Lightning is wrapped, so that it averages the trained weights alone.

    Lightning's finders search at the start of a fit. A resumed run skips the finders with a log message, since the
    checkpoint has their result.

    Raises:
        CallbackError: For a callback that would leave wrong checkpoints or a wrong schedule.
    """
    for callback in callbacks:
        for refused, reason in REFUSED.items():
            if isinstance(callback, refused):
                raise CallbackError(f"trainer.callbacks: {type(callback).__name__} {reason}")
    finders = [c for c in callbacks if resumes and isinstance(c, LearningRateFinder | BatchSizeFinder)]
    for finder in finders:
        _log.info(f"trainer.callbacks: {type(finder).__name__} is skipped: the checkpoint has its result.")
    return [
        TrainedWeightAveraging(callback) if isinstance(callback, WeightAveraging) else callback
        for callback in callbacks
        if callback not in finders
    ]
