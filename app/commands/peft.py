"""A module's adapters and heads as PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jsonargparse import ArgumentError
from torch import Tensor

from app.commands.timm_head import timm_model
from modules.adapter_files import write_peft_files
from modules.adapters.peft_format import to_peft
from modules.base import AdaptedModule

if TYPE_CHECKING:  # a run on text imports no timm
    from modules.image_classification import ImageClassifier


def write_peft(
    module: AdaptedModule, dtype: torch.dtype, folder: Path, state: Mapping[str, Tensor] | None = None
) -> str:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT loads by itself.

    Args:
        module: The module.
        dtype: Dtype of the factors and heads written.
        folder: An empty directory.
        state: What to write of it, as `saved_state` names it; None takes its own, and then compares logits where the
            head has to move into the backbone.

    Returns:
        The call that loads it, with {} for the directory.

    Raises:
        ArgumentError: If it has no adapters, or the backbone takes no such head.
        AdapterError: If PEFT would take other modules for the heads.
    """
    if module.tuning != "adapter":
        raise ArgumentError(None, f"--format: peft is for adapters, and this run has tuning: {module.tuning}.")
    if hasattr(module.backbone, "pretrained_cfg"):
        base = _timm_base(cast("ImageClassifier", module), compare=state is None)
    else:
        base = _transformers_base(module)
    state = module.saved_state() if state is None else state
    inside = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    heads = {
        home: {name.removeprefix(f"{head}."): t for name, t in state.items() if name.startswith(f"{head}.")}
        for head, homes in module.head_homes().items()
        for home in homes
    }
    source = module.hparams["backbone"]
    content, tensors = to_peft(module.backbone, module.adapter, inside, heads, module.peft_task, source)
    write_peft_files(folder, content, tensors, dtype)
    return f'peft.PeftModel.from_pretrained({base}, "{{}}")'


def _timm_base(module: ImageClassifier, compare: bool) -> str:
    """The call that builds the model without adapters, once it is seen that the head fits in."""
    from timm.models import get_model_args

    assert module.class_names is not None  # a checkpoint has them
    if compare:
        module.backbone.float()
    timm_model(module, module.class_names, compare)
    arguments: dict[str, Any] = {
        "pretrained": module.hparams["weights"] == "pretrained",
        "num_classes": len(module.class_names),
        **{k: v for k, v in get_model_args(module.backbone).items() if k != "num_classes"},
    }
    return _call("timm.create_model", module, arguments)


def _transformers_base(module: AdaptedModule) -> str:
    classes = getattr(module, "class_names", None)
    labels = {} if classes is None else {"num_labels": len(classes) or 1}
    return _call(f"transformers.{type(module.backbone).__name__}.from_pretrained", module, labels)


def _call(function: str, module: AdaptedModule, arguments: Mapping[str, Any]) -> str:
    words = [repr(module.hparams["backbone"]), *(f"{key}={value!r}" for key, value in arguments.items())]
    return f"{function}({', '.join(words)})".replace("{", "{{").replace("}", "}}")
