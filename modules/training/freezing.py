"""Freeze a backbone and cast its frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def freeze(backbone: nn.Module, heads: Sequence[str], dtype: torch.dtype) -> None:
    """Freeze a backbone and cast its frozen weights, in place. Heads stay trainable and float32.

    Args:
        backbone: The backbone.
        heads: Names of the backbone's modules that are fully trained.
        dtype: Dtype of the frozen weights.
    """
    head_modules = {name: backbone.get_submodule(name) for name in heads}
    for name in head_modules:
        backbone.set_submodule(name, nn.Identity())
    backbone.requires_grad_(False)
    # Rotary frequencies keep their dtype: frequencies rounded to bfloat16 would encode other positions.
    names = [name for name, _ in backbone.named_buffers(remove_duplicate=False) if name.endswith("inv_freq")]
    rotary_buffers = {name: backbone.get_buffer(name) for name in names}
    backbone.to(dtype)
    for name, buffer in rotary_buffers.items():
        module, _, attribute = name.rpartition(".")
        setattr(backbone.get_submodule(module), attribute, buffer)
    for name, head in head_modules.items():
        backbone.set_submodule(name, head.float())
        head.register_forward_pre_hook(inputs_to_float32)


def inputs_to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a float32 head whose backbone may be in bfloat16. For use as a forward pre-hook."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
