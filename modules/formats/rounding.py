"""Rounding error of an update once the merged weight is written in a dtype of fewer bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from modules.adapters.state import adapted_layers


class Rounding(NamedTuple):
    """Error of the updates of a model, each as a share of the norm of the update itself.

    Args:
        whole: Over all adapted layers together.
        worst: Of the layer where it is largest.
        layer: The name of that layer.
    """

    whole: float
    worst: float
    layer: str


@torch.no_grad()
def merge_rounding(model: nn.Module, dtype: torch.dtype) -> Rounding | None:
    """Measure ‖(cast(W + Δ) - cast(W)) - Δ‖ / ‖Δ‖ in the Frobenius norm, for Δ = s·B·A that is merged in float32.

    The error is 0 if the update survives whole, and 1 if it is rounded away from a W that has the dtype already. If W
    has more bits, the error can be above 1: the roundings of W and of W + Δ then differ by more than Δ.

    Args:
        model: A model with adapters that are not merged; it is not changed.
        dtype: Dtype that the merged weights are cast to.

    Returns:
        None for float32, in which nothing is rounded a second time, and for a model without updates.
    """
    if dtype == torch.float32:
        return None
    squares: dict[str, tuple[float, float]] = {}  # of the error and of the update
    for name, layer in adapted_layers(model).items():
        update = layer.delta()
        weight = layer.frozen.dense()
        error = (weight.float() + update).to(dtype).float() - weight.to(dtype).float() - update
        norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
        if norm > 0:
            squares[name] = float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2, norm**2
    if not squares:
        return None
    errors, updates = zip(*squares.values(), strict=True)
    shares = {name: (error / update) ** 0.5 for name, (error, update) in squares.items()}
    layer_name = max(shares, key=lambda name: shares[name])
    return Rounding((sum(errors) / sum(updates)) ** 0.5, shares[layer_name], layer_name)
