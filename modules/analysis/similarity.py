"""Similarity of the subspaces that two runs have learnt, with chance level and permutation interval.

B·A = (B·C)·(C⁻¹·A) for any invertible C. The row space of A and the column space of B do not depend on C, so neither
does the similarity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def chance_level(dimension: int, first: int, second: int) -> float:
    """Return the expected similarity of two independent, uniformly random subspaces.

    E[U_X·U_Xᵀ] is (r_x/d)·I, since no direction is preferred. So E‖U_Yᵀ·U_X‖²_F = Tr[U_Yᵀ·(r_x/d)·U_Y] = r_x·r_y/d.
    Division by min(r_x, r_y) gives max(r_x, r_y)/d, or r/d for equal ranks.

    Args:
        dimension: Dimension d of the space.
        first: Rank r_x of one subspace, at least 1.
        second: Rank r_y of the other subspace, at least 1.
    """
    return max(first, second) / dimension


@torch.no_grad()
def orthonormal_basis(tall: Tensor) -> Tensor:
    """Return an orthonormal basis of a factor's column space.

    Args:
        tall: B (d_out, r), or Aᵀ (d_in, r) for the row space of A; any floating dtype.

    Returns:
        (d, rank) float64. Directions below the rounding error of float32, the dtype of training, are left out. A zero
        factor has rank 0.
    """
    u, s, _ = torch.linalg.svd(tall.double(), full_matrices=False)
    return u[:, s > s[0] * max(tall.shape) * torch.finfo(torch.float32).eps]


def subspace_similarity(x: Tensor, y: Tensor) -> float:
    """Return ‖U_Yᵀ·U_X‖²_F / min(r_x, r_y), the mean squared cosine of the principal angles between two subspaces.

    For equal ranks, this is the measure of Zhu et al. 2024 (arXiv 2402.16842), figure 1.

    Args:
        x: U_X, orthonormal columns, (d, r_x).
        y: U_Y, orthonormal columns, (d, r_y).

    Returns:
        A number in [0, 1]: 1 if one subspace contains the other, 0 if both are orthogonal, NaN if one is empty.
    """
    return float(cross_similarities([x], [y]))


@torch.no_grad()
def cross_similarities(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Return the similarity of each subspace in x with each subspace in y.

    Args:
        x: n bases with orthonormal columns, each (d, rank).
        y: m bases with orthonormal columns, in the same space.

    Returns:
        (n, m), with the entries of `subspace_similarity`.
    """
    padded = pad_sequence([basis.T for basis in y], batch_first=True)  # (m, largest rank, d)
    ranks = torch.tensor([basis.shape[1] for basis in y])
    rows = [(padded @ basis).square().sum((1, 2)) / ranks.clamp(max=basis.shape[1]) for basis in x]
    return torch.stack(rows).clamp(max=1)


def random_orders(kinds: Sequence[str], draws: int, seed: int) -> Tensor:
    """Return random permutations of a run's projections within each kind.

    Args:
        kinds: Kind of each projection, (n,).
        draws: Number of permutations.
        seed: Seed of the random numbers; use another seed for each run.

    Returns:
        (draws, n) int64.
    """
    numbers = torch.tensor([sorted(set(kinds)).index(kind) for kind in kinds])
    keys = torch.rand(draws, len(kinds), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orders = torch.empty(draws, len(kinds), dtype=torch.int64)
    orders[:, numbers.argsort(stable=True)] = (numbers + keys).argsort(1)  # By kind, and at random within a kind.
    return orders


def permuted_means(similarities: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the mean similarity of two runs after each permutation of their projections.

    The null hypothesis is that the subspaces of the two runs are independent. A permutation assigns the subspaces of a
    run to other blocks, within one kind of projection (role and shape). Assume that the subspaces of one kind are
    exchangeable among the blocks of a run. Then no permutation changes the joint distribution under the null
    hypothesis, and the observed mean is one more draw from the permuted means. All pairs of a run use the same
    permutations of the run. The mean over pairs thus keeps the dependence between pairs that share a run, as in
    Mantel's test of distance matrices (Mantel 1967).

    Directions that all blocks share raise the observed and the permuted means equally. Only a comparison with
    `chance_level` reveals shared directions.

    Args:
        similarities: Similarity of each projection of the first run with each projection of the second run, (n, n).
            Entries of different kinds are not used.
        first: Permutations of the first run from `random_orders`, (draws, n).
        second: Permutations of the second run, (draws, n).

    Returns:
        (draws,) float64. The mean ignores NaN in `similarities`, which a zero factor causes.
    """
    return similarities[first, second].nanmean(1)


def jackknife_error(values: Tensor, first: Tensor, second: Tensor) -> float:
    """Return the jackknife standard error of a mean over pairs of runs.

    Pairs that share a run are not independent, so the sample size is the number of runs, not of pairs. The mean over
    pairs is a U-statistic. The jackknife over runs estimates its variance (Arvesen 1969).

    Args:
        values: Value of each pair, (pairs,).
        first: Index of each pair's first run, (pairs,) int64.
        second: Index of each pair's second run, (pairs,) int64.

    Returns:
        The standard error; NaN for fewer than three runs, or if all pairs share one run.
    """
    values = values.double()
    runs = torch.cat([first, second]).unique()
    left_out_means = torch.stack([values[(first != run) & (second != run)].mean() for run in runs])
    if len(runs) < 3:
        return float("nan")
    n = len(runs)
    return float(((n - 1) / n * (left_out_means - left_out_means.mean()).square().sum()).sqrt())
