"""Average tensors of several clients, and measure the error against the average of the clients' updates.

The average of Bᵢ over one A gives the average of the updates: s·(Σ wᵢ·Bᵢ)·A = Σ wᵢ·s·Bᵢ·A. If A differs too, the
product of the averages contains terms s·wᵢ·wⱼ·Bᵢ·Aⱼ with i ≠ j, which belong to no client (Sun et al. 2024, arXiv
2403.12313).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .combination import Update, relative_loss, weighted_sum


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted average of tensors by name, computed in float64 and rounded to their dtype once.

    Args:
        states: Tensors of each client, with the same names and shapes.
        weights: Weight of each client, such as its number of rows; not all 0. The weights are normalised.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    return {
        name: weighted_sum([state[name] for state in states], shares).to(tensor.dtype)
        for name, tensor in states[0].items()
    }


@torch.no_grad()
def average_error(averaged: Sequence[Update], clients: Sequence[Sequence[Update]], weights: Sequence[float]) -> float:
    """Return the relative distance of the averaged factors' update from the average of the clients' updates.

    The norm is the Frobenius norm over all weights together. Updates are never computed as dense matrices.

    Args:
        averaged: Update of each adapted weight after averaging.
        clients: Updates of each client, in the same order.
        weights: Weight of each client. The weights are normalised.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    squared_error = squared_norm = 0.0
    for position, result in enumerate(averaged):
        exact = [update[position] for update in clients]
        squared_error += _squared_norm([result, *exact], [-1.0, *shares])
        squared_norm += _squared_norm(exact, shares)
    return relative_loss(squared_error, squared_norm)


def _squared_norm(updates: Iterable[Update], weights: Sequence[float]) -> float:
    """Return the squared Frobenius norm of Σ wᵢ·sᵢ·Bᵢ·Aᵢ, from QR decompositions of the stacked factors."""
    pairs = list(zip(updates, weights, strict=True))
    left = torch.linalg.qr(torch.cat([weight * u.scale * u.b.double() for u, weight in pairs], dim=1), mode="r").R
    right = torch.linalg.qr(torch.cat([u.a.double() for u, _ in pairs]).T, mode="r").R
    return float((left @ right.T).square().sum())
