"""Output layer of a regression, which trains in standard units and predicts in the units of the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import ModelError


class LabelUnitsLinear(nn.Linear):
    """Linear layer with weights in the units of the labels, which trains like a layer on standardized labels.

    Let the labels y have the mean m and the standard deviation u. On the standardized labels (y − m) / u, the layer
    would have the weight w / u and the bias (b − m) / u. `forward` multiplies the gradients of w and b by u. The
    optimizer multiplies the learning rate of w and b by u and divides the weight decay by u, and the task divides the
    loss by u². The steps of w / u and (b − m) / u are then the steps on standardized labels, for each optimizer whose
    step of an element depends only on this element and its gradients, such as AdamW and SGD. Files contain plain
    weights in the units of the labels.

    Predictions are float32 also under autocast, since bfloat16 would round 683 to 684.

    Args:
        d_in: Size of the inputs.
        bias: If true, the layer has a bias.
    """

    def __init__(self, d_in: int, *, bias: bool) -> None:
        super().__init__(d_in, 1, bias=bias)
        self.unit = 1.0
        self.is_random = True  # False after weights are loaded or scaled.
        self.register_load_state_dict_post_hook(_mark_loaded)  # type: ignore[no-untyped-call]

    def set_units(self, mean: float, deviation: float) -> None:
        """Set the units of the labels. Random weights become random weights of standardized labels.

        Without a bias, the unit is the root mean square of the labels, since no parameter can learn the mean.

        Args:
            mean: Mean of the training labels.
            deviation: Standard deviation of the training labels, 0 or more. A unit of 0 is replaced by 1.
        """
        self.unit = (deviation if self.bias is not None else math.hypot(mean, deviation)) or 1.0
        if self.is_random:
            with torch.no_grad():
                self.weight.mul_(self.unit)
                if self.bias is not None:
                    self.bias.mul_(self.unit).add_(mean)
            self.is_random = False

    def forward(self, x: Tensor) -> Tensor:
        """Return predictions (batch, 1) float32 for hidden states (batch, d_in)."""
        weight = self.weight.detach() + self.unit * (self.weight - self.weight.detach())
        bias = None if self.bias is None else self.bias.detach() + self.unit * (self.bias - self.bias.detach())
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight, bias)


def parameter_units(module: nn.Module) -> dict[str, float]:
    """Return the units of a model's parameters by name, without units of 1."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LabelUnitsLinear)]
    units = {f"{name}.{key}": layer.unit for name, layer in layers for key, _ in layer.named_parameters()}
    return {name: unit for name, unit in units.items() if unit != 1}


def check_label_scaling(scaling: Sequence[float] | None) -> None:
    """Check mean and standard deviation of labels.

    Raises:
        ModelError: If they are not two finite numbers, or if the standard deviation is negative.
    """
    if scaling is not None and not (len(scaling) == 2 and all(map(math.isfinite, scaling)) and scaling[1] >= 0):
        raise ModelError(
            f"model.label_scaling: {list(scaling)} must be the mean and the standard deviation of the labels, finite, "
            "with a deviation of 0 or more. Use null to take both from the data."
        )


def _mark_loaded(layer: Any, _: Any) -> None:
    """Mark the weights as loaded, as a hook of `load_state_dict`."""
    layer.is_random = False
