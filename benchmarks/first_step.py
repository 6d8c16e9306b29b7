"""Callback that ends a fit after its first step, for `benchmarks.startup`."""

from __future__ import annotations

import os
import shutil
from typing import Any

import lightning as L


class EndAtFirstStep(L.Callback):
    """End the process after the first step, and remove the run directory."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Exit at once, and skip the end of training."""
        shutil.rmtree(trainer.default_root_dir, ignore_errors=True)
        os._exit(0)
