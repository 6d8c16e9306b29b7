"""Callbacks that stop a fit that cannot learn: a diverged loss, adapters without gradient."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from datamodules.errors import ModelError, counted
from modules.adapters import adapted_projections
from modules.training.checkpoints import AFTER_DIVERGENCE


class DivergenceCheck(L.Callback):
    """Stop a fit before a loss that is not finite changes the weights."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Check that the loss is finite.

        Raises:
            ModelError: If the loss is not finite. The message has the step.
        """
        if not torch.isfinite(loss):
            step = trainer.global_step
            raise ModelError(f"The training loss became {loss.item()} at step {step}. {AFTER_DIVERGENCE}")


class IdleAdapterCheck(L.Callback):
    """Check at the first step that every trained factor gets a gradient.

    The check is not for backbones with layerdrop, since a dropped block gets no gradient either.
    """

    def __init__(self) -> None:
        self._done = False

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check that every trained factor has a gradient.

        Raises:
            ModelError: If a factor has no gradient. The message has the projections.
        """
        if self._done:
            return
        self._done = True
        idle = [
            name
            for name, (_, f) in adapted_projections(pl_module.backbone).items()
            if any(p.grad is None for p in f.named_factors(trained=True).values())
        ]
        if pl_module.baseline is not None:
            idle += [name for name, parameter in pl_module.baseline.parameters().items() if parameter.grad is None]
        if idle:
            listed = ", ".join(idle[:3]) + (", …" if len(idle) > 3 else "")
            raise ModelError(
                f"model.adapter.targets: {counted(len(idle), 'adapted projection gets', 'adapted projections get')} no "
                f"gradient ({listed}). The backbone reads such weights without calling the layers. Choose other "
                "targets."
            )
