"""Output layer of a regression, which trains in standard units and predicts in the units of the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from datamodules.errors import ModelError
from modules.adapters.mixed import NoAutocastLinear

FAR = 10.0  # An optimizer hardly moves a bias by more standard deviations of the labels than this.


class LabelUnitsLinear(NoAutocastLinear):
    """Linear layer with weights in the units of the labels, which trains like a layer on standardized labels.

    Let the labels y have the mean m and the standard deviation u. On the standardized labels (y − m) / u, the layer
    would have the weight w / u and the bias (b − m) / u. The task divides the loss by u². The optimizer steps between
    `standardize` and `restore`, so that every optimizer steps as on standardized labels. Some optimizers, such as
    Adafactor, depend on the size of the weights. Files contain plain weights in the units of the labels.

    The layer ignores autocast, since bfloat16 has only multiples of 4 near 700.

    Args:
        d_in: Size of the inputs.
        bias: If true, the layer has a bias.
    """

    def __init__(self, d_in: int, *, bias: bool) -> None:
        super().__init__(d_in, 1, bias=bias)
        self.mean, self.unit = 0.0, 1.0
        self.is_standardized = False
        self.is_random = True  # False after weights are loaded or scaled.
        self.register_load_state_dict_post_hook(_mark_loaded)  # type: ignore[no-untyped-call]

    def set_units(self, mean: float, deviation: float) -> None:
        """Set the units of the labels. Random weights become random weights of standardized labels.

        Without a bias, the unit is the root mean square of the labels, since no parameter can learn the mean.

        Args:
            mean: Mean of the training labels.
            deviation: Standard deviation of the training labels, above 0.
        """
        self.mean = mean
        self.unit = deviation if self.bias is not None else math.hypot(mean, deviation)
        if self.is_random:
            self._to_label_units()
            self.is_random = False

    def far_mean_warning(self, mean: float, deviation: float) -> str | None:
        """Return a warning if the bias is far from the mean of the training labels; None otherwise."""
        bias = None if self.bias is None else float(self.bias.detach())
        if abs((bias or 0.0) - mean) <= FAR * deviation:
            return None
        layer = "no bias" if bias is None else f"the bias {bias:.4g}"
        advice = (
            "For a loaded head, use labels in the units that the head was trained on. For a new head, set "
            "model.label_scaling to null."
        )
        return (
            f"data.label_column: the training labels have the mean {mean:.4g} and the standard deviation "
            f"{deviation:.4g}, and the output layer has {layer}. Such labels are hardly learned. "
            + ("Subtract the mean from the column." if bias is None else advice)
        )

    @torch.no_grad()
    def standardize(self) -> None:
        """Convert weights and gradients to standardized labels, for a step of the optimizer."""
        if self.bias is not None:
            self.bias.sub_(self.mean)
        for parameter in self.parameters():
            parameter.div_(self.unit)
            if parameter.grad is not None:
                parameter.grad.mul_(self.unit)
        self.is_standardized = True

    def restore(self) -> None:
        """Convert the weights back to the units of the labels, if they are standardized."""
        if self.is_standardized:
            self._to_label_units()
            self.is_standardized = False

    @torch.no_grad()
    def _to_label_units(self) -> None:
        for parameter in self.parameters():
            parameter.mul_(self.unit)
        if self.bias is not None:
            self.bias.add_(self.mean)


def check_label_scaling(scaling: Sequence[float] | None) -> None:
    """Check mean and standard deviation of labels.

    Raises:
        ModelError: If they are not two finite numbers, or if the standard deviation is not above 0.
    """
    if scaling is not None and not (len(scaling) == 2 and all(map(math.isfinite, scaling)) and scaling[1] > 0):
        raise ModelError(
            f"model.label_scaling: {list(scaling)} must be two finite numbers: the mean of the labels, and "
            "the standard deviation, above 0. Use null to take both from the data."
        )


def _mark_loaded(layer: Any, _: Any) -> None:
    """Mark the weights as loaded, as a hook of `load_state_dict`."""
    layer.is_random = False
