"""Average the trained weights exponentially over the steps (EMA)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from datamodules.errors import CallbackError

TRAINED = "trained_weights"  # key of the checkpoint


class AdapterAveraging(L.Callback):
    """Keep an exponential moving average of factors and heads (Polyak and Juditsky 1992).

    Validation, best.ckpt, last.ckpt and RUN/adapter use the average. A checkpoint also keeps the trained weights, so
    that a resumed run continues bit for bit. The frozen backbone is never copied.

    Args:
        decay: Share of the average that stays at each optimizer step, in [0, 1). At the n-th step the share is at most
            (1 + n) / (10 + n), so that the initial weights fade quickly.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise CallbackError(f"AdapterAveraging.decay: {decay} must lie in [0, 1).")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._resumed: dict[str, Tensor] = {}  # trained weights of a checkpoint, until training starts
        self._step = 0  # step of the last update
        self._swapped = False

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the average with the weights of the model. After a resume, these weights are the saved average."""
        trained = _trained(pl_module)
        self._average = {name: parameter.detach().clone() for name, parameter in trained.items()}
        self._step = trainer.global_step
        for name, tensor in self._resumed.items():
            trained[name].copy_(tensor)
        self._resumed = {}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        for name, parameter in _trained(pl_module).items():
            self._average[name].lerp_(parameter, 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the average."""
        self._swap(pl_module, swapped=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the trained weights, to continue training."""
        self._swap(pl_module, swapped=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model."""
        self._swap(pl_module, swapped=True)

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule, swapped: bool) -> None:
        """Exchange weights and average, unless they are exchanged already or there is no average yet."""
        if not self._average or self._swapped == swapped:
            return
        for name, parameter in _trained(pl_module).items():
            weights = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(weights)
        self._swapped = swapped

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights of the model. Add the trained weights."""
        if not self._average:
            return
        weights = {name: parameter.detach() for name, parameter in _trained(pl_module).items()}
        average, trained = (weights, self._average) if self._swapped else (self._average, weights)
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **average}
        checkpoint[TRAINED] = trained

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights of the checkpoint until training starts.

        Raises:
            CallbackError: If the saved weights do not match the model's trained parameters.
        """
        self._resumed = checkpoint.get(TRAINED, {}) if trainer.state.fn == "fit" else {}
        trained = _trained(pl_module)
        fits = isinstance(self._resumed, dict) and self._resumed.keys() <= trained.keys()
        if not fits or any(not isinstance(t, Tensor) or t.shape != trained[n].shape for n, t in self._resumed.items()):
            raise CallbackError(
                f"ckpt_path: {TRAINED} of the checkpoint does not match the model's trained weights. Use another "
                "checkpoint."
            )


def _trained(module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
