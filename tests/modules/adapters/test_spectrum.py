"""Spectra of factors and products, compared with the dense SVD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.adapters.spectrum import SpectrumSummary, product_singular_values, singular_values, summarize

SIZES = [(20, 30, 4), (30, 20, 4), (20, 20, 1), (6, 30, 6), (30, 6, 6), (6, 6, 6)]


def factors(d_out: int, d_in: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.randn(d_out, rank), torch.randn(rank, d_in)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_product_equals_the_dense_svd(d_out: int, d_in: int, rank: int, scale: float) -> None:
    b, a = factors(d_out, d_in, rank)
    sigma = product_singular_values(b, a, scale)
    assert sigma.shape == (rank,)
    assert sigma.dtype == torch.float32
    dense = torch.linalg.svdvals(scale * b.double() @ a.double())
    torch.testing.assert_close(sigma.double(), dense[:rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), SIZES)
def test_factor_equals_the_dense_svd(d_out: int, d_in: int, rank: int) -> None:
    for factor in factors(d_out, d_in, rank):
        sigma = singular_values(factor)
        assert sigma.shape == (rank,)
        torch.testing.assert_close(sigma.double(), torch.linalg.svdvals(factor.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    b, a = (factor.to(dtype) for factor in factors(20, 30, 4))
    expected = torch.linalg.svdvals(b.double() @ a.double())[:4]
    assert product_singular_values(b, a).dtype == singular_values(a).dtype == torch.float32
    torch.testing.assert_close(product_singular_values(b, a).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(singular_values(b).double(), torch.linalg.svdvals(b.double()), rtol=1e-5, atol=1e-5)


def test_rank_deficient_product_ends_in_zeros() -> None:
    b, a = factors(20, 30, 4)
    b[:, 3] = b[:, 0]  # rank 3
    a[2] = 0  # of these, A keeps rank 2
    sigma = product_singular_values(b, a)
    assert (sigma[:2] > 0.1).all()
    assert (sigma[2:] < 1e-4).all()


def test_zero_factor_gives_zeros() -> None:
    b, a = factors(20, 30, 4)
    assert torch.equal(product_singular_values(torch.zeros_like(b), a), torch.zeros(4))
    assert torch.equal(singular_values(torch.zeros_like(b)), torch.zeros(4))


def test_parameters_give_values_without_a_graph() -> None:
    b, a = (factor.requires_grad_() for factor in factors(20, 30, 4))
    assert not product_singular_values(b, a).requires_grad
    assert not singular_values(b).requires_grad


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("level", [1e-6, 1.0, 3e4])
def test_equal_values_have_full_rank(rank: int, level: float) -> None:
    summary = summarize(torch.full((rank,), level))
    assert summary.effective_rank == pytest.approx(rank, rel=1e-6)
    assert summary.stable_rank == pytest.approx(rank, rel=1e-6)
    assert summary.frobenius == pytest.approx(level * math.sqrt(rank), rel=1e-6)
    assert summary.largest == summary.smallest == pytest.approx(level, rel=1e-6)


def test_summary_equals_its_definitions() -> None:
    sigma = np.array([4.0, 2.0, 1.0, 0.0])
    p = sigma[:3] / 7
    summary = summarize(torch.tensor(sigma, dtype=torch.float32))
    assert summary.largest == 4
    assert summary.smallest == 0
    assert summary.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert summary.stable_rank == pytest.approx(21 / 16, rel=1e-12)
    assert summary.frobenius == pytest.approx(math.sqrt(21), rel=1e-12)


def test_zero_matrix_is_all_zeros() -> None:
    assert summarize(torch.zeros(4)) == SpectrumSummary(0.0, 0.0, 0.0, 0.0, 0.0)
