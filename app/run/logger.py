"""TensorBoard logger of a run directory."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from datamodules.atomic import atomic_write


class RunLogger(TensorBoardLogger):
    """Write hparams.yaml atomically: Lightning's logger writes it in place and follows links."""

    @rank_zero_only
    def save(self) -> None:
        """Flush the events and write hparams.yaml once."""
        path = Path(self.log_dir) / self.NAME_HPARAMS_FILE
        if not path.is_file():
            with atomic_write(path) as file:
                save_hparams_to_yaml(str(file.name), self.hparams)
        super().save()  # leaves a file that exists as it is
