"""The frozen weight W of an adapted layer, with every operation that the adapter applies to W."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FrozenWeight(NamedTuple):
    """A dense W (d_out, d_in). Another storage format of W needs a class with the same methods.

    The class is a tuple of tensors, so that an autograd function can save `*weight` and rebuild the weight.
    """

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of products with W."""
        return self.tensor.dtype

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x·Wᵀ + b, (…, d_out), for x (…, d_in)."""
        return F.linear(x, self.tensor, bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return g·W, (n, d_in), the gradient to x for the gradient g (n, d_out), in the dtype of g."""
        return grad @ self.tensor.to(grad.dtype)

    def dense(self) -> Tensor:
        """Return W as an ordinary tensor. The caller must not write to the tensor."""
        return self.tensor

    @torch.no_grad()
    def add_(self, update: Tensor) -> None:
        """Add an update (d_out, d_in) to W in place, in at least float32, and round the sum to W's dtype once."""
        self.tensor.copy_(self.tensor.to(torch.promote_types(self.dtype, torch.float32)) + update)
