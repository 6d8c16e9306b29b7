"""Format `peft`: adapters and heads of a module as PEFT's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jsonargparse import ArgumentError
from torch import Tensor

from app.export.loader_code import Loader, absolute_name, is_timm, peft_loader, short_name
from app.export.timm_head import timm_model
from app.export.tokenizer import complete_tokenizer
from datamodules.contract import TextModel
from modules.base import AdaptedModule
from modules.formats.peft import CONFIG, write_peft_files
from modules.formats.peft_writing import to_peft

if TYPE_CHECKING:  # a run on text imports no timm
    from modules.image_classification import ImageClassifier

LABELS = "labels.json"  # names of the classes, in the order of the logits


def write_peft(
    module: AdaptedModule, dtype: torch.dtype, folder: Path, state: Mapping[str, Tensor] | None = None
) -> Loader:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT loads by itself.

    Args:
        module: The module.
        dtype: Dtype of the factors and heads written.
        folder: An empty directory.
        state: Factors and heads to write, as `saved_state` names them. None writes those of the module, and compares
            the logits where the head has to move into the backbone.

    Returns:
        The code that loads the directory.

    Raises:
        ArgumentError: If the module has no adapters, or the backbone takes no such head.
        AdapterError: If PEFT would take other modules for the heads.
    """
    if module.tuning != "adapter":
        raise ArgumentError(None, f"--format: peft is for adapters, and this run has tuning: {module.tuning}.")
    if is_timm(module):
        _check_timm_head(cast("ImageClassifier", module), compare=state is None)
    content, tensors = peft_content(module, module.saved_state() if state is None else state)
    write_peft_files(folder, content, tensors, dtype)
    return peft_loader(module)


def export_peft(module: AdaptedModule, dtype: torch.dtype, folder: Path) -> Loader:
    """Write the adapters for others: PEFT's files, the tokenizer, and the names of the classes in labels.json.

    The configuration names the backbone, without the folders of this machine. A backbone with weights from elsewhere,
    or with random weights, has no name that PEFT could load.

    Args:
        module: The module.
        dtype: Dtype of the factors and heads written.
        folder: An empty directory.

    Returns:
        The code that loads the directory.

    Raises:
        ArgumentError: If the module has no adapters, or the backbone takes no such head.
        AdapterError: If PEFT would take other modules for the heads.
    """
    loader = write_peft(module, dtype, folder)
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    own_weights = module.hparams["weights"] == "pretrained"
    content["base_model_name_or_path"] = short_name(absolute_name(module.hparams["backbone"])) if own_weights else None
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if isinstance(module, TextModel):
        tokenizer: Any = module.tokenizer
        complete_tokenizer(module, tokenizer)
        tokenizer.save_pretrained(folder)
    if module.class_names:
        (folder / LABELS).write_text(json.dumps(module.class_names, ensure_ascii=False) + "\n", encoding="utf-8")
    return loader


def peft_content(module: AdaptedModule, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of adapter_config.json, and the tensors of adapter_model.safetensors.

    Args:
        module: The module.
        state: Its factors and heads, as `saved_state` names them.

    Raises:
        AdapterError: If PEFT would take other modules for the heads.
    """
    inside = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    heads = {
        home: {name.removeprefix(f"{head}."): t for name, t in state.items() if name.startswith(f"{head}.")}
        for head, homes in module.peft_head_names().items()
        for home in homes
    }
    source = module.hparams["backbone"]
    return to_peft(module.backbone, module.adapter, inside, heads, module.peft_task, source)


def _check_timm_head(module: ImageClassifier, compare: bool) -> None:
    """Check that timm's own model takes the head."""
    assert module.class_names is not None  # a checkpoint has them
    if compare:
        module.backbone.float()
    timm_model(module, module.class_names, compare)
