"""Score a loaded run on its validation split, with the data of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from app.config.constructors import construct
from app.run.checkpoint_io import read_checkpoint, saved_configuration
from app.run.trainers import metrics_of, quiet_trainer
from datamodules.errors import UsageError
from modules.base import AdaptedModule


def load_data(checkpoint: Path) -> L.LightningDataModule:
    """Return the data module of a checkpoint.

    Raises:
        UsageError: If the checkpoint does not name its data.
    """
    saved = saved_configuration(read_checkpoint(checkpoint)).get("data")
    if saved is None:
        raise UsageError(f"--validate: {checkpoint} does not name its data. Export without --validate.")
    return construct(L.LightningDataModule, saved)


def validation_scores(module: AdaptedModule, data: L.LightningDataModule) -> dict[str, float]:
    """Return the metrics of the validation split by logged name. The module returns to the CPU and to eval mode."""
    results = quiet_trainer().validate(module, datamodule=data, verbose=False)
    module.cpu().eval()
    return metrics_of(results)
