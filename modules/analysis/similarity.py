"""Similarity of the subspaces that two runs have learnt, and the similarity that chance gives.

The row space of A and the column space of B are unchanged by B·A = (B·C)·(C⁻¹·A), and so is their similarity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 24  # entries of the Gaussian matrices that are drawn at a time


class SubspacePair(NamedTuple):
    """Sizes of two subspaces of one space.

    Args:
        dimension: Of the space, d.
        first: Of one subspace, at least 1.
        second: Of the other subspace, at least 1.
    """

    dimension: int
    first: int
    second: int

    @property
    def chance(self) -> float:
        """Expected similarity of random subspaces, uniform over all of their size and independent of one another.

        E[U_X·U_Xᵀ] is (r_x/d)·I, as no direction is preferred. So E‖U_Yᵀ·U_X‖²_F = Tr[U_Yᵀ·(r_x/d)·U_Y] = r_x·r_y/d,
        and dividing by min(r_x, r_y) leaves max(r_x, r_y)/d.
        """
        return max(self.first, self.second) / self.dimension


@torch.no_grad()
def orthonormal_basis(tall: Tensor) -> Tensor:
    """Return an orthonormal basis of a factor's column space.

    Args:
        tall: B (d_out, r), or Aᵀ (d_in, r) for the row space of A; any floating dtype.

    Returns:
        (d, rank) float64. Rank is the numerical rank of float32 values, which factors are trained in; a zero factor has
        rank 0.
    """
    u, s, _ = torch.linalg.svd(tall.double(), full_matrices=False)
    return u[:, s > s[0] * max(tall.shape) * torch.finfo(torch.float32).eps]


@torch.no_grad()
def subspace_similarity(x: Tensor, y: Tensor) -> float:
    """Return ‖U_Yᵀ·U_X‖²_F / min(r_x, r_y), the mean squared cosine of the principal angles between two subspaces.

    This is the measure of Zhu et al. 2024 (arXiv 2402.16842), figure 1, there for equal ranks.

    Args:
        x: U_X, orthonormal columns, (d, r_x).
        y: U_Y, orthonormal columns, (d, r_y).

    Returns:
        A number in [0, 1]: 1 if one subspace lies within the other, 0 if they are orthogonal, NaN if either is empty.
    """
    smaller = min(x.shape[1], y.shape[1])
    if smaller == 0:
        return float("nan")
    return min(float((y.T @ x).square().sum()) / smaller, 1.0)


@lru_cache(maxsize=256)
def random_similarities(pair: SubspacePair, draws: int, seed: int) -> Tensor:
    """Draw similarities of random subspaces.

    The larger subspace may be fixed as the first coordinates, since the other subspace is uniform (Haar): the
    orthonormal basis of a Gaussian matrix.

    Args:
        pair: Sizes of the subspaces.
        draws: Number of similarities.
        seed: Of the random numbers.

    Returns:
        (draws,) float64.
    """
    generator = torch.Generator().manual_seed(seed)
    smaller, larger = sorted((pair.first, pair.second))
    found = []
    at_a_time = max(1, CHUNK // (pair.dimension * smaller))
    for start in range(0, draws, at_a_time):
        size = (min(at_a_time, draws - start), pair.dimension, smaller)
        bases = torch.linalg.qr(torch.randn(size, generator=generator)).Q  # (n, d, smaller)
        found.append(bases[:, :larger].double().square().sum((1, 2)) / smaller)
    return torch.cat(found)


def chance_interval(
    pairs: Sequence[SubspacePair], level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval in which the mean similarity of several pairs of random subspaces falls.

    Args:
        pairs: Sizes of each pair, at least one; the pairs are independent of one another.
        level: Probability of the interval, in (0, 1).
        draws: Number of simulated means.
        seed: Of the simulation.

    Returns:
        The lower and the upper limit, of equal tails.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(draws, dtype=torch.float64)
    for pair, count in Counter(pairs).items():  # each draws from the similarities of its sizes, with replacement
        chosen = torch.randint(draws, (count, draws), generator=generator)
        means += random_similarities(pair, draws, seed)[chosen].sum(0) / len(pairs)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def jackknife_error(values: Tensor, first: Tensor, second: Tensor) -> float:
    """Return the standard error of a mean over pairs of runs, by leaving out one run at a time.

    Pairs that share a run are not independent, so the number of runs counts and not the number of pairs. The mean over
    pairs is a U-statistic, whose variance the jackknife over runs estimates (Arvesen 1969).

    Args:
        values: One a pair, (pairs,).
        first: Number of each pair's first run, (pairs,) int64.
        second: Number of each pair's second run, (pairs,) int64.

    Returns:
        The standard error; NaN if there are fewer than three runs, or all pairs share one run.
    """
    values = values.double()
    runs = torch.cat([first, second]).unique()
    without = torch.stack([values[(first != run) & (second != run)].mean() for run in runs])
    if len(runs) < 3:
        return float("nan")
    n = len(runs)
    return float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())
