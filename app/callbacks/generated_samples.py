"""Log generated texts."""

from __future__ import annotations

from typing import Any

import lightning as L

from app.run.logger import log_text
from datamodules.contract import TextModel

SAMPLES = 4  # number of texts, from the first rows of validation
SOURCE = 500  # characters of a source that are shown


class GeneratedSamples(L.Callback):
    """Show what a model generates for the first rows of validation, beside source and reference.

    `validation_step` returns the texts, one for each row.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the texts of the first rows."""
        if not isinstance(outputs, list) or not isinstance(pl_module, TextModel):
            return
        for row in (batch["index"] < SAMPLES).nonzero().flatten().tolist():
            source = pl_module.tokenizer.decode(batch["input_ids"][row], skip_special_tokens=True)[:SOURCE]
            reference = batch["reference"][row]
            self._texts.append(f"**Generated** {outputs[row]}\n\n**Reference** {reference}\n\n**Source** {source}")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the texts."""
        texts, self._texts = self._texts, []
        if trainer.sanity_checking or not trainer.is_global_zero or not texts:
            return
        log_text(trainer, "val/samples", "\n\n---\n\n".join(texts))
