"""Weight averaging (EMA, SWA) by Lightning's callbacks, of the trained weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from app.lightning_compat import averaged_model
from datamodules.errors import CallbackError
from modules.base import AdaptedModule

TRAINED = "trained_weights"  # key of the checkpoint
UPDATES = "averaging_updates"  # key of the checkpoint


class TrainedWeightAveraging(L.Callback):
    """Average factors and heads as a callback of Lightning does.

    Lightning's callback would copy and average the whole model. Here, Lightning's callback gets only the tensors that
    are trained. The frozen backbone is never copied. Validation, best.ckpt, last.ckpt and RUN/adapter use the average.
    A checkpoint also keeps the weights before averaging ("trained weights" below), so that a resumed run continues bit
    for bit.

    Args:
        averaging: Lightning's callback, which decides when and how the average is updated.
        updates: Number of updates that the initial weights count as. With 0, there is no average before the first
            update, and all files have the trained weights. The first update then copies the trained weights.
    """

    def __init__(self, averaging: WeightAveraging, updates: int = 0) -> None:
        self.averaging = averaging
        self._updates = updates
        self._weights: _TrainedWeights | None = None
        self._resumed: dict[str, Tensor] = {}  # trained weights of the checkpoint to resume
        self._swapped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a chain of adapters.

        Raises:
            CallbackError: If the module has a chain of adapters.
        """
        if stage == "fit" and isinstance(pl_module, AdaptedModule) and pl_module.link_epochs is not None:
            raise CallbackError(
                "model.adapter.chain.every_n_epochs: averages would mix the factors of different links. Remove the "
                f"callback {type(self.averaging).__name__}, or set the key to null."
            )

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the average with the weights of the model. After a resume, these weights are the saved average."""
        self._weights = weights = _TrainedWeights(pl_module)
        self.averaging.setup(trainer, weights, "fit")
        self.averaging.load_state_dict({"latest_update_step": trainer.global_step})
        averaged_model(self.averaging).n_averaged.fill_(self._updates)
        own = weights.by_name()
        for name, tensor in self._resumed.items():
            own[name].copy_(tensor)
        self._resumed = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimizer step."""
        assert self._weights is not None
        self.averaging.on_train_batch_end(trainer, self._weights, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update the average after an epoch. Lightning calls this also when it stops in mid-epoch."""
        assert self._weights is not None
        if trainer.is_last_batch:
            self.averaging.on_train_epoch_end(trainer, self._weights)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the average."""
        self._swap(trainer, swapped=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the trained weights, to continue training."""
        self._swap(trainer, swapped=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model."""
        self._swap(trainer, swapped=True)

    def _swap(self, trainer: L.Trainer, swapped: bool) -> None:
        """Exchange weights and average, unless they are exchanged already or there is no average yet."""
        if self._weights is not None and averaged_model(self.averaging).n_averaged and self._swapped != swapped:
            self.averaging.on_validation_epoch_start(trainer, self._weights)
            self._swapped = swapped

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights of the model. Add the trained weights."""
        if self._weights is None:
            return
        copy = averaged_model(self.averaging)
        assert isinstance(copy.module, _TrainedWeights)
        weights = self._weights.by_name()
        other = copy.module.by_name() if copy.n_averaged else weights
        average, trained = (weights, other) if self._swapped else (other, weights)
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **average}
        checkpoint[TRAINED] = trained
        checkpoint[UPDATES] = int(copy.n_averaged)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights of the checkpoint until training starts.

        Raises:
            CallbackError: If the saved weights do not match the model's trained weights.
        """
        if trainer.state.fn != "fit" or TRAINED not in checkpoint:
            return
        self._resumed = checkpoint[TRAINED]
        self._updates = checkpoint.get(UPDATES, checkpoint["global_step"] + 1)  # older checkpoints have no number
        own = _TrainedWeights(pl_module).by_name()
        fits = isinstance(self._resumed, dict) and self._resumed.keys() <= own.keys()
        if not fits or any(not isinstance(t, Tensor) or t.shape != own[n].shape for n, t in self._resumed.items()):
            raise CallbackError(
                f"ckpt_path: {TRAINED} of the checkpoint does not match the model's trained weights. Use another "
                "checkpoint."
            )
        if not isinstance(self._updates, int) or self._updates < 0:
            raise CallbackError(
                f"ckpt_path: {UPDATES} of the checkpoint is {self._updates!r}, but must be a whole number, 0 or more. "
                "Use another checkpoint."
            )


class AdapterAveraging(TrainedWeightAveraging):
    """Keep an exponential moving average of factors and heads (Polyak and Juditsky 1992).

    `EMAWeightAveraging` of Lightning has a constant decay. Here the decay grows, so that the initial weights fade
    quickly.

    Args:
        decay: Share of the average that stays at each optimizer step, in [0, 1). At the n-th step the share is at most
            (1 + n) / (10 + n).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise CallbackError(f"AdapterAveraging.decay: {decay} must lie in [0, 1).")
        self.decay = decay
        super().__init__(WeightAveraging(multi_avg_fn=self._update), updates=1)

    @torch.no_grad()
    def _update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor) -> None:
        step = int(updates)
        share = min(self.decay, (1 + step) / (10 + step))
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - share)


class _TrainedWeights(L.LightningModule):
    """The trained parameters of a model, and the running statistics of its trained batch norms.

    Args:
        module: The model that owns the tensors.
    """

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        statistics = {
            f"{prefix}.{name}": tensor
            for prefix, layer in module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in layer.parameters())
            for name, tensor in layer.named_buffers()
            if tensor.is_floating_point()
        }
        self.names = [*parameters, *statistics]
        self.weights = nn.ParameterList(parameters.values())
        for i, tensor in enumerate(statistics.values()):
            self.register_buffer(f"statistic_{i}", tensor)
        self.to(module.device)  # The tensors are on this device already. `to` sets the attribute that Lightning reads.

    def by_name(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the model."""
        return {n: t.detach() for n, t in zip(self.names, [*self.parameters(), *self.buffers()], strict=True)}
