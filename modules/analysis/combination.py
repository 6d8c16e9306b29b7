"""Combine low-rank updates: exactly over a shared factor, or as the best approximation of a smaller rank.

Updates s·B·A with the same A form a linear space: Σ wᵢ·sᵢ·Bᵢ·A = (Σ wᵢ·sᵢ·Bᵢ)·A. The sum needs no larger rank and has
no error except rounding. The same holds for updates with the same B. Updates without a shared factor need the sum of
their ranks. `Decomposition.truncate` returns the best approximation of their sum with a smaller rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.adapters.config import AdapterError
from modules.adapters.init import factor_generator

Method = Literal["sum", "ties", "dare"]
Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")


class Update(NamedTuple):
    """The update s·B·A of one weight.

    Args:
        a: A (r, d_in).
        b: B (d_out, r).
        scale: The scale s, above 0.
    """

    a: Tensor
    b: Tensor
    scale: float

    def factor(self, side: Side) -> Tensor:
        """Return A or B."""
        return self.a if side == "A" else self.b


@dataclass(frozen=True)
class Sparsity:
    """Settings of TIES and DARE.

    Args:
        density: Share of the entries of each trained factor that is kept, in (0, 1].
        seed: Seed of the entries that DARE keeps.
    """

    density: float = 0.2
    seed: int = 0


# ----------------------------------------------------------------------------------------------- over a shared factor


def first_difference(updates: Sequence[Update], side: Side) -> int | None:
    """Return the index of the first update whose A (or B) differs from the A (or B) of `updates[0]`, or None."""
    first = updates[0].factor(side)
    return next((i for i, update in enumerate(updates) if not torch.equal(update.factor(side), first)), None)


@torch.no_grad()
def combine_updates(
    updates: Sequence[Update],
    weights: Sequence[float],
    shared: Side,
    method: Method = "sum",
    sparsity: Sparsity = Sparsity(),
    name: str = "",
) -> Update:
    """Combine updates of one weight that share a factor.

    The result has the shared factor and the scale of the first update. The trained factor of each other update is first
    multiplied by the ratio of its scale to this scale. Sums are computed in float64, and rounded to the factors' dtype
    once.

    Args:
        updates: Updates with bit-identical shared factors.
        weights: Weight of each update; any sign.
        shared: The shared factor.
        method: `sum` adds the trained factors τᵢ: Σ wᵢ·τᵢ. `ties` calls `ties_merge`. `dare` adds the factors after
            `drop_and_rescale`.
        sparsity: Settings of `ties` and `dare`.
        name: Name of the projection. The entries that DARE drops depend on the name.

    Raises:
        AdapterError: If the factors differ.
    """
    if (index := first_difference(updates, shared)) is not None:
        raise AdapterError(
            f"{shared} of {name} differs between adapter 1 and adapter {index + 1}. Combine adapters over one frozen "
            "factor, or use a truncated singular value decomposition."
        )
    trained: Side = "B" if shared == "A" else "A"
    scale = updates[0].scale
    vectors = [update.scale / scale * update.factor(trained).double() for update in updates]
    if method == "ties":
        merged = ties_merge(vectors, weights, sparsity.density)
    else:
        if method == "dare":
            generators = [factor_generator(sparsity.seed, f"{name}/{i}", trained) for i in range(len(vectors))]
            pairs = zip(vectors, generators, strict=True)
            vectors = [drop_and_rescale(vector, sparsity.density, generator) for vector, generator in pairs]
        merged = weighted_sum(vectors, weights)
    merged = merged.to(updates[0].factor(trained).dtype)
    return updates[0]._replace(b=merged) if trained == "B" else updates[0]._replace(a=merged)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ·tᵢ, float64."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total


def ties_merge(vectors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Merge tensors by TIES: trim, elect signs, and average the agreeing entries (Yadav et al. 2023, arXiv 2306.01708).

    Each tensor keeps the largest entries by magnitude. The elected sign of an entry is the sign of the weighted sum.
    The result is the weighted mean of the entries that have the elected sign, times Σ|wᵢ|. With weights 1/n, the result
    equals the paper's with λ = 1. A negative weight inverts the sign of its tensor.

    Args:
        vectors: Tensors of one shape.
        weights: Weight of each tensor.
        density: Share of the entries that each tensor keeps; at least one entry is kept.

    Returns:
        The merged tensor, float64.
    """
    weighted = torch.stack([w * _trim(v.double(), density) for v, w in zip(vectors, weights, strict=True)])
    sizes = torch.tensor(weights, dtype=torch.float64).abs().view(-1, *[1] * vectors[0].ndim)
    agrees = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    mean = (weighted * agrees).sum(0) / (sizes * agrees).sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return mean * sizes.sum()


def _trim(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor in which all entries except the largest by magnitude are zero."""
    kept = tensor.abs().flatten().topk(max(1, int(density * tensor.numel()))).indices
    trimmed = torch.zeros_like(tensor).flatten()
    trimmed[kept] = tensor.flatten()[kept]
    return trimmed.view_as(tensor)


def drop_and_rescale(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop entries at random and divide the others by the density (DARE, Yu et al. 2024, arXiv 2311.03099).

    The expected value of the result is the tensor.

    Args:
        tensor: The tensor.
        density: Probability of keeping an entry, in (0, 1].
        generator: Generator on the CPU.
    """
    kept = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) < density
    return tensor * kept / density


# ------------------------------------------------------------------------------------------------------ smaller ranks


@dataclass(frozen=True)
class Decomposition:
    """Singular value decomposition of a sum of updates. Its length k is at most the sum of the adapter ranks.

    Args:
        left: Left singular vectors, (d_out, k) float64.
        sigma: Singular values, (k,) float64, descending.
        right: Right singular vectors, (k, d_in) float64.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor

    def truncate(self, rank: int, orthonormal: Side = "A") -> Update:
        """Return the best approximation of a rank, as an update with scale 1 and float32 factors.

        Args:
            rank: Rank of the approximation, 1 to k.
            orthonormal: The factor that has orthonormal vectors. The other factor contains the singular values.
        """
        left, sigma, right = self.left[:, :rank], self.sigma[:rank], self.right[:rank]
        a, b = (right, left * sigma) if orthonormal == "A" else (sigma[:, None] * right, left)
        return Update(a.float().contiguous(), b.float().contiguous(), 1.0)

    def lost_square(self, rank: int) -> float:
        """Return the squared Frobenius norm of the part that is lost by a truncation to `rank`."""
        return float(self.sigma[rank:].square().sum())

    @property
    def square(self) -> float:
        """Squared Frobenius norm of the sum of updates."""
        return float(self.sigma.square().sum())

    def rank_to_keep(self, share: float) -> int:
        """Return the smallest rank whose truncation keeps a share of the squared Frobenius norm; 1 for a zero matrix.

        Args:
            share: The share, in (0, 1].
        """
        lost = self.square - self.sigma.square().cumsum(0)  # by rank - 1
        enough = (lost <= (1 - share) * self.square + 1e-12 * self.square).nonzero()
        return int(enough[0]) + 1


@torch.no_grad()
def decompose(updates: Sequence[Update], weights: Sequence[float] = (1.0,)) -> Decomposition:
    """Decompose Σ wᵢ·sᵢ·Bᵢ·Aᵢ without computing the dense sum.

    The stacked factors [w₁·s₁·B₁, …] = Q_B·R_B and [A₁; …]ᵀ = Q_A·R_A give a small matrix M = R_B·R_Aᵀ. M has the
    singular values of the sum. The singular vectors of M, times Q_B and Q_A, are the singular vectors of the sum.

    Args:
        updates: Updates of one weight, of any ranks.
        weights: Weight of each update.
    """
    pairs = zip(updates, weights, strict=True)
    left = torch.linalg.qr(torch.cat([weight * u.scale * u.b.double() for u, weight in pairs], dim=1))
    right = torch.linalg.qr(torch.cat([u.a.double() for u in updates]).T)
    u, sigma, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return Decomposition(left.Q @ u, sigma, vh @ right.Q.T)


def relative_loss(lost: float, total: float) -> float:
    """Return the relative error in the Frobenius norm, from squared norms; 0 for a zero update."""
    return (lost / total) ** 0.5 if total > 0 else 0.0
