"""What the checkpoints of every task hold: all but the frozen backbone, of which they have a fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning as L
from torch import Tensor, nn

from modules.adapters import adapter_state
from modules.adapters.state import refuse_merged, state_problems
from modules.errors import ModelError

AFTER_DIVERGENCE = (
    "Nothing of it was saved: resume from the last checkpoint with --ckpt_path last and a lower --model.learning_rate, "
    "a longer --model.warmup_ratio or --trainer.gradient_clip_val 1.0."
)


class CheckpointedModule(L.LightningModule):
    """What is saved of a tuned backbone with its heads, and how it comes back; `AdaptedModule` sets the attributes."""

    backbone: nn.Module
    tuning: str
    head_names: list[str]
    fingerprint: str  # of what is frozen

    def saved_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: every trained parameter, both factors of each adapter, heads, live buffers."""
        full = self.state_dict()
        keep = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        keep |= {f"backbone.{name}" for name in adapter_state(self.backbone)}
        frozen = self.tuning != "full"  # then the backbone's buffers are what was loaded
        keep |= {name for name, _ in self.named_buffers() if not (frozen and name.startswith("backbone."))}
        return {name: tensor for name, tensor in full.items() if name in keep or self._in_head(name)}

    def _in_head(self, name: str) -> bool:
        return any(name.startswith(f"{head}.") for head in self.head_names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen backbone out, but for a fingerprint.

        Raises:
            ModelError: If anything is not finite; what is on disk stays.
        """
        self.check_weights()
        checkpoint["state_dict"] = self.saved_state()
        checkpoint["frozen_fingerprint"] = self.fingerprint
        keys = checkpoint["hyper_parameters"]  # plain dicts for dataclasses, or weights_only refuses them
        keys.update({n: asdict(v) for n, v in keys.items() if is_dataclass(v) and not isinstance(v, type)})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See that the frozen weights are those that the checkpoint was trained over.

        Raises:
            ModelError: If they are not.
        """
        tuned = checkpoint["hyper_parameters"].get("tuning", self.tuning)
        if tuned != self.tuning:
            raise ModelError(
                f"model.tuning: the checkpoint is of tuning {tuned}, and this model is set up for {self.tuning}; leave "
                "the key as it was."
            )
        if checkpoint.get("frozen_fingerprint", self.fingerprint) != self.fingerprint:
            raise ModelError(
                "The checkpoint was trained over other frozen weights than this backbone's: set model.backbone, "
                "model.weights, model.backbone_args, model.backbone_dtype (and model.image_size; with weights: none, "
                "seed_everything) as they were; the run's config.yaml has them."
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `saved_state` saves, and nothing else, whatever `strict` says.

        Raises:
            ModelError: With the list of what is missing, unexpected or of another shape; nothing is then loaded.
            AdapterError: If the adapters are merged.
        """
        refuse_merged(self.backbone)
        if problems := state_problems(self.saved_state(), state_dict):
            raise ModelError(
                "The checkpoint is of another model than the one configured: "
                + "; ".join(problems)
                + ". Use the config.yaml of the checkpoint's run, or its backbone, tuning and adapter keys."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def check_weights(self) -> None:
        """Stop before weights that are not finite are kept or looked at: a finite loss may have had such a gradient.

        Raises:
            ModelError: With the step, the first such tensor and what to try.
        """
        for name, tensor in self.saved_state().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ModelError(f"At step {self.trainer.global_step} {name} is no longer finite. {AFTER_DIVERGENCE}")
