"""Predict each row with the adapter of a bank that the row names."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch import LightningModule, Trainer

from datamodules.base import ResumableDataModule
from datamodules.errors import DataError
from modules.adapters import AdapterError, detach
from modules.base import AdaptedModule
from modules.formats.bank import Bank


class BankBatches(L.Callback):
    """Replace the model's adapter by a bank, and give each row of a batch the adapter that the row names.

    A column `adapter` is added to the predictions. Classes and probabilities have the names of the row's adapter.

    Args:
        bank: The bank.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._names: list[list[str]] = []  # By file and row.
        self._of_batch: list[str] = []
        self._context = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the name of each row's adapter, and attach the bank.

        Raises:
            DataError: If the data have no column of names, or a row has no name.
            AdapterError: If a name is not in the bank, or the bank does not fit the backbone.
        """
        assert isinstance(pl_module, AdaptedModule)
        data = pl_module.data
        if not isinstance(data, ResumableDataModule):
            raise DataError(
                f"bank: {type(data).__name__} cannot name an adapter for each row, since the class is no "
                "ResumableDataModule. Derive the class from ResumableDataModule, or predict without --bank."
            )
        self._names = data.adapter_names()
        for name in {name for names in self._names for name in names}:
            self.bank.config(name)  # Raises for an unknown name, before the first batch.
        detach(pl_module.backbone)
        self.bank.attach(pl_module.backbone, pl_module)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Enter the mixed batch."""
        self._of_batch = [self._names[dataloader_idx][row] for row in batch["index"].tolist()]
        self._context.enter_context(self.bank.batch(self._of_batch))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave the mixed batch, and add the adapters' names and class names to the predicted rows."""
        assert isinstance(pl_module, AdaptedModule)
        self._context.close()
        rows = {"index": outputs["index"], "adapter": self._of_batch, **outputs}
        if classes := pl_module.class_names:
            # The model has the classes of the adapter with the most classes.
            names = [dict(zip(classes, self.bank.labels(name) or [], strict=False)) for name in self._of_batch]
            rows["prediction"] = [n.get(cell, cell) for n, cell in zip(names, outputs["prediction"], strict=True)]
            rows["probabilities"] = [
                {n[name]: share for name, share in shares.items() if name in n}
                for n, shares in zip(names, outputs["probabilities"], strict=True)
            ]
        outputs.clear()
        outputs.update(rows)


def class_names_of(bank: Bank) -> list[str] | None:
    """Return the class names of the adapter with the most classes; [] for regressions; None without labels.

    Raises:
        AdapterError: If only some of the adapters classify.
    """
    labels = {name: bank.labels(name) for name in bank.names}
    kinds = {name: None if names is None else bool(names) for name, names in labels.items()}
    first = bank.names[0]
    if other := next((name for name in bank.names if kinds[name] != kinds[first]), None):
        raise AdapterError(
            f"bank: {first} and {other} of {bank.path} have different tasks, since only one of them has classes. Use a "
            "bank with adapters of one task."
        )
    return max((names for names in labels.values() if names is not None), key=len, default=None)
