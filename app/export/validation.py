"""Score a loaded run on its validation split, with the data of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from jsonargparse import ArgumentError

from app.config.constructors import construct
from app.run.checkpoint_io import read_checkpoint, saved_configuration
from modules.base import AdaptedModule


def load_data(checkpoint: Path) -> L.LightningDataModule:
    """Return the data module of a checkpoint.

    Raises:
        ArgumentError: If the checkpoint does not name its data.
    """
    saved = saved_configuration(read_checkpoint(checkpoint)).get("data")
    if saved is None:
        raise ArgumentError(None, f"--validate: {checkpoint} does not name its data. Export without --validate.")
    return construct(L.LightningDataModule, saved)


def validation_scores(module: AdaptedModule, data: L.LightningDataModule) -> dict[str, float]:
    """Return the metrics of the validation split by logged name. The module returns to the CPU and to eval mode."""
    trainer = L.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, devices=1
    )
    results = trainer.validate(module, datamodule=data, verbose=False)
    module.cpu().eval()
    return {name: float(torch.as_tensor(value)) for result in results for name, value in result.items()}
