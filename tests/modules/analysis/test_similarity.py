"""Similarity of subspaces against principal angles, invariances and simulated chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import beta
from torch import Tensor

from modules.analysis.similarity import (
    SubspacePair,
    chance_interval,
    jackknife_error,
    orthonormal_basis,
    random_similarities,
    subspace_similarity,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def similarity(x: Tensor, y: Tensor) -> float:
    return subspace_similarity(orthonormal_basis(x), orthonormal_basis(y))


def test_another_factorisation_of_the_same_update_has_similarity_one() -> None:
    b, a, c = gaussian(30, 4), gaussian(4, 20, seed=1), gaussian(4, 4, seed=2)
    assert similarity(b, b @ c) == pytest.approx(1, abs=1e-12)
    assert similarity(a.T, (torch.linalg.inv(c) @ a).T) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 5), (5, 2), (1, 1)])
def test_it_is_the_mean_squared_cosine_of_scipys_principal_angles(ranks: tuple[int, int]) -> None:
    x, y = gaussian(12, ranks[0]), gaussian(12, ranks[1], seed=1)
    angles = subspace_angles(x.numpy(), y.numpy())
    assert similarity(x, y) == pytest.approx(float(np.mean(np.cos(angles) ** 2)), abs=1e-12)


def test_a_subspace_of_the_other_and_orthogonal_ones() -> None:
    x = torch.eye(10)[:, :6]
    assert similarity(x, x[:, 2:4]) == 1
    assert similarity(x, torch.eye(10)[:, 6:9]) == 0


def test_a_zero_factor_has_no_similarity() -> None:
    assert math.isnan(similarity(torch.zeros(8, 2), gaussian(8, 2)))


def test_a_dependent_column_does_not_count() -> None:
    x = gaussian(10, 2)
    doubled = torch.cat([x, x[:, :1]], dim=1)
    assert orthonormal_basis(doubled).shape == (10, 2)
    assert similarity(doubled, x) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("pair", [SubspacePair(20, 3, 3), SubspacePair(20, 2, 7), SubspacePair(20, 7, 2)])
def test_chance_is_the_larger_rank_over_the_dimension(pair: SubspacePair) -> None:
    """The mean and the variance 2·p·q·(d−p)·(d−q) / (d²·(d−1)·(d+2)) of Tr[PQ] for random projections P and Q."""
    d, p, q = pair
    draws = 20000
    values = random_similarities(pair, draws, seed=3)
    variance = 2 * p * q * (d - p) * (d - q) / (d**2 * (d - 1) * (d + 2)) / min(p, q) ** 2
    assert pair.chance == max(p, q) / d
    assert float(values.mean()) == pytest.approx(pair.chance, abs=4 * math.sqrt(variance / draws))
    assert float(values.var()) == pytest.approx(variance, rel=0.06)
    direct = [similarity(gaussian(d, p, seed=i), gaussian(d, q, seed=10**6 + i)) for i in range(400)]
    assert float(np.mean(direct)) == pytest.approx(pair.chance, abs=4 * math.sqrt(variance / 400))


def test_the_interval_of_one_dimension_is_that_of_a_beta_distribution() -> None:
    """The squared cosine of a random vector and a fixed subspace of dimension q is Beta(q/2, (d−q)/2)."""
    low, high = chance_interval([SubspacePair(30, 1, 4)], draws=20000)
    exact = beta(2, 13).interval(0.95)
    assert (low, high) == pytest.approx(exact, abs=0.01)


def test_the_interval_of_a_mean_narrows_with_the_number_of_projections() -> None:
    one, many = ([SubspacePair(64, 4, 8)] * count for count in (1, 25))
    widths = [high - low for low, high in map(chance_interval, (one, many))]
    assert widths[0] / widths[1] == pytest.approx(5, rel=0.2)
    low, high = chance_interval(many)
    assert low < 8 / 64 < high


def test_the_jackknife_of_a_mean_over_pairs() -> None:
    """For values xᵢ + xⱼ the mean over pairs is 2·mean(x), whose standard error is 2·s/√n."""
    x = gaussian(6)
    first, second = torch.combinations(torch.arange(6)).T
    expected = 2 * float(x.std()) / math.sqrt(6)
    assert jackknife_error(x[first] + x[second], first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pairs", [[(0, 1)], [(0, 1), (0, 2)]])
def test_too_few_runs_have_no_standard_error(pairs: list[tuple[int, int]]) -> None:
    first, second = torch.tensor(pairs).T
    assert math.isnan(jackknife_error(torch.ones(len(pairs)), first, second))
