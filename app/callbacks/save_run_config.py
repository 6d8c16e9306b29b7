"""Write the configuration of a run into the run directory."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from datamodules.atomic import atomic_write


class SaveRunConfig(SaveConfigCallback):
    """Write the complete configuration: config.yaml of a new run, config-1.yaml of its first resume, and so on."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the configuration when a fit begins."""
        if stage != "fit":
            return
        path = Path(trainer.default_root_dir) / "config.yaml"
        if path.exists():
            path = path.with_name(f"config-{len(list(path.parent.glob('config*.yaml')))}.yaml")
        with atomic_write(path) as file:
            file.write(self.parser.dump(self.config, skip_none=False).encode())
