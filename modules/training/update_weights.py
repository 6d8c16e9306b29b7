"""Equal weight for every token or sample of an update, across accumulated batches and processes."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

UNIT = 1024  # tokens; a power of two, so that the unit rounds nothing


class EqualWeights(L.LightningModule):
    """Make the gradient of an update the mean over all its items.

    Lightning divides the loss of a batch by `accumulate_grad_batches`, and DDP averages over processes. Both give each
    batch the same weight. A token then weighs more in a batch with few tokens. The last update of an epoch can have
    fewer batches than `accumulate_grad_batches`; its gradient would be too small.

    This class sums gradients over items instead and divides the sum once, before the optimizer step. A task whose
    batches differ in size sets `items_in_batch` in `training_step`. A loss must be the mean over these items.
    """

    items_in_batch: int | Tensor = 1  # of the batch just computed; 1 if all batches have equally many
    _items_in_update: int | Tensor = 0

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Start a new update."""
        self._items_in_update = 0

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of the sum over the batch's items."""
        items = self.items_in_batch
        if isinstance(items, Tensor):
            items = items / UNIT  # the sum over thousands of tokens would overflow in float16
        self._items_in_update = self._items_in_update + items
        super().backward(loss * items * self.trainer.accumulate_grad_batches, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the number of items in the update."""
        if isinstance(self._items_in_update, Tensor):
            mean = self._items_in_update.to(self.device, torch.float32)
            items = self.trainer.strategy.reduce(mean, reduce_op="mean")  # DDP has averaged the gradients
        elif self._items_in_update == 1:  # a step of one batch, whose loss is the mean already
            return
        else:  # all processes have the same number of batches
            items = self._items_in_update
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad /= items
