"""Moments of inputs and gradients at the adapted projections of a frozen backbone, over a recipe's own batches."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from app.config.constructors import construct, construct_accelerator
from app.config.fit_keys import ParseFit
from app.run.failures import construction_errors
from app.run.trainers import quiet_trainer
from datamodules.errors import UsageError, counted
from modules.adapters import AdaptedLinear, ChainConfig, adapted_layers
from modules.analysis.theory import Moments
from modules.base import AdaptedModule

_log = logging.getLogger(__name__)
GIB = 2**30
# keys of the recipe's trainer that the measurement uses
TRAINER_KEYS = ("precision", "gradient_clip_val", "gradient_clip_algorithm", "enable_progress_bar")


@dataclass(frozen=True)
class Measurement:
    """Model of a recipe, with the moments that were measured.

    Args:
        module: The model. Its adapters have their initial values, and its heads are briefly trained.
        fit_arguments: Options of `fit` with which the model was built.
        moments: By projection, in the order of the model's modules.
        samples: Number of training samples that the recipe has.
        steps: Batches that were measured.
    """

    module: AdaptedModule
    fit_arguments: list[str]
    moments: dict[str, Moments]
    samples: int
    steps: int


def measure(parse_fit: ParseFit, fit_arguments: Sequence[str], batches: int, head_steps: int) -> Measurement:
    """Build data and model as `fit` would, and measure the frozen backbone over a few training batches.

    No adapter is trained, and nothing is written. One process runs on one device, whatever the recipe's strategy.

    Args:
        parse_fit: Parser of `fit`.
        fit_arguments: Options of `fit`.
        batches: Batches to measure.
        head_steps: Optimizer steps that train only the heads, before the measurement; none without a head.

    Raises:
        UsageError: For options that `fit` refuses, if no projection is adapted, or if a key loads trained adapters.
    """
    config = parse_fit(fit_arguments)
    for key, value in (
        ("ckpt_path", config.ckpt_path),
        ("model.adapter_path", config.model.init_args.get("adapter_path")),
    ):
        if value is not None:
            raise UsageError(
                f"{key}: {value} holds trained adapters, and theory measures the backbone before training. Leave the "
                "key out."
            )
    if config.seed_everything is not False:
        seed = None if config.seed_everything is True else config.seed_everything
        L.seed_everything(seed, workers=True, verbose=False)
    with construction_errors(config, "model"):
        module = construct(AdaptedModule, config.model)
    with construction_errors(config, "data"):
        data = construct(L.LightningDataModule, config.data)
    if not adapted_layers(module.backbone):
        raise UsageError(f"model.tuning: {module.tuning} adapts no projection to measure. Set model.tuning to adapter.")
    if module.link_epochs is not None:
        _log.info("model.adapter.chain: the measurement is of the first link.")
        module.adapter = replace(module.adapter, chain=ChainConfig())
    module.compiles = False  # hooks need the uncompiled layers
    if head_steps and not module.head_names:
        _log.info("The model has no new head: no steps before the measurement.")
        head_steps = 0
    collector = MomentCollector(head_steps)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = quiet_trainer(
            accelerator=construct_accelerator(config.trainer.accelerator),
            **{key: config.trainer[key] for key in TRAINER_KEYS},
            max_steps=head_steps + batches,
            max_epochs=-1,
            limit_val_batches=0,
            default_root_dir=scratch,
            callbacks=[collector],
        )
        trainer.fit(module, datamodule=data)
    return Measurement(module, list(fit_arguments), collector.moments, collector.samples, batches)


class MomentCollector(L.Callback):
    """Collect the moments at each adapted projection, while all adapters keep their initial values.

    Args:
        head_steps: Optimizer steps in which heads are trained first. Afterwards nothing is trained.
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
        _log.info(f"The moments of {counted(len(self.moments), 'projection')} take {size / GIB:.2f} GiB.")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if more batches are read than the training data have."""
        loader: Any = trainer.train_dataloader
        self.samples = len(loader.dataset)
        needed, available = trainer.max_steps, int(trainer.num_training_batches)
        if needed > available:
            _log.warning(f"The training data have {available} batches, and {needed} are read: some rows repeat.")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the measurement after the steps of the heads."""
        self._active = trainer.global_step >= self.head_steps

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the factors at their initial values, and during the measurement the heads too."""
        for group in optimizer.param_groups:
            if self._active or group["name"].partition("/")[0] != "head":
                group["lr"] = 0.0  # until the schedule sets the next learning rate

    def _watch(self, layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Collect a layer's input with the gradient to its output."""
        if self._active and output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: self._collect(cast(AdaptedLinear, layer), x, gradient))

    def _collect(self, layer: AdaptedLinear, x: Tensor, gradient: Tensor) -> None:
        flat = x.reshape(-1, layer.in_features)  # (n, d_in)
        grads = gradient.reshape(-1, layer.out_features)  # (n, d_out)
        for f in layer.factors():
            self.moments[f.projection.name].add(flat, grads[:, f.projection.rows])
