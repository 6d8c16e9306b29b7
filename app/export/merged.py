"""Format `merged`: the model in the layout of timm or transformers, with the adapters merged into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from app.export.loader_code import Loader, is_timm, merged_timm_loader, merged_transformers_loader
from app.export.timm_head import timm_model
from app.export.tokenizer import complete_tokenizer
from datamodules.contract import TextModel
from datamodules.errors import UsageError
from modules.adapters import detach
from modules.base import AdaptedModule
from modules.training.peft_baselines import METHODS

if TYPE_CHECKING:  # a run on text imports no timm
    from modules.image_classification import ImageClassifier


def write_merged(module: AdaptedModule, dtype: torch.dtype, folder: Path) -> Loader:
    """Merge the adapters and write the model in the layout of timm or transformers.

    Args:
        module: A module from `load_module`. Its adapters are removed.
        dtype: Dtype of the written weights.
        folder: An empty directory.

    Returns:
        A function that returns the code for loading the directory.

    Raises:
        UsageError: If the backbone is of neither library, does not fit the head, or has layers of PEFT.
    """
    backbone: Any = module.backbone
    if module.tuning in METHODS:
        raise UsageError(
            f"--format: merged is not supported for tuning: {module.tuning}, a baseline for comparisons. Export a run "
            "with tuning: adapter, head or full."
        )
    if isinstance(module, TextModel):
        if dtype == torch.float32:
            backbone.float()  # before the merge, which would round otherwise
        detach(backbone, merge_first=True)
        return _write_transformers(module, backbone.to(dtype), folder)
    if is_timm(module):
        backbone.float()
        detach(backbone, merge_first=True)
        return _write_timm(cast("ImageClassifier", module), dtype, folder)
    raise UsageError(
        f"--format: merged is for models of timm and transformers, and this backbone is a {type(backbone).__name__}. "
        "Use --format compact."
    )


def _write_transformers(module: AdaptedModule, backbone: Any, folder: Path) -> Loader:
    tokenizer: Any = module.tokenizer
    complete_tokenizer(module, tokenizer)
    config = backbone.config
    config.task_specific_params = None  # pipelines would use these values for generation
    classes = module.class_names
    if classes is not None:  # by this key, pipelines choose between softmax, sigmoid and raw score
        config.problem_type = "single_label_classification" if classes else "regression"
    if backbone.can_generate() and backbone.generation_config.num_beams == 1:  # save_pretrained refuses keys for beams
        backbone.generation_config.update(early_stopping=None, length_penalty=None)
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return merged_transformers_loader(module)


def _write_timm(module: ImageClassifier, dtype: torch.dtype, folder: Path) -> Loader:
    from timm.models import save_for_hf

    save_for_hf(
        timm_model(module).to(dtype),
        str(folder),
        model_config={"label_names": module.class_names},
        safe_serialization=True,
        data_config=module.preprocessing,
    )
    return merged_timm_loader(module)
