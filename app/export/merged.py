"""Format `merged`: the whole model in its own library's layout, with the adapters in the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jsonargparse import ArgumentError

from app.export.loader_code import Loader, is_timm, merged_timm_loader, merged_transformers_loader
from app.export.timm_head import timm_model
from app.export.tokenizer import complete_tokenizer
from datamodules.contract import TextModel
from modules.adapters import detach
from modules.base import AdaptedModule
from modules.training.peft_baselines import METHODS

if TYPE_CHECKING:  # a run on text imports no timm, one on images no transformers
    from modules.image_classification import ImageClassifier


def write_merged(module: AdaptedModule, dtype: torch.dtype, folder: Path) -> Loader:
    """Merge the adapters and write the model in its own library's layout.

    Args:
        module: A module as `load_module` gives it; it has no adapters afterwards.
        dtype: Dtype of the weights written.
        folder: An empty directory.

    Returns:
        The code that loads it.

    Raises:
        ArgumentError: If the backbone is of another library, takes no such head, or has layers of PEFT.
    """
    backbone: Any = module.backbone
    if module.tuning in METHODS:
        raise ArgumentError(
            None, f"--format: merged is not supported for tuning: {module.tuning}, which is there to compare with."
        )
    if isinstance(module, TextModel):
        if dtype == torch.float32:
            backbone.float()  # before the merge, or that would round
        detach(backbone, merge_first=True)
        return _write_transformers(module, backbone.to(dtype), folder)
    if is_timm(module):
        backbone.float()
        detach(backbone, merge_first=True)
        return _write_timm(cast("ImageClassifier", module), dtype, folder)
    raise ArgumentError(None, f"--format: a {type(backbone).__name__} has no form without this project.")


def _write_transformers(module: AdaptedModule, backbone: Any, folder: Path) -> Loader:
    tokenizer: Any = module.tokenizer
    complete_tokenizer(module, tokenizer)
    config = backbone.config
    config.task_specific_params = None  # pipelines would generate by these
    classes = module.class_names
    if classes is not None:  # pipelines choose between softmax, sigmoid and the score itself by it
        config.problem_type = "single_label_classification" if classes else "regression"
    if backbone.can_generate() and backbone.generation_config.num_beams == 1:  # keys for beams would be refused
        backbone.generation_config.update(early_stopping=None, length_penalty=None)
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return merged_transformers_loader(type(backbone).__name__)


def _write_timm(module: ImageClassifier, dtype: torch.dtype, folder: Path) -> Loader:
    from timm.models import save_for_hf

    assert module.class_names is not None  # a checkpoint has them
    save_for_hf(
        timm_model(module, module.class_names).to(dtype),
        str(folder),
        model_config={"label_names": module.class_names},
        safe_serialization=True,
        data_config=module.preprocessing,
    )
    return merged_timm_loader()
