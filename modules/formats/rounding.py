"""Rounding error of an update when the merged weight is cast to a smaller dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from modules.adapters.state import adapted_layers


class Rounding(NamedTuple):
    """Relative rounding error of a model's updates.

    Args:
        overall: Error over all adapted layers together.
        worst: Largest error of a layer.
        layer: Name of the layer with the largest error.
    """

    overall: float
    worst: float
    layer: str


@torch.no_grad()
def merge_rounding(model: nn.Module, dtype: torch.dtype) -> Rounding | None:
    """Measure ‖(cast(W + Δ) - cast(W)) - Δ‖ / ‖Δ‖ in the Frobenius norm, with Δ = s·B·A merged in float32.

    The error is 0 if the update is preserved. The error is 1 if W has the dtype already and the update is rounded away.
    If W has more bits, the error can exceed 1: W and W + Δ can round to values that differ by more than Δ.

    Args:
        model: A model whose adapters are not merged; the model is not changed.
        dtype: Dtype of the merged weights.

    Returns:
        The error; None for float32, which causes no further rounding, and for a model without updates.
    """
    if dtype == torch.float32:
        return None
    squares: dict[str, tuple[float, float]] = {}  # Squared norms of error and update by layer.
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
