"""Write the configuration of a run into the run directory."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from datamodules.atomic import atomic_write

FILE = "config.yaml"


class SaveRunConfig(SaveConfigCallback):
    """Write the complete configuration to config.yaml when a fit begins.

    A configuration that changes is kept in a file named by the date of writing, such as config-20261128T145200.yaml.
    A configuration changes by resuming with other keys, and by `find_lr`, whose result replaces
    `model.learning_rate`. A run that has nothing left to train keeps its configuration.
    """

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the configuration of a new run."""
        path = Path(trainer.default_root_dir) / FILE
        self.is_new = stage == "fit" and not path.exists()
        if self.is_new:
            _write(path, self._content())

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace a configuration that has changed."""
        path = Path(trainer.default_root_dir) / FILE
        if self.config["find_lr"]:  # The search has ended.
            self.config["find_lr"] = False
            self.config["model.init_args.learning_rate"] = float(pl_module.learning_rate)  # type: ignore[arg-type]
        elif self.is_new:  # `save_config` has written the same content.
            return
        if trainer.fast_dev_run or not path.exists() or path.read_bytes() == self._content():  # type: ignore[attr-defined]
            return
        date = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%dT%H%M%S")
        _write(path.with_name(f"config-{date}.yaml"), path.read_bytes())
        _write(path, self._content())

    def _content(self) -> bytes:
        """Return the configuration without the checkpoint, so that it is a recipe for new runs."""
        config = self.config.clone()
        config["ckpt_path"] = None
        return self.parser.dump(config, skip_none=False, skip_validation=True).encode()


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
