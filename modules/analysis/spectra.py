"""Spectra of updates: intruder dimensions, and the share of an update that a truncation to a smaller rank keeps.

`modules.adapters.spectrum` has the effective and the stable rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kept_shares(sigma: Tensor) -> Tensor:
    """Return the share of a matrix's squared Frobenius norm that its best rank-k approximation keeps, for k = 1 to r.

    The best approximation keeps the k largest singular values (Eckart and Young 1936). The share is therefore
    (σ₁² + … + σ_k²) / (σ₁² + … + σ_r²).

    Args:
        sigma: Singular values of the matrix, (r,), not negative, in any order.

    Returns:
        (r,) float64, ascending to 1; NaN for a zero matrix.
    """
    energy = sigma.double().square().sort(descending=True).values
    return energy.cumsum(0) / energy.sum()


@torch.no_grad()
def left_singular_vectors(weight: Tensor) -> Tensor:
    """Return the left singular vectors of a matrix for its nonzero singular values.

    Args:
        weight: (d_out, d_in), any floating dtype.

    Returns:
        (d_out, rank) float64, ordered by descending singular value, where `rank` is the numerical rank. Singular values
        below the rounding error count as zero, since their vectors are arbitrary.
    """
    u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, s > s[0] * max(weight.shape) * torch.finfo(torch.float64).eps]


@torch.no_grad()
def intruder_cosines(left: Tensor, weight: Tensor, update: Tensor, top: int = 10) -> Tensor:
    """Return for each leading left singular vector of W + ΔW the largest |cos| to a left singular vector of W.

    A vector whose largest |cos| is below a threshold ε is an intruder dimension (Shuttleworth et al. 2024, arXiv
    2410.21228). The paper uses the 10 leading vectors and a range of ε. For ΔW = 0 there are no intruders, unless
    singular values of W are equal. The vectors of equal singular values are arbitrary.

    Args:
        left: Left singular vectors of W, (d_out, rank), from `left_singular_vectors`.
        weight: W, (d_out, d_in).
        update: ΔW = s·B·A, (d_out, d_in).
        top: Number of leading singular vectors.

    Returns:
        (k,) float64 in [0, 1], in the order of descending singular values of W + ΔW. k is the smaller of `top` and the
        rank of W + ΔW.
    """
    tuned = left_singular_vectors(weight.double() + update.double())[:, :top]
    cosines = left.T @ tuned  # (rank, k)
    if not len(cosines):  # W = 0 has no singular vectors.
        return cosines.new_zeros(tuned.shape[1])
    return cosines.abs().amax(0).clamp(max=1.0)


def intruder_counts(cosines: Tensor, thresholds: Tensor) -> Tensor:
    """Return the number of intruder dimensions at each threshold.

    Args:
        cosines: (k,), from `intruder_cosines`.
        thresholds: Values of ε, (n,).

    Returns:
        Number of cosines below each ε, (n,) int64.
    """
    return (cosines[:, None] < thresholds.to(cosines)).sum(0)
