"""Tuning of a backbone, and the learning rates of its parameters, for every task; `checkpoints` has the rest."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from datamodules.contract import DataKind
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, Projection, adapted_layers, adapter_state, attach, load_adapter_state
from modules.adapters.state import frozen_fingerprint
from modules.blocks import layerdrop_rates
from modules.checkpoints import AFTER_DIVERGENCE, CheckpointedModule
from modules.formats.adapter_files import load_heads, read_adapter
from modules.freezing import freeze
from modules.frozen_digest import FrozenDigest
from modules.optimization import RangeTest, Schedule, parameter_groups, schedule_factor, steps_left
from modules.peft_baselines import METHODS, PeftBaseline
from modules.update_weights import EqualWeights

if TYPE_CHECKING:
    from modules.frozen_prefix import FrozenPrefix
    from modules.sharding import FrozenShards

_log = logging.getLogger(__name__)

__all__ = ["AdaptedModule", "BackboneDtype", "ModelError", "Tuning"]

Tuning = Literal["adapter", "head", "full", "adalora", "ia3"]
BackboneDtype = Literal["float32", "bfloat16"]


class AdaptedModule(EqualWeights, CheckpointedModule):
    """A backbone with a head, tuned through adapters, through its head alone, or in full.

    A task's `__init__` calls `save_hyperparameters`, assigns `backbone` and ends with `configure_tuning`; besides, it
    has its steps. The backbone is built in `__init__`, so that a wrong name, role or rank is reported before any data
    is read; a head may have to wait for `setup`, when the data's labels are known.

    Heads are what was not pretrained for the task: trained whole whatever the tuning, and part of every checkpoint.
    `head_names` has their names, inside the backbone (`backbone.classifier`) or beside it (`head`).

    Args:
        tuning: What is trained: `adapter` (factors and head), `head`, or `full` (everything, no adapter). For
            comparison, `adalora` and `ia3` are PEFT's methods; see `modules.peft_baselines`.
        adapter: The adapters; of no effect if `tuning` is `head` or `full`.
        adapter_path: Adapters to start from, and the head that lies with them: a directory as PEFT or `export` writes
            it, or a name on the hub. Of `adapter` then only `train` counts. A checkpoint holds what was loaded.
        backbone_dtype: Dtype of the frozen weights; factors and head stay float32. `full` needs float32.
        learning_rate: Peak learning rate of A and, unless the ratios say otherwise, of everything else; above 0.
        weight_decay: AdamW's decay of matrices; biases and norms have none.
        schedule: Shape of the learning rate after the warm-up, by optimizer steps: `cosine` or `linear` to zero, or
            `constant`.
        warmup_ratio: Share of all steps in which the learning rate climbs from zero, in [0, 1).
        lr_ratio_b: Learning rate of B over `learning_rate` (LoRA+, Hayou et al. 2024).
        lr_ratio_head: Learning rate of the head over `learning_rate`.
        shard_frozen: Whether several processes (--trainer.strategy ddp) each keep a share of the blocks' frozen weights
            instead of all; see `modules.sharding`.
        compile: Whether the backbone's blocks are compiled for training; see `modules.compilation`.
    """

    kinds: tuple[DataKind, ...]  # of data that the steps take
    class_names: list[str] | None = None  # by label; None until they are known
    position_limit: int | None = None  # most tokens of a text; None for any number
    peft_task: str | None = None  # PEFT's name of the task
    backbone: nn.Module

    def __init__(
        self,
        tuning: Tuning,
        adapter: AdapterConfig,
        adapter_path: str | None,
        backbone_dtype: BackboneDtype,
        learning_rate: float,
        weight_decay: float,
        schedule: Schedule,
        warmup_ratio: float,
        lr_ratio_b: float,
        lr_ratio_head: float,
        shard_frozen: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not all(0 < rate < torch.finfo().max for rate in (learning_rate, lr_ratio_b, lr_ratio_head)):
            raise ModelError("model.learning_rate, model.lr_ratio_b and model.lr_ratio_head must be finite, above 0.")
        if not 0 <= weight_decay < math.inf:
            raise ModelError(f"model.weight_decay: {weight_decay} must be finite, 0 or more.")
        if not 0 <= warmup_ratio < 1:
            raise ModelError(f"model.warmup_ratio: {warmup_ratio} must lie in [0, 1).")
        if tuning == "full" and backbone_dtype != "float32":
            raise ModelError(
                "model.backbone_dtype: bfloat16 is for frozen weights, since small updates to it are rounded away; "
                "with tuning: full use float32 (and --trainer.precision bf16-mixed for speed)."
            )
        if adapter_path is not None and tuning != "adapter":
            raise ModelError(f"model.adapter_path: with tuning {tuning} there are no adapters; set it to adapter.")
        if shard_frozen and tuning == "full":
            raise ModelError(
                "model.shard_frozen: with tuning: full nothing is frozen; set it to false, or tune adapters."
            )
        if shard_frozen and tuning in METHODS:
            raise ModelError(
                f"model.shard_frozen: tuning {tuning} has layers of PEFT, which stay whole. Set it to false."
            )
        self.tuning: Tuning = tuning
        self.adapter_path = adapter_path
        self.adapter = adapter if isinstance(adapter, AdapterConfig) else AdapterConfig(**adapter)
        self.backbone_dtype = getattr(torch, backbone_dtype)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.schedule: Schedule = schedule
        self.warmup_ratio, self.lr_ratio_b, self.lr_ratio_head = warmup_ratio, lr_ratio_b, lr_ratio_head
        self.shard_frozen, self.compiles = shard_frozen, compile
        self.shards: FrozenShards | None = None
        self._compiled = False
        self.head_names: list[str] = []
        self.projections: list[Projection] = []
        self._given_heads: dict[str, Tensor] = {}
        self._gradients_seen = False
        self._range_test: RangeTest | None = None
        self.prefix: FrozenPrefix | None = None
        self.baseline: PeftBaseline | None = None

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
        """Attach the adapters, those of `adapter_path` if there is one; a checkpoint then says what they are."""
        if self.adapter_path is None:
            self.projections = attach(self.backbone, self.adapter, exclude=heads)
            return
        names = self.peft_head_names()
        given = read_adapter(self.adapter_path, self.backbone, self.adapter, heads, names)
        self.adapter, self._given_heads = given.config, given.heads
        self.projections = attach(self.backbone, self.adapter, exclude=heads)
        load_adapter_state(self.backbone, given.factors)
        self.hparams.update(adapter=self.adapter, adapter_path=None)
        if missing := [head for head in names if not any(n.startswith(f"{head}.") for n in given.heads)]:
            _log.warning(f"model.adapter_path: {self.adapter_path} has no {', '.join(missing)}, which starts anew.")

    def peft_head_names(self) -> dict[str, tuple[str, ...]]:
        """For each head its names in a complete model of the backbone's own library, which is what PEFT wraps."""
        return {name: (name.removeprefix("backbone."),) for name in self.head_names}

    def load_given_heads(self) -> None:
        """Load the heads that lay with the adapters; a task calls it once its heads are as the data wants them.

        Raises:
            ModelError: If they are other heads than the task's.
        """
        given, self._given_heads = self._given_heads, {}
        if problems := load_heads(self, self.head_names, given):
            raise ModelError(
                f"model.adapter_path: the head of {self.adapter_path} is not this task's: {'; '.join(problems)}. The "
                "data must have as many classes as that was trained on, in the same order."
            )

    def setup(self, stage: str) -> None:
        """Check the trainer's precision; runs behind the data module's `setup`.

        Raises:
            ModelError: For a precision that would take the factors out of float32, or scale AdaLoRA's gradients.
        """
        if self.trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
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
        """Divide the frozen weights among the processes and have training compiled, if the keys say so."""
        trainer = self._trainer
        if trainer is None:
            return
        if self.shard_frozen and self.shards is None:
            from modules.sharding import shard_frozen_weights  # a second of imports that other runs do not need

            self.shards = shard_frozen_weights(self, self.backbone, self.fingerprint, trainer)
        if self.compiles and not self._compiled and trainer.state.fn == "fit":
            from modules.compilation import compile_blocks

            compile_blocks(self.backbone, trainer.strategy.root_device)
            self._compiled = True

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callback that evaluates without compilation, if training is compiled."""
        if not self.compiles:
            return []
        from modules.compilation import UncompiledEvaluation

        return [UncompiledEvaluation()]

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Behind the last batch, help the processes that have more to their shares of sharded weights."""
        if self.shards is not None:
            self.shards.after_batch(self.trainer, batch_idx, dataloader_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

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

    def frozen_prefix(self) -> FrozenPrefix:
        """The part of the backbone whose output the data may keep; batches then have that in the place of their input.

        Raises:
            ModelError: If there is none, or the task cannot go on from it.
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
        """A task's own; see `modules.frozen_prefix`."""
        raise ModelError(f"data.cache_prefix: {type(self).__name__} cannot go on from hidden states; set it to false.")

    # ---------------------------------------------------------------------------------------------------- optimizer

    def trained_groups(self) -> list[dict[str, Any]]:
        """Return the named parameter groups of the optimizer, with the learning rate of each."""
        groups = parameter_groups(
            self.backbone,
            {name: p for name, p in self.named_parameters() if self._in_head(name)},
            tuning=self.tuning,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_ratio_b=self.lr_ratio_b,
            lr_ratio_head=self.lr_ratio_head,
        )
        return groups if self.baseline is None else groups + self.baseline.groups(self.learning_rate, self.weight_decay)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over named groups, with a learning rate that is a function of the optimizer step."""
        optimizer = torch.optim.AdamW(self.trained_groups())
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ModelError("trainer.max_epochs: a run without an end has no schedule; set it or max_steps.")
        factor = schedule_factor(self.schedule, self.warmup_ratio, int(steps))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
        schedulers = self.lr_schedulers()
        configured = self.trained_groups()
        if not isinstance(schedulers, torch.optim.lr_scheduler.LambdaLR):
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            self._range_test = RangeTest(optimizer, self.learning_rate, [group["lr"] for group in configured])
            return
        if self._range_test is not None:
            changed = self.learning_rate != self._range_test.base
            origin = "found by" if changed else "as before, for there was no suggestion of"
            _log.info(f"model.learning_rate: {self.learning_rate:g}, {origin} LearningRateFinder.")
            self._range_test.end()
            self._range_test = None
        # what is left decides where in the schedule this is: batches or processes may be others than before
        total = self.trainer.global_step + steps_left(self.trainer)
        factor_of = schedule_factor(self.schedule, self.warmup_ratio, total)
        schedulers.lr_lambdas = [factor_of for _ in schedulers.lr_lambdas]
        schedulers.base_lrs = [group["initial_lr"] for group in configured]
        factor = factor_of(schedulers.last_epoch)
        for group, own in zip(schedulers.optimizer.param_groups, configured, strict=True):
            keys = {key: own[key] for key in ("initial_lr", "weight_decay")}
            group.update(keys, lr=own["initial_lr"] * factor)
        if self.baseline is not None:
            self.baseline.start(total)

    def check_loss(self, loss: Tensor) -> None:
        """Stop before a loss that is not finite reaches the weights.

        Raises:
            ModelError: With the step and what to try; checkpoints on disk stay as they are.
        """
        if not torch.isfinite(loss) and self._range_test is None:
            raise ModelError(
                f"The training loss became {loss.item()} at step {self.trainer.global_step}. {AFTER_DIVERGENCE}"
            )

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

    def on_after_backward(self) -> None:
        """At a run's first step, check that every trained factor takes part in the forward pass."""
        if self._gradients_seen:
            return
        self._gradients_seen = True
        if layerdrop_rates(self.backbone):  # a step says nothing of blocks that it left out
            return
        idle = [
            f.projection.name
            for layer in adapted_layers(self.backbone).values()
            for f in layer.factors()
            if any(p.grad is None for p in f.named_factors(trained=True).values())
        ]
        if self.baseline is not None:
            idle += [name for name, parameter in self.baseline.parameters().items() if parameter.grad is None]
        if idle:
            raise ModelError(
                f"The adapters of {len(idle)} projections take no part in the forward pass of this backbone "
                f"({', '.join(idle[:3])}, …): it uses their weights without calling the layer. Choose other targets."
            )

    # ---------------------------------------------------------------------------------------------------- checkpoint

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

    # -------------------------------------------------------------------------------------------------------- counts

    def parameter_counts(self) -> dict[str, int]:
        """Trainable and total parameters, and the bytes of what the adapters alone would take in a file."""
        factors = adapter_state(self.backbone) if self.baseline is None else self.baseline.parameters()
        return {
            "params/trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "params/total": sum(p.numel() for p in self.parameters()),
            "adapter/bytes": sum(t.numel() * t.element_size() for t in factors.values()),
        }
