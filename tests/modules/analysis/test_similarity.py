"""Similarity of subspaces: principal angles, invariance, chance level and permutations."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import chisquare
from torch import Tensor

from modules.analysis.similarity import (
    chance_level,
    cross_similarities,
    jackknife_error,
    orthonormal_basis,
    permuted_means,
    random_orders,
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
def test_similarity_is_the_mean_squared_cosine_of_scipys_principal_angles(ranks: tuple[int, int]) -> None:
    x, y = gaussian(12, ranks[0]), gaussian(12, ranks[1], seed=1)
    angles = subspace_angles(x.numpy(), y.numpy())
    assert similarity(x, y) == pytest.approx(float(np.mean(np.cos(angles) ** 2)), abs=1e-12)


def test_similarity_of_contained_and_of_orthogonal_subspaces() -> None:
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


@pytest.mark.parametrize("sizes", [(20, 3, 3), (20, 2, 7), (20, 7, 2)])
def test_random_subspaces_have_the_similarity_of_chance(sizes: tuple[int, int, int]) -> None:
    """The variance of Tr[PQ] for random projections P and Q is 2·p·q·(d−p)·(d−q) / (d²·(d−1)·(d+2))."""
    d, p, q = sizes
    variance = 2 * p * q * (d - p) * (d - q) / (d**2 * (d - 1) * (d + 2)) / min(p, q) ** 2
    similarities = [similarity(gaussian(d, p, seed=i), gaussian(d, q, seed=10**6 + i)) for i in range(400)]
    assert chance_level(*sizes) == max(p, q) / d
    assert float(np.mean(similarities)) == pytest.approx(chance_level(*sizes), abs=4 * math.sqrt(variance / 400))
    assert float(np.var(similarities)) == pytest.approx(variance, rel=0.3)


def test_cross_similarities_equal_those_of_each_pair() -> None:
    x, y = (
        [orthonormal_basis(gaussian(12, r, seed=10 * r + s)) for r in ranks] for s, ranks in enumerate([(3, 1), (2, 5)])
    )
    empty = torch.zeros(12, 0, dtype=torch.float64)
    actual = cross_similarities([*x, empty], y)
    expected = [[float(np.mean(np.cos(subspace_angles(u.numpy(), v.numpy())) ** 2)) for v in y] for u in x]
    torch.testing.assert_close(actual[:2], torch.tensor(expected, dtype=torch.float64))
    assert actual[2].isnan().all()


# --------------------------------------------------------------------------------------------------------- permutations


def test_random_orders_permute_projections_of_one_kind_uniformly() -> None:
    orders = random_orders(["q", "v", "q", "v", "q"], draws=6000, seed=0)
    assert (orders.sort(1).values == torch.arange(5)).all()
    assert (orders[:, [0, 2, 4]] % 2 == 0).all()
    counts = orders.unique(dim=0, return_counts=True)[1]
    assert len(counts) == math.factorial(3) * math.factorial(2)
    assert chisquare(counts.numpy()).pvalue > 1e-3
    assert not torch.equal(orders, random_orders(["q", "v", "q", "v", "q"], draws=6000, seed=1))


def test_permuted_means_equal_those_of_all_pairings() -> None:
    """Three blocks have 3! pairings. Enough random orders of both runs include them all."""
    similarities = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [np.mean([similarities[i, j] for i, j in enumerate(order)]) for order in permutations(range(3))]
    orders = [random_orders(["q"] * 3, draws=500, seed=seed) for seed in (0, 1)]
    means = permuted_means(similarities, *orders)
    np.testing.assert_allclose(np.unique(means.numpy().round(12)), np.unique(np.round(expected, 12)))


def group_of_runs(seed: int, shared: Tensor, blocks: int = 8) -> tuple[float, Tensor]:
    """Return mean similarity and permuted means of three runs whose bases include `shared` (blocks or 1, 24, k)."""
    bases = gaussian(3, blocks, 24, 3, seed=seed)
    runs = [
        [orthonormal_basis(torch.cat([s, b], 1)) for s, b in zip(shared.expand(blocks, -1, -1), run, strict=True)]
        for run in bases
    ]
    orders = [random_orders(["q"] * blocks, draws=400, seed=seed) for seed in range(3)]
    tables = {pair: cross_similarities(*(runs[i] for i in pair)) for pair in combinations(range(3), 2)}
    means = [permuted_means(table, orders[i], orders[j]) for (i, j), table in tables.items()]
    return float(np.mean([table.diagonal().mean() for table in tables.values()])), torch.stack(means).mean(0)


def interval(means: Tensor) -> tuple[float, float]:
    return float(means.quantile(0.025)), float(means.quantile(0.975))


def test_the_permutation_interval_covers_unrelated_runs_as_often_as_it_claims() -> None:
    nothing_shared = torch.zeros(1, 24, 0, dtype=torch.float64)
    values_and_means = [group_of_runs(seed, nothing_shared) for seed in range(100)]
    outside = sum(not low <= value <= high for value, (low, high) in ((v, interval(m)) for v, m in values_and_means))
    assert outside <= 11  # 5 of 100 are expected; more than 11 have probability 0.4 %
    assert float(torch.stack([means.mean() for _, means in values_and_means]).mean()) == pytest.approx(
        3 / 24, abs=0.005
    )


def test_related_blocks_lie_above_the_permutation_interval() -> None:
    value, means = group_of_runs(0, gaussian(8, 24, 1, seed=1))
    assert value > float(means.max())


def test_directions_that_all_blocks_share_raise_the_interval_above_the_chance_level() -> None:
    value, means = group_of_runs(0, gaussian(1, 24, 1, seed=1))
    low, high = interval(means)
    assert low > chance_level(24, 4, 4)
    assert low <= value <= high


# ------------------------------------------------------------------------------------------------------------ jackknife


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
