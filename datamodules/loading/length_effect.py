"""Correlation of length and label: rank statistics for classes and for a regression."""

from __future__ import annotations

import torch
from torch import Tensor

STRONG_ETA_SQUARED = 0.25
STRONG_RHO = 0.5  # The square root of STRONG_ETA_SQUARED: the same share of the ranks' variance.


def midranks(values: Tensor) -> Tensor:
    """Return ranks from 1 on, (size,) float64. Equal values share the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def rank_eta_squared(values: Tensor, classes: Tensor) -> float:
    """Return the effect of the class on the values: the share of the ranks' variance that lies between classes.

    The share is (H - k + 1) / (n - k) with H of Kruskal and Wallis for k classes and n values (Tomczak and Tomczak
    2014, The need to report effect size estimates revisited). The share is near 0 if the class has no effect, and
    at most 1. The result is 0 if the share is not defined: a single class, a class for each value, or equal values.

    Args:
        values: Numbers, (size,).
        classes: Class of each number, (size,).
    """
    _, inverse, counts = classes.unique(return_inverse=True, return_counts=True)
    ranks = midranks(values)
    ranks -= ranks.mean()
    total = float(ranks.square().sum())
    n, k = len(ranks), len(counts)
    if total == 0 or k in (1, n):
        return 0.0
    sums = torch.zeros(k, dtype=torch.float64).index_add_(0, inverse, ranks)
    h = (n - 1) * float((sums.square() / counts).sum()) / total
    return (h - k + 1) / (n - k)


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two tensors (size,), in [-1, 1]; 0 if one tensor is constant."""
    a, b = (ranks - ranks.mean() for ranks in (midranks(first), midranks(second)))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else 0.0


def strong_effect(lengths: Tensor, labels: Tensor) -> str | None:
    """Return name and value of the statistic if length and label correlate strongly; otherwise None.

    Args:
        lengths: Length of each sample, (size,).
        labels: Classes (size,) int64, or scores (size,) of a floating dtype.
    """
    if labels.is_floating_point():
        rho = spearman(lengths, labels)
        return f"Spearman's rho {rho:.2f}" if abs(rho) >= STRONG_RHO else None
    eta = rank_eta_squared(lengths, labels)
    return f"rank eta squared {eta:.2f}" if eta >= STRONG_ETA_SQUARED else None
