"""Trainers for tests of models and data: a quiet trainer, and stubs with the attributes that a data module reads."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader


def quiet_trainer(**keys: Any) -> L.Trainer:
    """Return a trainer on the CPU that prints nothing and writes no files. By default it trains for one epoch."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    epochs = {} if keys.keys() & {"max_epochs", "max_steps"} else {"max_epochs": 1}
    return L.Trainer(accelerator="cpu", **{**dict.fromkeys(silent, False), **epochs, **keys})


def ready_loader(batches: Sequence[Any]) -> DataLoader[Any]:
    """Return a loader of the given batches."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


class ReadyData(L.LightningDataModule):
    """Data module of given batches, which are the same in every stage.

    Args:
        sets: Batches of each evaluation loader. Training uses the first set.
        properties: Attributes of the data module, such as `class_names`.
    """

    def __init__(self, *sets: Sequence[Any], **properties: Any) -> None:
        super().__init__()
        self.sets = sets
        for key, value in properties.items():
            setattr(self, key, value)

    def train_dataloader(self) -> DataLoader[Any]:
        return ready_loader(self.sets[0])

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [ready_loader(batches) for batches in self.sets]

    test_dataloader = val_dataloader


def stub_trainer(
    world: int = 1,
    rank: int = 0,
    *,
    stage: str = "fit",
    epoch: int = 0,
    batches_done: int = 0,
    epoch_batches: int = 100,
    **keys: Any,
) -> Any:
    """Return a stub with the attributes of a trainer that models and data read.

    Args:
        world: Number of ranks.
        rank: Number of this rank.
        stage: `fit`, `validate`, `test` or `predict`.
        epoch: Number of the epoch.
        batches_done: Trained batches of the epoch.
        epoch_batches: Batches of an epoch.
        keys: Attributes to add or replace.
    """
    progress = SimpleNamespace(current=SimpleNamespace(processed=batches_done))
    attributes = {
        "world_size": world,
        "global_rank": rank,
        "local_rank": rank,
        "is_global_zero": rank == 0,
        "strategy": SimpleNamespace(broadcast=_alone, root_device=torch.device("cpu"), reduce_boolean_decision=_alone),
        "fit_loop": SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        "num_training_batches": epoch_batches,
        "current_epoch": epoch,
        "state": SimpleNamespace(fn=stage),
        "precision": "32-true",
    }
    return SimpleNamespace(**{**attributes, **keys})


def _alone(value: Any = None) -> Any:
    return value


def text_model(tokenizer: Any, class_names: list[str] | None = None, position_limit: int | None = None) -> Any:
    """Return a stub with the attributes of a text model that a data module reads."""
    return SimpleNamespace(tokenizer=tokenizer, class_names=class_names, position_limit=position_limit)
