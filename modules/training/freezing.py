"""Freeze a backbone and cast its frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def freeze(backbone: nn.Module, heads: Sequence[str], dtype: torch.dtype) -> None:
    """Freeze a backbone and cast it, in place, all but its heads, which stay float32.

    Args:
        backbone: The backbone.
        heads: Names of the backbone's modules that are trained whole.
        dtype: Dtype of the frozen weights.
    """
    kept = {name: backbone.get_submodule(name) for name in heads}
    for name in kept:
        backbone.set_submodule(name, nn.Identity())
    backbone.requires_grad_(False)
    # in bfloat16 the rotary frequencies of transformers would be other positions
    names = [name for name, _ in backbone.named_buffers(remove_duplicate=False) if name.endswith("inv_freq")]
    kept_buffers = {name: backbone.get_buffer(name) for name in names}
    backbone.to(dtype)
    for name, buffer in kept_buffers.items():
        module, _, own = name.rpartition(".")
        setattr(backbone.get_submodule(module), own, buffer)
    for name, head in kept.items():  # float32, whatever the backbone hands it
        backbone.set_submodule(name, head.float())
        head.register_forward_pre_hook(inputs_to_float32)


def inputs_to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a head in float32, as a forward pre-hook: the backbone may be in bfloat16."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
