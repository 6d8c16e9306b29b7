"""Spectra of updates: intruder dimensions, and the share of an update that a smaller rank keeps.

Effective and stable rank are in `modules.adapters.spectrum`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kept_shares(sigma: Tensor) -> Tensor:
    """Return the share of a matrix's squared Frobenius norm that its best approximation of each smaller rank keeps.

    The best approximation of rank k keeps the k largest singular values (Eckart and Young 1936), so its share is
    σ₁² + … + σ_k² over the sum of all σ².

    Args:
        sigma: Singular values of the matrix, (r,), not negative, in any order.

    Returns:
        (r,) float64, ascending to 1, of the ranks 1 to r. A zero matrix has NaN.
    """
    energy = sigma.double().square().sort(descending=True).values
    return energy.cumsum(0) / energy.sum()


@torch.no_grad()
def left_singular_vectors(weight: Tensor) -> Tensor:
    """Return the left singular vectors of a matrix that belong to singular values above zero.

    Args:
        weight: (d_out, d_in), any floating dtype.

    Returns:
        (d_out, rank) float64, in the order of falling singular values. Rank is the numerical rank: singular values at
        the rounding error of the largest count as zero, since the vectors that belong to them are arbitrary.
    """
    u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, s > s[0] * max(weight.shape) * torch.finfo(torch.float64).eps]


@torch.no_grad()
def intruder_cosines(left: Tensor, weight: Tensor, update: Tensor, top: int = 10) -> Tensor:
    """Return how well W knows each leading left singular vector of W + ΔW.

    An intruder dimension is one of the `top` leading left singular vectors of W + ΔW whose largest |cos| to all left
    singular vectors of W is below a threshold ε (Shuttleworth et al. 2024, arXiv 2410.21228). The paper
    takes top = 10 and looks at a range of ε. W itself has no intruders unless singular values of W coincide, in which
    case their vectors are arbitrary.

    Args:
        left: Left singular vectors of W, (d_out, rank), from `left_singular_vectors`.
        weight: W, (d_out, d_in).
        update: ΔW = s·B·A, (d_out, d_in).
        top: Number of leading singular vectors k; fewer if W + ΔW has fewer.

    Returns:
        (k,) float64 in [0, 1], in the order of falling singular values of W + ΔW.
    """
    tuned = left_singular_vectors(weight.double() + update.double())[:, :top]
    cosines = left.T @ tuned  # (rank, k)
    if not len(cosines):  # W = 0 knows no direction
        return cosines.new_zeros(tuned.shape[1])
    return cosines.abs().amax(0).clamp(max=1.0)


def intruder_counts(cosines: Tensor, thresholds: Tensor) -> Tensor:
    """Return the number of intruder dimensions at each threshold.

    Args:
        cosines: (k,), from `intruder_cosines`.
        thresholds: Values of ε, (n,).

    Returns:
        (n,) int64: the number of cosines that are below ε.
    """
    return (cosines[:, None] < thresholds.to(cosines)).sum(0)
