"""Equal weight for every token or sample of an optimizer step, across accumulated batches and processes."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

UNIT = 1024  # Unit of token counts. Division by a power of two is exact.


class GradientAveraging(L.LightningModule):
    """Make the gradient of an optimizer step the mean over all its items.

    Lightning divides the loss of a batch by `accumulate_grad_batches`, and DDP averages over processes. Both give each
    batch the same weight. A token would then weigh more in a batch with few tokens. The last step of an epoch can have
    fewer batches than `accumulate_grad_batches`, so that its gradient would be too small.

    This class sums gradients over items instead and divides the sum once, before the optimizer step. A task whose
    batches differ in size sets `items_in_batch` in `training_step`. The loss must be the mean over these items.
    """

    items_in_batch: int | Tensor = 1  # Items of the current batch; 1 if all batches have the same number of items.
    _items_in_update: int | Tensor = 0

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Reset the number of items for the next optimizer step."""
        self._items_in_update = 0

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of the sum over the batch's items."""
        items = self.items_in_batch
        if isinstance(items, Tensor):
            items = items / UNIT  # In float16, a loss summed over thousands of tokens would overflow.
        self._items_in_update = self._items_in_update + items
        super().backward(loss * items * self.trainer.accumulate_grad_batches, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the number of items."""
        if isinstance(self._items_in_update, Tensor):
            local_items = self._items_in_update.to(self.device, torch.float32)
            items = self.trainer.strategy.reduce(local_items, reduce_op="mean")  # DDP has averaged the gradients too.
        elif self._items_in_update == 1:  # The loss of a single batch is a mean already.
            return
        else:  # All processes have the same number of batches.
            items = self._items_in_update
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad /= items
