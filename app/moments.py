"""Moments of inputs and gradients at the adapted projections of a frozen backbone, over a recipe's own batches."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from jsonargparse import ArgumentError
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from app.callbacks import Termination
from app.cli import AsymmetryCLI
from modules.adapters import AdaptedLinear, adapted_layers
from modules.analysis.theory import Moments
from modules.base import AdaptedModule

_log = logging.getLogger(__name__)
GIB = 2**30


@dataclass(frozen=True)
class Measurement:
    """A recipe's model with what was measured in it.

    Args:
        module: The model; its adapters are as they started, its heads are trained a little.
        words: Options of `fit` that the model was built with.
        moments: By projection, in the order of the model's modules.
        samples: Number of training samples that the recipe has.
        steps: Batches that were measured.
    """

    module: AdaptedModule
    words: list[str]
    moments: dict[str, Moments]
    samples: int
    steps: int


def measure(words: Sequence[str], batches: int, head_steps: int) -> Measurement:
    """Build data and model as `fit` would, and measure the frozen backbone over a few training batches.

    Args:
        words: Options of `fit`.
        batches: Batches to measure.
        head_steps: Optimizer steps of the heads alone before that; without heads there are none.

    Raises:
        ArgumentError: For keys without which there is nothing to measure, or that start elsewhere than at W.
    """
    with ExitStack() as held:
        cli = MeasuredFit(["fit", *words], batches, head_steps, held)
    collector = cli.collector
    return Measurement(cli.model, list(words), collector.moments, collector.samples, batches)


class MeasuredFit(AsymmetryCLI):
    """A fit that trains no adapter and writes nothing.

    One process runs on one device, whatever the recipe's strategy is.

    Args:
        args: Words of a fit.
        batches: Batches to measure.
        head_steps: Steps of the heads before them.
        held: Contexts to leave in the end.
    """

    def __init__(self, args: list[str], batches: int, head_steps: int, held: ExitStack) -> None:
        self.batches, self.head_steps = batches, head_steps
        self.scratch = held.enter_context(tempfile.TemporaryDirectory())
        super().__init__(args, Termination(), held)

    def before_instantiate_classes(self) -> None:
        """Check that the model will start at its pretrained weights.

        Raises:
            ArgumentError: With the key.
        """
        fit = self.config["fit"]
        for key, value in (
            ("ckpt_path", fit.ckpt_path),
            ("model.adapter_path", fit.model.init_args.get("adapter_path")),
        ):
            if value is not None:
                raise ArgumentError(
                    None, f"{key}: {value} holds trained adapters, and theory measures the backbone before training. "
                    "Leave the key out."
                )  # fmt: skip
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Return a trainer of the recipe's precision that logs, validates and saves nothing."""
        if not adapted_layers(self.model.backbone):
            raise ArgumentError(
                None, f"model.tuning: {self.model.tuning} adapts no projection to measure. Set it to adapter."
            )
        self.model.compiles = False  # hooks see the layers as they are written
        config = self.config_init["fit"].trainer
        head_steps = self.head_steps if self.model.head_names else 0
        if head_steps < self.head_steps:
            _log.info("The model has no new head: no steps before the measurement.")
        self.collector = MomentCollector(head_steps)
        return L.Trainer(
            accelerator=config.accelerator,
            devices=1,
            precision=config.precision,
            gradient_clip_val=config.gradient_clip_val,
            gradient_clip_algorithm=config.gradient_clip_algorithm,
            max_steps=head_steps + self.batches,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=config.enable_progress_bar,
            use_distributed_sampler=False,
            default_root_dir=self.scratch,
            callbacks=[self.collector],
        )

    def fit(self, **arguments: Any) -> None:
        """Train the heads and measure, without the callbacks of a run."""
        self.trainer.fit(self.model, datamodule=self.datamodule)


class MomentCollector(L.Callback):
    """Collect the moments at each adapted projection, while no adapter moves.

    Args:
        head_steps: Optimizer steps in which heads are trained first; afterwards nothing is.
    """

    def __init__(self, head_steps: int) -> None:
        self.head_steps = head_steps
        self.moments: dict[str, Moments] = {}
        self.samples = 0
        self._active = False
        self._hooks: list[RemovableHandle] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hook every adapted layer."""
        device = pl_module.device if pl_module.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        size = 0
        for layer in adapted_layers(cast(AdaptedModule, pl_module).backbone).values():
            for f in layer.factors():
                d_in, d_out = layer.in_features, f.projection.stop - f.projection.start
                self.moments[f.projection.name] = Moments(d_in, d_out, device)
                size += 8 * (d_in**2 + d_in * d_out + d_out**2)
            self._hooks.append(layer.register_forward_hook(self._watch))
        _log.info(f"The moments of {len(self.moments)} projections take {size / GIB:.2f} GiB.")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what a few batches are of the whole."""
        loader: Any = trainer.train_dataloader
        self.samples = len(loader.dataset)
        needed, whole = trainer.max_steps, int(trainer.num_training_batches)
        if needed > whole:
            _log.warning(f"The training data have {whole} batches, and {needed} are read: some rows are seen again.")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure behind the steps of the heads."""
        self._active = trainer.global_step >= self.head_steps

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the factors where they started, and during the measurement the heads too."""
        for group in optimizer.param_groups:
            if self._active or group["name"].partition("/")[0] != "head":
                group["lr"] = 0.0  # until the schedule sets the next step's

    def _watch(self, layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Collect the gradient to a layer's output beside its input."""
        if self._active and output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: self._collect(cast(AdaptedLinear, layer), x, gradient))

    def _collect(self, layer: AdaptedLinear, x: Tensor, gradient: Tensor) -> None:
        flat = x.reshape(-1, layer.in_features)  # (n, d_in)
        grads = gradient.reshape(-1, layer.out_features)  # (n, d_out)
        for f in layer.factors():
            self.moments[f.projection.name].add(flat, grads[:, f.projection.rows])
