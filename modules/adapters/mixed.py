"""Mixed batches: one forward pass in which each row of the batch has its own B and its own head, over a shared A."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import AdapterError
from .linear import MixedFactors, check_rows
from .state import adapted_layers, refuse_merged


class RowWeights(NamedTuple):
    """Weights of a linear layer for each adapter, and the adapter of each row of a batch.

    Args:
        weight: Weight of each adapter, (adapters, d_out, d_in).
        bias: Bias of each adapter, (adapters, d_out), or None.
        adapter_index: Adapter of each row of the batch, (batch,).
    """

    weight: Tensor
    bias: Tensor | None
    adapter_index: Tensor


class NoAutocastLinear(nn.Linear):
    """A linear layer that ignores autocast and computes in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ + b, (..., d_out), for inputs (..., d_in)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class RowLinear(nn.Module):
    """A linear layer in which each row of the batch has its own weight.

    Args:
        weights: Weights of the adapters, and the adapter of each row.
        autocasts: If false, the layer ignores autocast, as `NoAutocastLinear` does.
    """

    def __init__(self, weights: RowWeights, *, autocasts: bool = True) -> None:
        super().__init__()
        self.weights, self.autocasts = weights, autocasts

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Wᵢᵀ + bᵢ for row i, (..., d_out), in the dtype of the weights.

        Args:
            x: (rows, ..., d_in). Each row of the batch may be repeated.
        """
        weight, bias, index = self.weights
        check_rows(x, len(index))
        weight = weight.index_select(0, index)  # (batch, d_out, d_in)
        tokens = x.to(weight.dtype).reshape(len(index), -1, weight.shape[2])
        biases = None if bias is None else bias.index_select(0, index).unsqueeze(1)
        with nullcontext() if self.autocasts else torch.autocast(x.device.type, enabled=False):
            out = tokens @ weight.mT if biases is None else torch.baddbmm(biases, tokens, weight.mT)
        return out.view(*x.shape[:-1], weight.shape[1])


@contextmanager
def mixed_batch(
    model: nn.Module,
    bs: Mapping[str, Tensor],
    index: Tensor,
    heads: Mapping[str, RowWeights] | None = None,
    task: nn.Module | None = None,
) -> Iterator[None]:
    """Give each row of the batch its own B, and its own head, within the context.

    A, the scale s and the enabled layers are those of the model's own adapter. If the input of a layer has k times as
    many rows as the batch, such as in beam search, k neighbours are one row of the batch.

    `bs` has an adapter once, even if several rows share the adapter. Each layer gathers B for the rows in its forward
    pass. The products are fastest if each tensor of `bs` is a transposed view of a contiguous Bᵀ.

    Args:
        model: A model with adapters.
        bs: B of each adapter by projection name, (adapters, d_out, rank), for all projections of the model.
        index: Adapter of each row of the batch, (batch,), on the device of the model.
        heads: Weights of the head's linear layers by name.
        task: The module in which the names of `heads` are looked up; None is `model`.

    Raises:
        AdapterError: If adapters are merged, or the model is within another mixed batch.
    """
    refuse_merged(model)
    layers = adapted_layers(model)
    if any(layer.mixed is not None for layer in layers.values()):
        raise AdapterError("The model is within a mixed batch already. Leave the first context before the second.")
    task = model if task is None else task
    replaced = {name: task.get_submodule(name) for name in heads or {}}
    try:
        for layer in layers.values():
            parts = [(f.scale / layer.scale, bs[f.projection.name].mT) for f in layer.factors()]
            bts = [(bt if ratio == 1 else ratio * bt).to(layer.frozen.dtype) for ratio, bt in parts]
            layer.mixed = MixedFactors(bts, index)
        for name, weights in (heads or {}).items():
            task.set_submodule(name, RowLinear(weights, autocasts=not isinstance(replaced[name], NoAutocastLinear)))
        yield
    finally:
        for layer in layers.values():
            layer.mixed = None
        for name, module in replaced.items():
            task.set_submodule(name, module)
