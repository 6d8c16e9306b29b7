"""Base class of every task: its backbone, what of it is tuned, the optimizer, and the loop of evaluation.

`training.checkpoints` has what is saved, `training.optimization` the learning rates, `training.checks` what stops a fit
that cannot learn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric, MetricCollection

from datamodules.contract import DataKind
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, Projection, adapter_state, attach, load_adapter_state
from modules.adapters.state import frozen_fingerprint
from modules.formats.adapter_files import load_heads, read_adapter
from modules.scaling.blocks import layerdrop_rates
from modules.training.checkpoints import CheckpointedModule
from modules.training.checks import DivergenceCheck, IdleAdapterCheck
from modules.training.freezing import freeze
from modules.training.frozen_digest import FrozenDigest
from modules.training.optimization import (
    Groups,
    OptimizerSpec,
    RangeTest,
    Schedule,
    check_rates,
    parameter_groups,
    restart_schedule,
    schedule_factor,
    steps_left,
)
from modules.training.peft_baselines import METHODS, PeftBaseline
from modules.training.update_weights import EqualWeights

if TYPE_CHECKING:
    from modules.scaling.frozen_prefix import FrozenPrefix
    from modules.scaling.sharding import FrozenShards

_log = logging.getLogger(__name__)

Tuning = Literal["adapter", "head", "full", "adalora", "ia3"]
HeadlessTuning = Literal["adapter", "full", "adalora", "ia3"]  # of tasks without a new head
BackboneDtype = Literal["float32", "bfloat16"]
Stage = Literal["val", "test"]
STAGES: tuple[Stage, Stage] = ("val", "test")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class AdaptedModule(EqualWeights, CheckpointedModule):
    """A backbone with a head, tuned through adapters, through its head alone, or in full.

    The keys below are those of every task. A task's `__init__` hands them on, builds `backbone` and calls
    `configure_tuning`. The backbone is built in `__init__`, so that a wrong name, role or rank is reported before any
    data are read. A head may have to wait for `setup`, when the classes of the data are known.

    Heads are what was not pretrained for the task. They are trained whole whatever the tuning, and are part of every
    checkpoint. `head_names` has their names, inside the backbone (`backbone.classifier`) or beside it (`head`).

    A task computes in `loss`, `evaluate` and `predict_step`. The metrics of `configure_metrics` are those of validation
    and test; `scores` is what is logged of them.

    Args:
        weights: Weights of the backbone: `pretrained` (those of its name, repository or directory), `none`, or a local
            file: .safetensors, and for timm also .pth, .pt or .bin.
        backbone_args: Changes to the architecture: arguments of `timm.create_model` such as `drop_path_rate`, or values
            of a config.json of transformers such as `hidden_dropout_prob`.
        backbone_dtype: Dtype of the frozen weights; bfloat16 halves the memory. Factors and head stay float32. `full`
            needs float32.
        tuning: What is trained: `adapter` (factors and head), `head`, or `full` (everything, no adapter). For
            comparison, `adalora` and `ia3` are PEFT's methods; see `modules.training.peft_baselines`.
        adapter: The adapters; of no effect if `tuning` is `head` or `full`.
        adapter_path: Adapters to start from, and the head that lies with them: a directory as PEFT or `export` writes
            it, or a name on the hub. Of `adapter` then only `train` counts. A checkpoint holds what was loaded.
        learning_rate: Peak learning rate of A and, unless the ratios say otherwise, of everything else; above 0.
        weight_decay: Weight decay of matrices; biases and norms have none.
        optimizer: An optimizer of torch.optim: `class_path`, such as torch.optim.SGD, and `init_args`. None is AdamW.
        schedule: Shape of the learning rate after the warm-up, by optimizer steps: `cosine` or `linear` to zero, or
            `constant`.
        warmup_ratio: Share of all steps in which the learning rate climbs from zero, in [0, 1).
        lr_ratio_b: Learning rate of B over `learning_rate` (LoRA+, Hayou et al. 2024).
        lr_ratio_head: Learning rate of the head over `learning_rate`.
        lr_ratio_role: Further ratios of the learning rate by the role of an adapted projection, such as value: 2.0;
            both factors of the role are multiplied. Of no effect without adapters.
        shard_frozen: Whether several processes (--trainer.strategy ddp) each keep a share of the blocks' frozen weights
            instead of all; see `modules.scaling.sharding`.
        compile: Whether the backbone's blocks are compiled for training; see `modules.scaling.compilation`.

    Raises:
        ModelError: For a value out of range, or values that exclude each other.
    """

    kinds: tuple[DataKind, ...]  # of data that the steps take
    class_names: list[str] | None = None  # by label; None until they are known
    position_limit: int | None = None  # most tokens of a text; None for any number
    peft_task: str | None = None  # PEFT's name of the task
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
        self.save_hyperparameters()  # those of the task too
        by_role = {f"lr_ratio_role.{role}": ratio for role, ratio in (lr_ratio_role or {}).items()}
        ratios = {"lr_ratio_b": lr_ratio_b, "lr_ratio_head": lr_ratio_head, **by_role}
        check_rates(learning_rate, weight_decay, warmup_ratio, ratios)
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
        self.shards: FrozenShards | None = None
        self._compiled = False
        self.head_names: list[str] = []
        self.projections: list[Projection] = []
        self._given_heads: dict[str, Tensor] = {}
        self._range_test: RangeTest | None = None
        self.prefix: FrozenPrefix | None = None
        self.baseline: PeftBaseline | None = None
        # a loss that is no number is not left out
        self.losses = nn.ModuleDict({stage: MeanMetric(nan_strategy=math.nan) for stage in STAGES})
        self.metrics = nn.ModuleDict()  # by stage and set
        self.set_names: dict[Stage, list[str]] = {}

    # -------------------------------------------------------------------------------------------------------- backbone

    def configure_tuning(self, heads: Sequence[str] = ()) -> None:
        """Cast and freeze the backbone and attach the adapters; leave it in train mode, with its dropout on.

        Batch normalisation of a frozen backbone stays in eval mode: its running statistics belong to what is frozen.

        Args:
            heads: Names of the backbone's modules that are heads.
        """
        if self.tuning != "full":
            freeze(self.backbone, heads, self.backbone_dtype)
        self.head_names = [f"backbone.{name}" for name in heads]
        if self.tuning == "adapter":
            self._attach(heads)
        elif self.tuning == "adalora" or self.tuning == "ia3":
            if self.tuning == "adalora" and (rates := layerdrop_rates(self.backbone)):
                key, share = next(iter(rates.items()))
                raise ModelError(
                    f"model.backbone_args.{key}: {share} leaves out blocks at random, whose importance adalora cannot "
                    "measure. Set it to 0."
                )
            self.baseline = PeftBaseline(self.tuning, self.backbone, self.adapter, heads)
            self.projections = self.baseline.projections
        self.backbone.train()  # from_pretrained gives eval mode, and Lightning keeps the mode it finds
        if self.tuning != "full":
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        self.fingerprint = frozen_fingerprint(self.backbone)
        self.frozen_digest = FrozenDigest(self.backbone)

    def _attach(self, heads: Sequence[str]) -> None:
        """Attach the adapters, those of `adapter_path` if there is one; a checkpoint then says what they are.

        Raises:
            ModelError: For a ratio of a role that no adapted projection has.
        """
        names = self.peft_head_names()
        given = None
        if self.adapter_path is not None:
            given = read_adapter(self.adapter_path, self.backbone, self.adapter, heads, names)
            self.adapter, self._given_heads = given.config, given.heads
        self.projections = attach(self.backbone, self.adapter, exclude=heads)
        roles = {projection.role for projection in self.projections}
        if unknown := sorted(self.lr_ratio_role.keys() - roles):
            raise ModelError(
                f"model.lr_ratio_role: no adapted projection has the role {', '.join(unknown)}. The roles here are "
                f"{', '.join(sorted(roles))}."
            )
        if given is None:
            return
        load_adapter_state(self.backbone, given.factors)
        self.hparams.update(adapter=self.adapter, adapter_path=None)
        if missing := [head for head in names if not any(n.startswith(f"{head}.") for n in given.heads)]:
            _log.warning(f"model.adapter_path: {self.adapter_path} has no {', '.join(missing)}, which starts anew.")

    def peft_head_names(self) -> dict[str, tuple[str, ...]]:
        """Return for each head its names in a complete model of the backbone's own library: PEFT wraps that model."""
        return {name: (name.removeprefix("backbone."),) for name in self.head_names}

    def load_given_heads(self) -> None:
        """Load the heads that lay with the adapters; a task calls it once its heads are as the data want them.

        Raises:
            ModelError: If they are other heads than the task's.
        """
        given, self._given_heads = self._given_heads, {}
        if problems := load_heads(self, self.head_names, given):
            raise ModelError(
                f"model.adapter_path: the head of {self.adapter_path} is not this task's: {'; '.join(problems)}. The "
                "data must have as many classes as that was trained on, in the same order."
            )

    def frozen_prefix(self) -> FrozenPrefix:
        """Return the part of the backbone whose output the data may keep in the place of the backbone's input.

        Raises:
            ModelError: If there is none, or the task cannot go on from its output.
        """
        keys = {"tuning: full": self.tuning == "full", "shard_frozen: true": self.shard_frozen}
        if key := next((key for key, holds in keys.items() if holds), None):
            raise ModelError(f"data.cache_prefix: with model.{key} no process has a frozen prefix; set it to false.")
        if self.compiles:
            raise ModelError(
                "data.cache_prefix: goes past blocks, which model.compile: true cannot follow; set one to false."
            )
        if self.prefix is None:
            self.prefix = self.build_prefix()
        return self.prefix

    def build_prefix(self) -> FrozenPrefix:
        """Return a task's own prefix; see `modules.scaling.frozen_prefix`."""
        raise ModelError(f"data.cache_prefix: {type(self).__name__} cannot go on from hidden states; set it to false.")

    # ----------------------------------------------------------------------------------------------------------- setup

    @property
    def data(self) -> Any:
        """Return the trainer's data module; `datamodules.contract` says what it may be asked."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def take_from_data(self, key: str, known: Any) -> Any:
        """Return a property of the task (`class_names`, `metrics`), the model's own or else what the data know.

        Raises:
            ModelError: If neither knows.
        """
        value = known if self.hparams[key] is None else self.hparams[key]
        if value is None:
            raise ModelError(f"model.{key}: neither the data nor a checkpoint (--ckpt_path) says which they are.")
        self.hparams[key] = value if isinstance(value, str | int) else list(value)
        return self.hparams[key]

    def setup(self, stage: str) -> None:
        """Check the trainer's precision; runs behind the data module's `setup`.

        Raises:
            ModelError: For a precision that would take the factors out of float32, or scale AdaLoRA's gradients.
        """
        if self.trainer.precision not in PRECISIONS:
            raise ModelError(
                f"trainer.precision: {self.trainer.precision} would take factors and head out of float32; use 32-true, "
                "bf16-mixed or 16-mixed, and model.backbone_dtype: bfloat16 to save memory."
            )
        if self.tuning == "adalora" and self.trainer.precision == "16-mixed":
            raise ModelError(
                "trainer.precision: 16-mixed scales the loss and skips steps, of which adalora would take a wrong "
                "importance. Use bf16-mixed or 32-true."
            )

    def configure_model(self) -> None:
        """Divide the frozen weights among the processes and compile the blocks, if the keys say so."""
        trainer = self._trainer
        if trainer is None:
            return
        if self.shard_frozen and self.shards is None:
            from modules.scaling.sharding import shard_frozen_weights  # a second of imports that other runs do not need

            self.shards = shard_frozen_weights(self, self.backbone, self.fingerprint, trainer)
        if self.compiles and not self._compiled and trainer.state.fn == "fit":
            from modules.scaling.compilation import compile_blocks

            compile_blocks(self.backbone, trainer.strategy.root_device)
            self._compiled = True

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the checks of a fit, and what evaluates without compilation if training is compiled."""
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
        """Return the loss of a batch in training, the mean over its items."""
        raise NotImplementedError

    def items(self, batch: Any) -> int | Tensor:
        """Return the number of items that the loss of a batch is the mean over; 1 if all batches have equally many."""
        return 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log it as `train/loss`."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        self.items_in_batch = self.items(batch)
        return loss

    def configure_metrics(
        self, metrics: Metric | MetricCollection, set_names: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Take the metrics of validation and test.

        Args:
            metrics: Metrics whose `compute` returns values by name.
            set_names: Names of the sets of `val` and `test`, each of which has metrics of its own; None is a single
                set without a name.
        """
        self.set_names = {stage: list((set_names or {}).get(stage, [""])) for stage in STAGES}
        self.metrics = nn.ModuleDict(
            {f"{stage}{name}": metrics.clone() for stage, names in self.set_names.items() for name in names}
        )

    def update_loss(self, stage: Stage, loss: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add the loss of each sample of a batch, or their mean with the number of items as its weight."""
        cast(MeanMetric, self.losses[stage]).update(loss, weight)

    def update_metrics(self, stage: Stage, *values: Any, set_number: int = 0) -> None:
        """Update the metrics of a set, by its number among the loaders of a stage."""
        metrics = self.metrics[f"{stage}{self.set_names[stage][set_number]}"]
        cast(MetricCollection, metrics).update(*values)

    def evaluate(self, stage: Stage, batch: Any, dataloader_idx: int) -> Any:
        """Update loss and metrics of a stage; what is returned reaches the callbacks.

        Args:
            stage: `val` or `test`.
            batch: A batch.
            dataloader_idx: Number of its loader.
        """
        raise NotImplementedError

    def scores(self, stage: Stage) -> dict[str, Tensor]:
        """Return the loss and the metrics of a stage by full name (`val/loss`), and begin anew."""
        loss = cast(MeanMetric, self.losses[stage])
        values = {f"{stage}/loss": loss.compute()}
        loss.reset()
        for name in self.set_names[stage]:
            metrics = cast(MetricCollection, self.metrics[f"{stage}{name}"])
            end = f"_{name}" if name else ""
            values |= {f"{stage}/{key}{end}": value.float() for key, value in metrics.compute().items()}
            metrics.reset()
        return values

    def _log_scores(self, stage: Stage) -> None:
        for name, value in self.scores(stage).items():
            self.log(name, value, prog_bar=name.count("/") == 1)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Update `val/loss` and the metrics of validation."""
        return self.evaluate("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log loss and metrics."""
        self._log_scores("val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Update `test/loss` and the metrics of the test."""
        return self.evaluate("test", batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log loss and metrics."""
        self._log_scores("test")

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Behind the last batch, help the processes that have more to their shares of sharded weights."""
        if self.shards is not None:
            self.shards.after_batch(self.trainer, batch_idx, dataloader_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    # -------------------------------------------------------------------------------------------------------- optimizer

    def trained_groups(self) -> Groups:
        """Return the named parameter groups of the optimizer, with the learning rate of each."""
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
        """Return the optimizer over named groups, with a learning rate that is a function of the optimizer step."""
        optimizer = self.optimizer_spec.build(self.trained_groups())
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ModelError("trainer.max_epochs: a run without an end has no schedule; set it or max_steps.")
        factor = schedule_factor(self.schedule, self.warmup_ratio, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_train_start(self) -> None:
        """Let this run's learning rates, weight decay and length win over those that the optimizer was set up with.

        These differ on resume, when the optimizer has its saved state, and after a search of LearningRateFinder or
        BatchSizeFinder. The range test of LearningRateFinder is a training of its own, in which this hook is called
        too: the learning rate that it tries is then multiplied, at each step, by the ratio of each group.

        Raises:
            ModelError: If the factors were to be given, and nothing has.
        """
        if self.adapter.init_a == "given" and not any(t.any() for t in adapter_state(self.backbone).values()):
            raise ModelError(
                "adapter.init_a and adapter.init_b: given says that the factors come from elsewhere; set "
                "model.adapter_path, or choose others (orthogonal and zero)."
            )
        scheduler, groups = self.lr_schedulers(), self.trained_groups()
        if not isinstance(scheduler, LambdaLR):
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            self._range_test = RangeTest(optimizer, self.learning_rate, [group["lr"] for group in groups])
            return
        if self._range_test is not None:
            changed = self.learning_rate != self._range_test.base
            origin = "found by" if changed else "as before, for there was no suggestion of"
            _log.info(f"model.learning_rate: {self.learning_rate:g}, {origin} LearningRateFinder.")
            self._range_test.end()
            self._range_test = None
        # what is left decides where in the schedule this is: batches or processes may be others than before
        total = self.trainer.global_step + steps_left(self.trainer)
        restart_schedule(scheduler, groups, schedule_factor(self.schedule, self.warmup_ratio, total))
        if self.baseline is not None:
            self.baseline.start(total)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add AdaLoRA's regularisation to what is differentiated; `train/loss` is without it, as of other tunings."""
        if self.baseline is not None:
            loss = loss + self.baseline.penalty() / self.trainer.accumulate_grad_batches
        super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Step, then let AdaLoRA prune."""
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        if self.baseline is not None and self._range_test is None:
            self.baseline.after_step(self.trainer.global_step + 1)

    # ------------------------------------------------------------------------------------------------------- checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of a method of PEFT."""
        super().on_save_checkpoint(checkpoint)
        if self.baseline is not None and (state := self.baseline.state()):
            checkpoint[self.tuning] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the state of a method of PEFT, if training goes on."""
        super().on_load_checkpoint(checkpoint)
        if self.baseline is not None and self._trainer is not None and self._trainer.state.fn == "fit":
            self.baseline.load_state(checkpoint.get(self.tuning))

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable and total parameters, and the bytes that the adapters alone would take in a file."""
        factors = adapter_state(self.backbone) if self.baseline is None else self.baseline.parameters()
        return {
            "params/trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "params/total": sum(p.numel() for p in self.parameters()),
            "adapter/bytes": sum(t.numel() * t.element_size() for t in factors.values()),
        }


def _check_tuning(tuning: Tuning, backbone_dtype: BackboneDtype, adapter_path: str | None, shard_frozen: bool) -> None:
    """Check that the keys that depend on the tuning fit it.

    Raises:
        ModelError: With the key that does not.
    """
    if tuning == "full" and backbone_dtype != "float32":
        raise ModelError(
            "model.backbone_dtype: bfloat16 is for frozen weights, since small updates to it are rounded away; "
            "with tuning: full use float32 (and --trainer.precision bf16-mixed for speed)."
        )
    if adapter_path is not None and tuning != "adapter":
        raise ModelError(f"model.adapter_path: with tuning {tuning} there are no adapters; set it to adapter.")
    if shard_frozen and tuning == "full":
        raise ModelError("model.shard_frozen: with tuning: full nothing is frozen; set it to false, or tune adapters.")
    if shard_frozen and tuning in METHODS:
        raise ModelError(f"model.shard_frozen: tuning {tuning} has layers of PEFT, which stay whole. Set it to false.")
