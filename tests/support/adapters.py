"""Random adapters, copies of states and changed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from modules.adapters import adapter_state

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def randomize(model: Model, std: float = 0.2, seed: int = 1) -> Model:
    """Fill all factors and trained heads with noise, and return the model.

    One factor starts at zero, which would hide errors.

    Args:
        model: A model with adapters, or a task.
        std: Standard deviation of the noise.
        seed: Seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = tuple(f"{head}." for head in getattr(model, "head_names", ()))
    of_heads = [p for name, p in model.named_parameters() if name.startswith(heads)] if heads else []
    for tensor in [*adapter_state(model).values(), *of_heads]:
        tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
    return model


def copied(state: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors of a state, or of a model's state dict."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor] | nn.Module) -> set[str]:
    """Return the names of the tensors that are not bit-identical."""
    after = after.state_dict() if isinstance(after, nn.Module) else after
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
