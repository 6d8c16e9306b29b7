"""Loggers of a run: TensorBoard's in the run directory, and pictures, texts and results for every logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from datamodules.atomic import atomic_write
from datamodules.errors import UsageError


class RunLogger(TensorBoardLogger):
    """TensorBoard logger that writes hparams.yaml atomically. Lightning's logger writes in place and follows links."""

    @rank_zero_only
    def save(self) -> None:
        """Flush the events and write hparams.yaml once."""
        path = Path(self.log_dir) / self.NAME_HPARAMS_FILE
        if not path.is_file():
            with atomic_write(path) as file:
                save_hparams_to_yaml(str(file.name), self.hparams)
        super().save()  # does not overwrite hparams.yaml


def check_loggers(loggers: Sequence[Logger]) -> None:
    """Refuse MLflow's file store. A metric is a file there, and `lr-AdamW/head` would be a file and a folder.

    Raises:
        UsageError: If a logger writes to the file store.
    """
    for logger in loggers:
        if isinstance(logger, MLFlowLogger) and logger.save_dir is not None:
            raise UsageError(
                f"trainer.logger.tracking_uri: MLflow's file store {logger.save_dir} cannot hold the names of the "
                "learning rates. Set the key to a server or a database, such as sqlite:///mlflow.db."
            )


def log_picture(trainer: L.Trainer, tag: str, picture: np.ndarray, file: str | None = None) -> None:
    """Log a picture at the trainer's step. Only rank zero may call this function, which writes files.

    Args:
        trainer: Trainer whose loggers get the picture.
        tag: Name of the picture.
        picture: (height, width, 3) uint8.
        file: PNG file in the run directory for the newest picture, if a logger takes no pictures, such as CSVLogger.
    """
    for logger in trainer.loggers:
        step = trainer.global_step
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [picture], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, picture, key=tag, step=step)
        elif file is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_picture(Path(trainer.default_root_dir) / file, picture)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture, (height, width, 3) uint8, to a PNG file atomically."""
    with atomic_write(path) as file:
        Image.fromarray(picture).save(file, "PNG")


def log_text(trainer: L.Trainer, tag: str, text: str) -> None:
    """Log a text in Markdown to every logger that takes texts, on rank zero."""
    for logger in trainer.loggers:
        step = trainer.global_step
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(tag, ["text"], [[text]], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{tag}-{step}.md")


def log_results(trainer: L.Trainer, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
    """Log settings and final metrics of a run, for TensorBoard's HParams tab and other loggers' tables of runs."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(settings), dict(results), trainer.global_step)
        else:
            logger.log_hyperparams(dict(settings))
            logger.log_metrics(dict(results), trainer.global_step)
        logger.save()


def viewer_hint(logger: Logger) -> str:
    """Return the command, file or address that shows what a logger has logged."""
    if isinstance(logger, TensorBoardLogger):
        return f"tensorboard --logdir {Path(logger.log_dir)}"
    if isinstance(logger, CSVLogger):
        return str(logger.experiment.metrics_file_path)
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        return f"wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)
    if isinstance(logger, MLFlowLogger):
        return f"mlflow ui --backend-store-uri {logger.experiment.tracking_uri}"
    return f"{type(logger).__name__} {logger.save_dir or ''}".rstrip()
