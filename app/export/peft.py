"""Format `peft`: adapters and heads of a module as PEFT's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from app.export.loader_code import Loader, absolute_name, is_timm, peft_loader, short_name
from app.export.low_rank import chain_updates, factor_state, given_config
from app.export.timm_head import timm_model
from app.export.tokenizer import complete_tokenizer
from datamodules.contract import TextModel
from datamodules.errors import UsageError
from modules.base import AdaptedModule
from modules.formats.peft import CONFIG, write_peft_files
from modules.formats.peft_writing import to_peft

if TYPE_CHECKING:  # a run on text imports no timm
    from modules.image_classification import ImageClassifier

LABELS = "labels.json"  # names of the classes, in the order of the logits


def write_peft(
    module: AdaptedModule,
    dtype: torch.dtype,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    links: Sequence[Mapping[str, Tensor]] = (),
) -> Loader:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT loads by itself.

    Args:
        module: The module.
        dtype: Dtype of the written factors and heads.
        folder: An empty directory.
        state: Factors and heads to write, with the names of `saved_state`. None writes the module's own. For timm, None
            also checks that timm's model with this head computes the same logits.
        links: The merged links of a chain that `state` goes on with.

    Returns:
        A function that returns the code for loading the directory.

    Raises:
        UsageError: If the module has no adapters, or timm's model does not fit the head.
        AdapterError: If PEFT would mistake another module for a head.
    """
    if module.tuning != "adapter":
        raise UsageError(
            f"--format: peft is for adapters, and this run has tuning: {module.tuning}. Export a run with tuning: "
            "adapter."
        )
    if is_timm(module):
        if state is None:  # the comparison needs float32
            module.backbone.float()
        timm_model(cast("ImageClassifier", module), compare=state is None)
    content, tensors = peft_content(module, module.saved_state() if state is None else state, links)
    write_peft_files(folder, content, tensors, dtype)
    return peft_loader(module)


def export_peft(module: AdaptedModule, dtype: torch.dtype, folder: Path) -> Loader:
    """Write a PEFT directory for other machines: PEFT's files, the tokenizer, and the class names in labels.json.

    adapter_config.json names the backbone without local folders. The name is null for weights from a file and for
    random weights, since PEFT would load other weights by the name.

    Args:
        module: The module.
        dtype: Dtype of the written factors and heads.
        folder: An empty directory.

    Returns:
        A function that returns the code for loading the directory.

    Raises:
        UsageError: If the module has no adapters, or timm's model does not fit the head.
        AdapterError: If PEFT would mistake another module for a head.
    """
    loader = write_peft(module, dtype, folder)
    complete_peft(module, folder)
    if module.class_names:
        write_labels(folder, module.class_names)
    return loader


def complete_peft(module: AdaptedModule, folder: Path) -> None:
    """Prepare a PEFT directory for other machines: remove local folders from the backbone's name, add the tokenizer."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = shared_base_name(module)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if isinstance(module, TextModel):
        tokenizer: Any = module.tokenizer
        complete_tokenizer(module, tokenizer)
        tokenizer.save_pretrained(folder)


def write_labels(folder: Path, class_names: list[str]) -> None:
    """Write the class names to labels.json."""
    (folder / LABELS).write_text(json.dumps(class_names, ensure_ascii=False) + "\n", encoding="utf-8")


def shared_base_name(module: AdaptedModule) -> str | None:
    """Return the backbone's name without local folders; None for weights from a file and for random weights."""
    own_weights = module.hparams["weights"] == "pretrained"
    return short_name(absolute_name(module.hparams["backbone"])) if own_weights else None


def peft_content(
    module: AdaptedModule, state: Mapping[str, Tensor], links: Sequence[Mapping[str, Tensor]] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of adapter_config.json, and the tensors of adapter_model.safetensors.

    A chain becomes one adapter, with the factors of all links stacked.

    Args:
        module: The module.
        state: Factors and heads of the module, with the names of `saved_state`.
        links: The merged links of a chain, by the names of `adapter_state`.

    Raises:
        AdapterError: If PEFT would mistake another module for a head.
    """
    inside = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    heads = {
        peft_name: {name.removeprefix(f"{head}."): t for name, t in state.items() if name.startswith(f"{head}.")}
        for head, peft_names in module.peft_head_names().items()
        for peft_name in peft_names
    }
    source, config = module.hparams["backbone"], module.adapter
    if links:
        updates = chain_updates(module.backbone, inside, links)
        config, inside = given_config(config, updates), factor_state(module.projections, updates)
    return to_peft(module.backbone, config, inside, heads, module.peft_task, source)
