"""Intruder dimensions and kept shares, compared with closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modules.adapters.spectrum import summarize
from modules.analysis.spectra import intruder_cosines, intruder_counts, kept_shares, left_singular_vectors


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def weight(d_out: int = 40, d_in: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return W with singular values 1, 1/2, 1/3, …, and its left and right singular vectors as columns."""
    size = min(d_out, d_in)
    u, v = orthonormal(d_out, size, seed), orthonormal(d_in, size, seed + 1)
    return u @ torch.diag(1 / torch.arange(1, size + 1, dtype=torch.float64)) @ v.T, u, v


def outside(u: Tensor, seed: int = 9) -> Tensor:
    """Return a unit vector that is orthogonal to all columns of `u`."""
    vector = orthonormal(u.shape[0], 1, seed)[:, 0]
    vector = vector - u @ (u.T @ vector)
    return vector / vector.norm()


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_w_itself_has_no_intruders(shape: tuple[int, int]) -> None:
    w, _, _ = weight(*shape)
    cosines = intruder_cosines(left_singular_vectors(w), w, torch.zeros_like(w))
    assert cosines.shape == (10,)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-9, rtol=0)
    assert intruder_counts(cosines, torch.tensor([0.5, 0.99])).tolist() == [0, 0]


def test_scaling_w_adds_no_intruder() -> None:
    w, _, _ = weight()
    assert float(intruder_cosines(left_singular_vectors(w), w, 3 * w).min()) > 1 - 1e-9


@pytest.mark.parametrize("strength, positions", [(5.0, [0]), (0.22, [4]), (0.05, [])])
def test_planted_directions_are_found_at_their_position(strength: float, positions: list[int]) -> None:
    """The planted value replaces W's last singular value, 1/30. Its position is first, fifth, or after the tenth."""
    w, u, v = weight()
    cosines = intruder_cosines(left_singular_vectors(w), w, strength * torch.outer(outside(u), v[:, -1]), top=10)
    assert (cosines < 0.5).nonzero().flatten().tolist() == positions
    for index in positions:  # its left singular vector is u₃₀/30 + strength·planted, normalised
        assert float(cosines[index]) == pytest.approx(1 / math.hypot(1, 30 * strength), abs=1e-9)
    assert int(intruder_counts(cosines, torch.tensor([0.5]))) == len(positions)


def test_the_cosine_of_a_mixture_is_that_of_its_nearest_direction() -> None:
    w, u, _ = weight()
    mixed = 0.8 * u[:, 3] + 0.6 * u[:, 5]
    cosines = intruder_cosines(left_singular_vectors(w), w, 1e6 * torch.outer(mixed, orthonormal(30, 1, 3)[:, 0]))
    assert float(cosines[0]) == pytest.approx(0.8, abs=1e-5)
    counts = intruder_counts(cosines[:1], torch.tensor([0.79, 0.81]))
    assert counts.tolist() == [0, 1]


def test_all_directions_are_intruders_of_a_zero_weight() -> None:
    zero = torch.zeros(6, 5)
    assert left_singular_vectors(zero).shape == (6, 0)
    cosines = intruder_cosines(left_singular_vectors(zero), zero, torch.eye(6, 5))
    assert cosines.tolist() == [0.0] * 5


def test_counts_rise_with_the_threshold() -> None:
    cosines = torch.tensor([0.9, 0.1, 0.5], dtype=torch.float64)
    assert intruder_counts(cosines, torch.tensor([0.0, 0.1, 0.2, 0.5, 0.6, 1.0], dtype=torch.float64)).tolist() == [
        0,
        0,
        1,
        1,
        2,
        3,
    ]


def test_kept_shares_of_known_spectra() -> None:
    shares = kept_shares(torch.tensor([2.0, 1.0, 1.0]))
    torch.testing.assert_close(shares, torch.tensor([4 / 6, 5 / 6, 1.0], dtype=torch.float64))
    equal = kept_shares(torch.full((4,), 0.3))
    torch.testing.assert_close(equal, torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert kept_shares(torch.zeros(3)).isnan().all()


def test_kept_share_equals_that_of_the_truncated_product() -> None:
    b, a = orthonormal(20, 4, 1) * torch.tensor([3.0, 1.0, 0.5, 0.1]), orthonormal(15, 4, 2).T
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    truncated = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
    share = float(kept_shares(s[:4])[1])
    assert share == pytest.approx(float(truncated.square().sum() / (b @ a).square().sum()), abs=1e-12)


def test_effective_and_stable_rank_of_a_geometric_spectrum() -> None:
    """For σᵢ = qⁱ, Σσ² = (1 − q²ʳ)/(1 − q²). The entropy has the closed form below."""
    q, r = 0.5, 6
    sigma = torch.tensor([q**i for i in range(r)])
    summary = summarize(sigma)
    total = (1 - q**r) / (1 - q)
    mean_index = sum(i * q**i for i in range(r)) / total
    assert summary.effective_rank == pytest.approx(total * math.exp(-mean_index * math.log(q)), rel=1e-6)
    assert summary.stable_rank == pytest.approx((1 - q ** (2 * r)) / (1 - q**2), rel=1e-6)
