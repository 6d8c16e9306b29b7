"""Export the adapter of a finished fit to the run directory, in PEFT's format."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.utilities import rank_zero_only

from app.callbacks.adapter_checkpoint import AdapterCheckpoint
from app.export.peft import write_peft
from app.run.checkpoint_io import read_checkpoint
from app.run.run_directory import ADAPTER
from app.run.trainers import find_callback
from datamodules.atomic import atomic_directory
from datamodules.errors import CheckpointError
from modules.adapters import AdapterError
from modules.base import AdaptedModule
from modules.training.checkpoints import CHAIN

_log = logging.getLogger(__name__)


class AdapterWriter(L.Callback):
    """Write adapter and head of the best checkpoint, or else of the last weights, to `adapter/` when a fit ends.

    A fit with another tuning than `adapter` writes nothing. If the folder cannot be written, a warning gives
    the reason, and the run ends as usual: the checkpoints hold the same weights.
    """

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the folder, and replace an earlier folder."""
        assert isinstance(pl_module, AdaptedModule)
        if pl_module.tuning != "adapter" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir) / ADAPTER
        callback = find_callback(trainer, AdapterCheckpoint)
        best = Path(callback.best_model_path if callback else "")
        try:
            if best.is_file():
                content = read_checkpoint(best)
                state, links = content["state_dict"], content.get(CHAIN, {}).get("links", [])
            else:
                state, links = pl_module.saved_state(), pl_module.chain.links
            with atomic_directory(folder, overwrite=True) as temporary:
                write_peft(pl_module, torch.float32, temporary, state, links)
        except (ArgumentError, AdapterError, CheckpointError, OSError, RuntimeError, KeyError) as error:
            _log.warning(f"The checkpoints are complete, but {folder} could not be written: {error}")
