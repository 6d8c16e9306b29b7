"""Base class of every task: backbone, tuning, optimizer and evaluation loop.

See `training.checkpoints` for checkpoint contents, `training.optimization` for learning rates, and `training.checks`
for the checks that stop a fit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric, MetricCollection

from datamodules.contract import DataKind
from datamodules.errors import ModelError
from modules.adapters import (
    AdapterConfig,
    Chain,
    Projection,
    adapter_state,
    adapters_disabled,
    attach,
    load_adapter_state,
)
from modules.adapters.state import frozen_fingerprint
from modules.formats.adapter_files import load_heads, read_adapter
from modules.scaling.blocks import layerdrop_rates
from modules.training.checkpoints import CHAIN, CheckpointedModule
from modules.training.checks import DivergenceCheck, IdleAdapterCheck
from modules.training.freezing import freeze
from modules.training.frozen_digest import FrozenDigest
from modules.training.gradient_averaging import GradientAveraging
from modules.training.optimization import (
    Groups,
    OptimizerSpec,
    RangeTest,
    Schedule,
    check_learning_rates,
    parameter_groups,
    reset_states,
    restart_schedule,
    schedule_factor,
    steps_left,
)
from modules.training.peft_baselines import METHODS, PeftBaseline

if TYPE_CHECKING:
    from modules.scaling.frozen_prefix import FrozenPrefix
    from modules.scaling.sharding import FrozenShards

_log = logging.getLogger(__name__)

Tuning = Literal["adapter", "head", "full", "adalora", "ia3"]
HeadlessTuning = Literal["adapter", "full", "adalora", "ia3"]  # For tasks without a new head.
BackboneDtype = Literal["float32", "bfloat16"]
Stage = Literal["val", "test"]
STAGES: tuple[Stage, Stage] = ("val", "test")
TOLERATED_ROUNDING = 0.01  # Share of a merged update's norm that rounding may change without a warning.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class AdaptedModule(GradientAveraging, CheckpointedModule):
    """A backbone with a head, trained through adapters, through the head only, or in full.

    The constructor has the keys that all tasks share. The `__init__` of a task passes these keys on, builds `backbone`
    and calls `configure_tuning`. Since `__init__` builds the backbone, a wrong name, role or rank is reported before
    any data are loaded. Some heads are built in `setup`, when the classes of the data are known.

    A head is a module that was not pretrained for the task. Heads are fully trained with every `tuning` and saved in
    every checkpoint. `head_names` lists the heads, inside the backbone (`backbone.classifier`) or outside (`head`).

    A task implements `loss`, `evaluate` and `predict_step`. `configure_metrics` sets the metrics of validation and
    test, and `scores` returns the values to log.

    Args:
        weights: Weights of the backbone: `pretrained` (from the name, repository or directory), `none`, or a local
            file: .safetensors, and for timm also .pth, .pt or .bin.
        backbone_args: Changes to the architecture: arguments of `timm.create_model` such as `drop_path_rate`, or values
            of a config.json of transformers such as `hidden_dropout_prob`.
        backbone_dtype: Dtype of the frozen weights; bfloat16 halves the memory. Factors and head stay float32. `full`
            needs float32.
        tuning: Trained parameters: `adapter` (factors and head), `head`, or `full` (everything, no adapter). `adalora`
            and `ia3` are PEFT's methods, as baselines; see `modules.training.peft_baselines`.
        adapter: Configuration of the adapters; ignored if `tuning` is `head` or `full`.
        adapter_path: Adapters and head to start from: a directory in the format of PEFT or `export`, or a name on the
            hub. Of `adapter`, only `train` is then used. A checkpoint contains the loaded adapters.
        learning_rate: Peak learning rate, above 0. The ratios below scale the learning rates of B, head and roles.
        weight_decay: Weight decay of matrices; biases and norms have no decay.
        optimizer: An optimizer of torch.optim: `class_path`, such as torch.optim.SGD, and `init_args`. None is AdamW.
        schedule: Shape of the learning rate after the warm-up, by optimizer steps: `cosine` or `linear` to zero, or
            `constant`.
        warmup_ratio: Share of all steps in which the learning rate rises linearly to its peak, in [0, 1).
        lr_ratio_b: Learning rate of B divided by `learning_rate` (LoRA+, Hayou et al. 2024).
        lr_ratio_head: Learning rate of the head divided by `learning_rate`.
        lr_ratio_role: Additional learning rate ratios by role of the adapted projection, such as value: 2.0. A ratio
            applies to both factors. Ignored unless `tuning` is `adapter`.
        shard_frozen: If true, each of several processes (--trainer.strategy ddp) stores a share of the blocks' frozen
            weights instead of all; see `modules.scaling.sharding`.
        compile: If true, compile the backbone's blocks for training; see `modules.scaling.compilation`.

    Raises:
        ModelError: If a value is out of range, or values exclude each other.
    """

    kinds: tuple[DataKind, ...]  # Kinds of data that the task accepts.
    class_names: list[str] | None = None  # By label; None until the data or a checkpoint set the names.
    position_limit: int | None = None  # Maximum tokens of a text; None for no limit.
    peft_task: str | None = None  # PEFT's name of the task.
    backbone: nn.Module

    def __init__(
        self,
        weights: str = "pretrained",
        backbone_args: dict[str, Any] | None = None,
        backbone_dtype: BackboneDtype = "float32",
        tuning: Tuning = "adapter",
        adapter: AdapterConfig = AdapterConfig(),  # noqa: B008 - frozen, and the CLI reads its defaults from here
        adapter_path: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        optimizer: dict[str, Any] | None = None,
        schedule: Schedule = "cosine",
        warmup_ratio: float = 0.05,
        lr_ratio_b: float = 1.0,
        lr_ratio_head: float = 1.0,
        lr_ratio_role: dict[str, float] | None = None,
        shard_frozen: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # Lightning also collects the arguments of the task's own `__init__`.
        by_role = {f"lr_ratio_role.{role}": ratio for role, ratio in (lr_ratio_role or {}).items()}
        ratios = {"lr_ratio_b": lr_ratio_b, "lr_ratio_head": lr_ratio_head, **by_role}
        check_learning_rates(learning_rate, weight_decay, warmup_ratio, ratios)
        _check_tuning(tuning, backbone_dtype, adapter_path, shard_frozen)
        self.tuning: Tuning = tuning
        self.adapter_path = adapter_path
        self.adapter = adapter if isinstance(adapter, AdapterConfig) else AdapterConfig(**adapter)
        self.weights, self.backbone_args = weights, backbone_args or {}
        self.backbone_dtype = getattr(torch, backbone_dtype)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.optimizer_spec = OptimizerSpec(optimizer, weight_decay)
        self.schedule: Schedule = schedule
        self.warmup_ratio, self.lr_ratio_b, self.lr_ratio_head = warmup_ratio, lr_ratio_b, lr_ratio_head
        self.lr_ratio_role = lr_ratio_role or {}
        self.shard_frozen, self.compiles = shard_frozen, compile
        if shard_frozen and self.link_epochs is not None:
            raise ModelError(
                "model.shard_frozen: the links of model.adapter.chain cannot be merged into sharded weights. Set "
                "shard_frozen to false, or chain.every_n_epochs to null."
            )
        self.chain = Chain()
        self.shards: FrozenShards | None = None
        self._compiled = False
        self.head_names: list[str] = []
        self.projections: list[Projection] = []
        self._adapter_heads: dict[str, Tensor] = {}
        self._range_test: RangeTest | None = None
        # For a fit that is a part of a longer training: steps before the fit, and steps of the whole training.
        self.schedule_window: tuple[int, int] | None = None
        self.prefix: FrozenPrefix | None = None
        self.baseline: PeftBaseline | None = None
        # By default, MeanMetric skips NaN, which would hide a diverged loss.
        self.losses = nn.ModuleDict({stage: MeanMetric(nan_strategy=math.nan) for stage in STAGES})
        self.metrics = nn.ModuleDict()  # By stage and set name.
        self.set_names: dict[Stage, list[str]] = {}

    @property
    def link_epochs(self) -> int | None:
        """Return the number of epochs of a link; None without adapters or without a chain."""
        return self.adapter.chain.every_n_epochs if self.tuning == "adapter" else None

    # -------------------------------------------------------------------------------------------------------- backbone

    def configure_tuning(self, heads: Sequence[str] = ()) -> None:
        """Freeze and cast the backbone and attach the adapters.

        The backbone is then in train mode, with dropout active. Batch normalisation of a frozen backbone stays in eval
        mode, so that the running statistics do not change.

        Args:
            heads: Names of the backbone's modules that are heads.

        Raises:
            ModelError: If a key does not fit the backbone or the tuning.
            AdapterError: If the adapters cannot be attached or loaded.
        """
        if self.tuning != "full":
            freeze(self.backbone, heads, self.backbone_dtype)
        self.head_names = [f"backbone.{name}" for name in heads]
        if self.tuning == "adapter":
            self._attach(heads)
        elif self.tuning == "adalora" or self.tuning == "ia3":
            if self.tuning == "adalora" and (rates := layerdrop_rates(self.backbone)):
                key, rate = next(iter(rates.items()))
                raise ModelError(
                    f"model.backbone_args.{key}: {rate} drops blocks at random, and adalora cannot measure the "
                    "importance of a dropped block. Set the key to 0."
                )
            self.baseline = PeftBaseline(self.tuning, self.backbone, self.adapter, heads)
            self.projections = self.baseline.projections
        self.backbone.train()  # from_pretrained returns a model in eval mode, and Lightning keeps the mode.
        if self.tuning != "full":
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        self.fingerprint = frozen_fingerprint(self.backbone)
        self.frozen_digest = FrozenDigest(self.backbone)

    def _attach(self, heads: Sequence[str]) -> None:
        """Attach the adapters, and load the factors of `adapter_path` if the key is set.

        Raises:
            ModelError: If no adapted projection has a role of `lr_ratio_role`.
            AdapterError: If the adapters cannot be attached or loaded.
        """
        names = self.peft_head_names()
        loaded = None
        if self.adapter_path is not None:
            loaded = read_adapter(self.adapter_path, self.backbone, self.adapter, heads, names)
            self.adapter, self._adapter_heads = replace(loaded.config, chain=self.adapter.chain), loaded.heads
        self.projections = attach(self.backbone, self.adapter, exclude=heads)
        roles = {projection.role for projection in self.projections}
        if unknown := sorted(self.lr_ratio_role.keys() - roles):
            raise ModelError(
                f"model.lr_ratio_role: no adapted projection has the role {', '.join(unknown)}. Choose from "
                f"{', '.join(sorted(roles))}."
            )
        if loaded is None:
            return
        load_adapter_state(self.backbone, loaded.factors)
        # A checkpoint contains the loaded configuration, so resuming does not need the file.
        self.hparams.update(adapter=self.adapter, adapter_path=None)
        if missing := [head for head in names if not any(n.startswith(f"{head}.") for n in loaded.heads)]:
            _log.warning(
                f"model.adapter_path: {self.adapter_path} has no {', '.join(missing)}, which starts untrained."
            )

    def peft_head_names(self) -> dict[str, tuple[str, ...]]:
        """Return for each head its possible names in the complete model of timm or transformers, which PEFT wraps."""
        return {name: (name.removeprefix("backbone."),) for name in self.head_names}

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        """Compute with the pretrained weights, without adapters and merged links, within the context."""
        with adapters_disabled(self.backbone), self.chain.without_links(self.backbone):
            yield

    def load_adapter_heads(self) -> None:
        """Load the heads of `adapter_path`. A task calls this method when its heads have their final shapes.

        Raises:
            ModelError: If the heads do not fit the task.
        """
        heads, self._adapter_heads = self._adapter_heads, {}
        if problems := load_heads(self, self.head_names, heads):
            raise ModelError(
                f"model.adapter_path: the head of {self.adapter_path} does not fit this task: {'; '.join(problems)}. "
                "Use data with the same classes, in the same order, as the head was trained on."
            )

    def frozen_prefix(self) -> FrozenPrefix:
        """Return the frozen blocks whose output the data module can cache.

        Raises:
            ModelError: If the model has no frozen prefix, or cannot continue from the output of the prefix.
        """
        keys = {"tuning: full": self.tuning == "full", "shard_frozen: true": self.shard_frozen}
        if key := next((key for key, is_set in keys.items() if is_set), None):
            raise ModelError(
                f"data.cache_prefix: with model.{key} no process holds a complete frozen prefix. Set data.cache_prefix "
                "to false."
            )
        if self.compiles:
            raise ModelError(
                "data.cache_prefix: true skips blocks, which model.compile: true does not support. Set one of the keys "
                "to false."
            )
        if self.prefix is None:
            self.prefix = self.build_prefix()
        return self.prefix

    def build_prefix(self) -> FrozenPrefix:
        """Return the frozen prefix of a task; see `modules.scaling.frozen_prefix`.

        Raises:
            ModelError: If the task cannot use cached hidden states.
        """
        raise ModelError(
            f"data.cache_prefix: {type(self).__name__} cannot use cached hidden states. Set the key to false."
        )

    # ----------------------------------------------------------------------------------------------------------- setup

    @property
    def data(self) -> Any:
        """Return the trainer's data module; `datamodules.contract` has its interface."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def take_from_data(self, key: str, known: Any) -> Any:
        """Return the value of a key such as `class_names`: the model's value, or else the value of the data.

        Args:
            key: A key of the model.
            known: The value of the data; None if the data have no value.

        Raises:
            ModelError: If neither the model nor the data have a value.
        """
        value = known if self.hparams[key] is None else self.hparams[key]
        if value is None:
            raise ModelError(
                f"model.{key}: neither the data nor a checkpoint has a value. Give --ckpt_path RUN, or set the key."
            )
        self.hparams[key] = value if isinstance(value, str | int) else list(value)
        return self.hparams[key]

    def setup(self, stage: str) -> None:
        """Check the trainer's precision. Lightning calls this hook after the data module's `setup`.

        Raises:
            ModelError: If the precision would cast the factors, or would scale AdaLoRA's gradients. In a fit, also if
                the links of a chain have no initialiser.
        """
        if stage == "fit" and self.link_epochs is not None and self.adapter.init_a == "given":
            raise ModelError(
                "model.adapter.chain: the factors come from a file, so the next link has no initialiser. Set "
                "model.adapter_path or model.adapter.chain.every_n_epochs to null."
            )
        if self.trainer.precision not in PRECISIONS:
            raise ModelError(
                f"trainer.precision: {self.trainer.precision} would cast factors and head, which must stay float32. "
                "Use 32-true, bf16-mixed or 16-mixed. To save memory, set model.backbone_dtype: bfloat16."
            )
        if self.tuning == "adalora" and self.trainer.precision == "16-mixed":
            raise ModelError(
                "trainer.precision: 16-mixed scales the loss and skips steps, so adalora would measure a wrong "
                "importance. Use bf16-mixed or 32-true."
            )

    def configure_model(self) -> None:
        """Shard the frozen weights and compile the blocks, if `shard_frozen` or `compile` is set."""
        trainer = self._trainer
        if trainer is None:
            return
        if self.shard_frozen and self.shards is None:
            from modules.scaling.sharding import shard_frozen_weights  # This import takes a second.

            self.shards = shard_frozen_weights(self, self.backbone, self.fingerprint, trainer)
        if self.compiles and not self._compiled and trainer.state.fn == "fit":
            from modules.scaling.compilation import compile_blocks

            compile_blocks(self.backbone, trainer.strategy.root_device)
            self._compiled = True

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the checks of a fit and, with `compile`, the callback that evaluates without compilation."""
        callbacks: list[L.Callback] = [DivergenceCheck()]
        if not layerdrop_rates(self.backbone):
            callbacks.append(IdleAdapterCheck())
        if self.compiles:
            from modules.scaling.compilation import UncompiledEvaluation

            callbacks.append(UncompiledEvaluation())
        attached = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [callback for callback in callbacks if type(callback) not in attached]

    # ----------------------------------------------------------------------------------------- training and evaluation

    def loss(self, batch: Any) -> Tensor:
        """Return the training loss of a batch, the mean over the batch's items."""
        raise NotImplementedError

    def items(self, batch: Any) -> int | Tensor:
        """Return the number of items in a batch's loss; 1 if all batches have the same number."""
        return 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log the loss as `train/loss`."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        self.items_in_batch = self.items(batch)
        return loss

    def configure_metrics(
        self, metrics: Metric | MetricCollection, set_names: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Set the metrics of validation and test.

        Args:
            metrics: Metrics whose `compute` returns values by name.
            set_names: Names of the data sets of `val` and `test`. Each data set has separate metrics. None is a single
                data set without a name.
        """
        self.set_names = {stage: list((set_names or {}).get(stage, [""])) for stage in STAGES}
        self.metrics = nn.ModuleDict(
            {f"{stage}{name}": metrics.clone() for stage, names in self.set_names.items() for name in names}
        )

    def update_loss(self, stage: Stage, loss: Tensor, weight: float | Tensor = 1.0) -> None:
        """Update the mean loss of a stage.

        Args:
            stage: `val` or `test`.
            loss: Loss of each sample of a batch, or the mean over the samples.
            weight: Number of samples or tokens in a mean.
        """
        cast(MeanMetric, self.losses[stage]).update(loss, weight)

    def update_metrics(self, stage: Stage, *values: Any, set_number: int = 0) -> None:
        """Update the metrics of a data set; `set_number` is the index of its loader in the stage."""
        metrics = self.metrics[f"{stage}{self.set_names[stage][set_number]}"]
        cast(MetricCollection, metrics).update(*values)

    def evaluate(self, stage: Stage, batch: Any, dataloader_idx: int) -> Any:
        """Update loss and metrics of a stage with a batch.

        Args:
            stage: `val` or `test`.
            batch: A batch.
            dataloader_idx: Index of the batch's loader.

        Returns:
            Outputs for the callbacks.
        """
        raise NotImplementedError

    def scores(self, stage: Stage) -> dict[str, Tensor]:
        """Return the loss and metrics of a stage by logged name, such as `val/loss`, and reset the metrics."""
        loss = cast(MeanMetric, self.losses[stage])
        values = {f"{stage}/loss": loss.compute()}
        loss.reset()
        for name in self.set_names[stage]:
            metrics = cast(MetricCollection, self.metrics[f"{stage}{name}"])
            suffix = f"_{name}" if name else ""
            values |= {f"{stage}/{key}{suffix}": value.float() for key, value in metrics.compute().items()}
            metrics.reset()
        return values

    def _log_scores(self, stage: Stage) -> None:
        for name, value in self.scores(stage).items():
            self.log(name, value, prog_bar=name.count("/") == 1)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Update loss and metrics of validation."""
        return self.evaluate("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log loss and metrics of the stage."""
        self._log_scores("val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Update loss and metrics of the test."""
        return self.evaluate("test", batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log loss and metrics of the stage."""
        self._log_scores("test")

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Serve sharded weights, after the last batch, to the processes that have more batches."""
        if self.shards is not None:
            self.shards.after_batch(self.trainer, batch_idx, dataloader_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    # -------------------------------------------------------------------------------------------------------- optimizer

    def trained_groups(self) -> Groups:
        """Return the optimizer's parameter groups with names and learning rates."""
        groups = parameter_groups(
            self.backbone,
            {name: p for name, p in self.named_parameters() if self._in_head(name)},
            tuning=self.tuning,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_ratio_b=self.lr_ratio_b,
            lr_ratio_head=self.lr_ratio_head,
            lr_ratio_role=self.lr_ratio_role,
        )
        return groups if self.baseline is None else groups + self.baseline.groups(self.learning_rate, self.weight_decay)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its learning rate schedule by optimizer step."""
        optimizer = self.optimizer_spec.build(self.trained_groups())
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ModelError(
                "trainer.max_epochs: the run has no end, and the learning rate schedule needs an end. Set the key or "
                "trainer.max_steps."
            )
        factor = schedule_factor(self.schedule, self.warmup_ratio, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_train_start(self) -> None:
        """Apply this run's learning rates, weight decay and length to the optimizer and the schedule.

        The optimizer can have other values: on resume from a checkpoint, and after LearningRateFinder or
        BatchSizeFinder. LearningRateFinder calls this hook for its range test too. In the range test, each step
        multiplies the tried learning rate by the ratio of each group.

        Raises:
            ModelError: If the initialiser is `given` and no factors were loaded.
        """
        given = self.tuning == "adapter" and self.adapter.init_a == "given"
        if given and not any(t.any() for t in adapter_state(self.backbone).values()):
            raise ModelError(
                "adapter.init_a and adapter.init_b: given needs factors from a file. Set model.adapter_path, or choose "
                "other initialisers (orthogonal and zero)."
            )
        scheduler, groups = self.lr_schedulers(), self.trained_groups()
        if not isinstance(scheduler, LambdaLR):
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            self._range_test = RangeTest(optimizer, self.learning_rate, [group["lr"] for group in groups])
            return
        if self._range_test is not None:
            changed = self.learning_rate != self._range_test.base
            origin = "from LearningRateFinder" if changed else "unchanged, since LearningRateFinder suggested no value"
            _log.info(f"model.learning_rate: {self.learning_rate:g}, {origin}.")
            self._range_test.end()
            self._range_test = None
        restart_schedule(scheduler, groups, self._schedule_factor())
        if self.baseline is not None:
            self.baseline.start(self.trainer.global_step + steps_left(self.trainer))

    def _schedule_factor(self) -> Callable[[int], float]:
        """Return the schedule as a function of the optimizer step in this fit.

        With `schedule_window`, the schedule is a section of a longer schedule. If the schedule restarts with each link
        of a chain, the schedule is that of the current link. The steps are counted anew, since the number of batches or
        processes may have changed since the checkpoint.
        """
        if self.schedule_window is not None:
            before, total = self.schedule_window
            factor_of_training = schedule_factor(self.schedule, self.warmup_ratio, total)
            return lambda step: factor_of_training(before + step)
        start, end_epoch, every = 0, None, self.link_epochs
        if every is not None and self.adapter.chain.schedule == "restart":
            start, end_epoch = self.chain.start, (self.current_epoch // every + 1) * every
        steps = self.trainer.global_step + steps_left(self.trainer, end_epoch) - start
        factor = schedule_factor(self.schedule, self.warmup_ratio, steps)
        return lambda step: factor(step - start)

    def on_train_epoch_start(self) -> None:
        """Begin the next link of a chain after every `every_n_epochs` epochs.

        A link is merged when the next link begins, so the last link is never merged. A checkpoint at the end of an
        epoch contains the link that was trained in this epoch.
        """
        every, epoch, step = self.link_epochs, self.current_epoch, self.trainer.global_step
        is_due = every is not None and epoch > 0 and epoch % every == 0 and self.chain.start < step
        if not is_due or self._range_test is not None:
            return
        self.check_weights()
        self.frozen_digest.hexdigest()  # The digest is of the pretrained weights, so it must be complete by now.
        reset = self.chain.begin_link(self.backbone, self.adapter, step)
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        groups = self.trained_groups()
        assert isinstance(optimizer, torch.optim.Optimizer)
        reset_states(optimizer, self.optimizer_spec.build([dict(group) for group in groups]), reset)
        if self.adapter.chain.schedule == "restart" and isinstance(scheduler, LambdaLR):
            restart_schedule(scheduler, groups, self._schedule_factor())
        merged = len(self.chain.links)
        if self.chain.rounding > TOLERATED_ROUNDING:
            dtype = str(self.backbone_dtype).removeprefix("torch.")
            _log.warning(
                f"model.backbone_dtype: rounding the merged weights to {dtype} changed the update of link {merged} by "
                f"{100 * self.chain.rounding:.2g} % of its norm. Set the key to float32 for a negligible error."
            )
        _log.info(f"model.adapter.chain: link {merged} is merged into the weights, and link {merged + 1} begins.")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add AdaLoRA's regularisation to the loss. The logged `train/loss` stays comparable with other tunings."""
        if self.baseline is not None:
            loss = loss + self.baseline.penalty() / self.trainer.accumulate_grad_batches
        super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then prune with AdaLoRA."""
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        if self.baseline is not None and self._range_test is None:
            self.baseline.after_step(self.trainer.global_step + 1)

    # ------------------------------------------------------------------------------------------------------- checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add AdaLoRA's state to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.baseline is not None and (state := self.baseline.state()):
            checkpoint[self.tuning] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore AdaLoRA's state if training resumes.

        Raises:
            ModelError: If `shard_frozen` is set and the checkpoint is of a chain.
        """
        if self.shard_frozen and CHAIN in checkpoint:
            raise ModelError(
                "model.shard_frozen: the checkpoint is of a chain (model.adapter.chain), whose links cannot be merged "
                "into sharded weights. Set the key to false."
            )
        super().on_load_checkpoint(checkpoint)
        if self.baseline is not None and self._trainer is not None and self._trainer.state.fn == "fit":
            self.baseline.load_state(checkpoint.get(self.tuning))

    def parameter_counts(self) -> dict[str, int]:
        """Return the numbers of trainable and total parameters, and the size of the adapters in bytes."""
        factors = adapter_state(self.backbone) if self.baseline is None else self.baseline.parameters()
        tensors = [*factors.values(), *(tensor for link in self.chain.links for tensor in link.values())]
        return {
            "params/trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "params/total": sum(p.numel() for p in self.parameters()),
            "adapter/bytes": sum(t.numel() * t.element_size() for t in tensors),
        }


def _check_tuning(tuning: Tuning, backbone_dtype: BackboneDtype, adapter_path: str | None, shard_frozen: bool) -> None:
    """Check the keys that depend on `tuning`.

    Raises:
        ModelError: If a key is not supported with the tuning.
    """
    if tuning == "full" and backbone_dtype != "float32":
        raise ModelError(
            "model.backbone_dtype: bfloat16 is for frozen weights, since bfloat16 rounds small updates away. With "
            "tuning: full use float32, and --trainer.precision bf16-mixed for speed."
        )
    if adapter_path is not None and tuning != "adapter":
        raise ModelError(f"model.adapter_path: with tuning {tuning} there are no adapters. Set model.tuning: adapter.")
    if shard_frozen and tuning == "full":
        raise ModelError(
            "model.shard_frozen: with tuning: full nothing is frozen. Set the key to false, or tune adapters."
        )
    if shard_frozen and tuning in METHODS:
        raise ModelError(
            f"model.shard_frozen: layers of tuning {tuning} are PEFT's and cannot be sharded. Set the key to false."
        )
