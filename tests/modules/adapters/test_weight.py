"""FrozenWeight, compared with W."""

from __future__ import annotations

import pytest
import torch

from modules.adapters.weight import FrozenWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradient_equal_those_of_w(dtype: torch.dtype) -> None:
    w, bias, x = torch.randn(6, 4).to(dtype), torch.randn(6).to(dtype), torch.randn(3, 4).to(dtype)
    weight = FrozenWeight(w)
    assert weight.dtype == dtype
    assert torch.equal(weight.dense(), w)
    torch.testing.assert_close(weight.matmul(x, bias), x @ w.T + bias, atol=0.05, rtol=0.05)
    grad = torch.randn(3, 6)
    assert torch.equal(weight.input_gradient(grad), grad @ w.float())  # in the dtype of the gradient, not that of W


def test_an_update_is_added_in_float32_and_rounded_once() -> None:
    w = torch.full((2, 3), 256.0, dtype=torch.bfloat16)  # the next larger bfloat16 is 258
    FrozenWeight(w).add_(torch.full((2, 3), 1.001))  # rounded first, 1.001 would be 1, and 257 would be rounded to 256
    assert torch.equal(w, torch.full((2, 3), 258.0, dtype=torch.bfloat16))


def test_a_weight_is_the_tuple_of_its_tensors() -> None:
    w = torch.randn(2, 3)
    assert FrozenWeight(*FrozenWeight(w)).dense() is w
