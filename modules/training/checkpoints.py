"""Checkpoint contents: what is saved of a tuned backbone with its heads, and how it is restored."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, AdapterError, Chain, Projection, adapter_state
from modules.adapters.state import refuse_merged, state_problems
from modules.training.frozen_digest import FrozenDigest
from modules.training.optimization import Groups, OptimizerSpec

CHAIN = "chain"  # Key of the merged links of a chain of adapters.
POSITION = {"epoch", "samples", "seed"}  # Keys of a position in the data.
AFTER_DIVERGENCE = (
    "The weights of this step were not saved. Resume with --ckpt_path last and a lower --model.learning_rate, a larger "
    "--model.warmup_ratio or --trainer.gradient_clip_val 1.0."
)


class CheckpointedModule(L.LightningModule):
    """Save and restore everything but the frozen backbone. A checkpoint has a digest of the frozen backbone.

    `AdaptedModule` sets the attributes.
    """

    backbone: nn.Module
    tuning: str
    optimizer_spec: OptimizerSpec
    head_names: list[str]
    fingerprint: str  # Of each frozen tensor's first and last values, for older checkpoints without a digest.
    frozen_digest: FrozenDigest
    chain: Chain
    adapter: AdapterConfig
    projections: list[Projection]

    def saved_state(self) -> dict[str, Tensor]:
        """Return the tensors to save: trained parameters, both factors of each adapter, heads, changing buffers."""
        full = self.state_dict()
        keep = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        keep |= {f"backbone.{name}" for name in adapter_state(self.backbone)}
        frozen = self.tuning != "full"  # The buffers of a frozen backbone do not change.
        keep |= {name for name, _ in self.named_buffers() if not (frozen and name.startswith("backbone."))}
        return {name: tensor for name, tensor in full.items() if name in keep or self._in_head(name)}

    def _in_head(self, name: str) -> bool:
        return any(name.startswith(f"{head}.") for head in self.head_names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the frozen backbone in a checkpoint by its digest.

        Lightning calls callbacks before this hook. Values that a callback has changed, such as averaged weights, are
        saved.

        Raises:
            ModelError: If a saved tensor is not finite, or a callback has added, removed or reshaped tensors. No file
                is written.
        """
        self.check_weights()
        saved, state, full = self.saved_state(), checkpoint["state_dict"], self.state_dict()
        problems = state_problems({n: t for n, t in full.items() if n in saved or n in state}, state)
        others = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        copied = has_keys(others, full.keys() - saved.keys())
        if problems or copied:
            change = "; ".join(problems) or "the frozen backbone was added"
            raise ModelError(
                f"trainer.callbacks: a callback has changed the tensors of a checkpoint ({change}), so a run could "
                "not resume. Remove the callback; for averaged weights use EMAWeightAveraging."
            )
        checkpoint["state_dict"] = {name: state[name] for name in saved}
        checkpoint["frozen_digest"] = self.frozen_digest.hexdigest()
        if self.chain.links:
            checkpoint[CHAIN] = self.chain.state()
        keys = checkpoint["hyper_parameters"]  # torch.load with weights_only=True rejects dataclasses.
        keys.update({n: asdict(v) for n, v in keys.items() if is_dataclass(v) and not isinstance(v, type)})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the pretrained weights match the checkpoint's digest, and merge the links of its chain.

        Older checkpoints have a fingerprint of the first and last values of each weight instead of the digest.

        Raises:
            ModelError: If the checkpoint has another tuning, other tensors or other frozen weights. In a fit, also if
                the optimizer or schedule states do not match.
        """
        checkpoint_tuning = checkpoint["hyper_parameters"].get("tuning", self.tuning)
        if checkpoint_tuning != self.tuning:
            raise ModelError(
                f"model.tuning: the checkpoint was trained with tuning {checkpoint_tuning}, and this model has tuning "
                f"{self.tuning}. Set the key to {checkpoint_tuning}."
            )
        self._check_names(checkpoint["state_dict"])
        if "frozen_digest" in checkpoint:
            matches = checkpoint["frozen_digest"] == self.frozen_digest.hexdigest()
        else:
            matches = checkpoint.get("frozen_fingerprint", self.fingerprint) == self.fingerprint
        if not matches:
            raise ModelError(
                "ckpt_path: the checkpoint was trained over other frozen weights than this backbone's. Set "
                "model.backbone, model.weights, model.backbone_args, model.backbone_dtype and model.image_size to the "
                "values in the run's config.yaml (with weights: none, also seed_everything). If the file of weights "
                "has changed, start a new run from the adapter with --model.adapter_path RUN/adapter."
            )
        if CHAIN in checkpoint:
            self._check_scale(checkpoint["hyper_parameters"].get("adapter"))
        try:
            self.chain.load_state(self.backbone, checkpoint.get(CHAIN))
        except AdapterError as error:
            raise ModelError(f"ckpt_path: {error}") from error
        if (trainer := self._trainer) is not None and trainer.state.fn == "fit":
            check_training_state(checkpoint, self.optimizer_spec, self.trained_groups())
            # Lightning stores the position in the data under the data module's class name. Older runs have older names.
            name = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]
            positions = [v for v in checkpoint.values() if isinstance(v, Mapping) and v.keys() >= POSITION]
            if positions:
                checkpoint.setdefault(name, positions[0])

    def _check_scale(self, saved: Any) -> None:
        """Check that the merged links keep their scale s.

        Args:
            saved: Keys of the checkpoint's adapter.

        Raises:
            ModelError: If s of a projection differs, or the keys are damaged.
        """
        try:
            trained = AdapterConfig(**saved)
        except (TypeError, AdapterError) as error:
            raise ModelError(
                f"ckpt_path: the adapter's keys in the checkpoint are damaged ({error}). Use another checkpoint."
            ) from error
        for projection in self.projections:
            before, now = trained.scale_of(projection), self.adapter.scale_of(projection)
            if before != now:
                raise ModelError(
                    f"model.adapter.alpha: the scale of {projection.name} is {now:g}, and the checkpoint's chain has "
                    f"merged links with the scale {before:g}. Set alpha, scaling and alpha_pattern to the values in "
                    "the run's config.yaml."
                )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load exactly the tensors that `saved_state` returns. `strict` has no effect.

        Raises:
            ModelError: If tensors are missing, unexpected or of another shape. No tensor is then loaded.
            AdapterError: If the adapters are merged.
        """
        refuse_merged(self.backbone)
        self._check_names(state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def _check_names(self, state_dict: Mapping[str, Any]) -> None:
        if problems := state_problems(self.saved_state(), state_dict):
            raise ModelError(
                "The checkpoint does not fit the configured model: "
                + "; ".join(problems)
                + ". Use the config.yaml of the checkpoint's run, or the same backbone, tuning and adapter keys."
            )

    def trained_groups(self) -> Groups:
        """Return the optimizer's parameter groups."""
        raise NotImplementedError

    def check_weights(self) -> None:
        """Check that all saved tensors are finite. A finite loss does not guarantee finite weights.

        Raises:
            ModelError: If a tensor is not finite. The message has the step and the tensor.
        """
        for name, tensor in self.saved_state().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ModelError(f"At step {self.trainer.global_step} {name} is no longer finite. {AFTER_DIVERGENCE}")


def has_keys(tree: Any, names: Set[str]) -> bool:
    """Return True if nested mappings have a tensor under any of the names."""
    if not isinstance(tree, Mapping):
        return False
    return any((isinstance(v, Tensor) and k in names) or has_keys(v, names) for k, v in tree.items())


def check_training_state(checkpoint: Mapping[str, Any], spec: OptimizerSpec, groups: Groups) -> None:
    """Check that the optimizer and schedule states of a checkpoint match the parameters of this run.

    Args:
        checkpoint: With `optimizer_states` and `lr_schedulers`.
        spec: The optimizer of this run.
        groups: Parameter groups of this run.

    Raises:
        ModelError: If the states are damaged, or belong to another optimizer, other groups or other parameters.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fresh = spec.build([dict(group) for group in groups])
    schedule = torch.optim.lr_scheduler.LambdaLR(fresh, lambda _: 1.0).state_dict()
    template = fresh.state_dict()["param_groups"]
    try:
        (optimizer,), (scheduler,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        fits = (
            [group["params"] for group in optimizer["param_groups"]] == [group["params"] for group in template]
            and all(_like(g, t) for g, t in zip(optimizer["param_groups"], template, strict=True))
            and all(spec.is_state(state, parameters[index]) for index, state in optimizer["state"].items())
            and scheduler.keys() == schedule.keys()
            and _like(scheduler, schedule)
            and not any(scheduler["lr_lambdas"])
        )
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        fits = False
    if not fits:
        raise ModelError(
            "ckpt_path: the optimizer and schedule states of the checkpoint do not match the parameters of this run. "
            "Set model.tuning, model.adapter, model.optimizer and model.lr_ratio_role as in the run's config.yaml, or "
            "use another checkpoint. Or start a new run from the adapter with --model.adapter_path RUN/adapter."
        )


def _like(values: Mapping[str, Any], template: Mapping[str, Any]) -> bool:
    """Return True if values have the keys and types of a template. Integers and floats count as one type."""

    def kind(value: Any) -> type:
        return float if type(value) is int else type(value)

    return all(value is None or kind(values[key]) is kind(value) for key, value in template.items())
