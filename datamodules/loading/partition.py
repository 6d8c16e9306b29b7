"""Split rows among the clients of a federated training: at random, or with another mix of classes on each client."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def iid_partition(size: int, clients: int, seed: int) -> list[Tensor]:
    """Split rows at random into parts whose sizes differ by one row at most.

    Args:
        size: Number of rows.
        clients: Number of parts.
        seed: Seed of the order.

    Returns:
        The sorted rows of each client, (rows,) int64.
    """
    order = np.random.default_rng(seed).permutation(size)
    return [_sorted(part) for part in np.array_split(order, clients)]


def dirichlet_partition(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Split rows into parts of almost equal size whose class mixes differ (Hsu et al. 2019, arXiv 1909.06335, 3.1).

    The mix of a client is drawn from Dir(α·p), with p the class mix of all rows. The client then draws the class of
    each of its rows from this mix, and a row of this class without replacement. When a class has no rows left, the mix
    is renormalised over the other classes. The last clients therefore get the classes that still have rows.

    Args:
        labels: Class of each row, (rows,) int64.
        clients: Number of parts.
        alpha: Concentration α, above 0. A small α gives clients with few classes, a large α the mix of all rows.
        seed: Seed of the mixes and of the rows.

    Returns:
        The sorted rows of each client, (rows,) int64. The sizes differ by one row at most.
    """
    generator = np.random.default_rng(seed)
    classes, class_of_row = np.unique(labels.numpy(), return_inverse=True)
    pools = [generator.permutation(np.flatnonzero(class_of_row == k)).tolist() for k in range(len(classes))]
    left = np.array([len(pool) for pool in pools])
    prior = left / left.sum()
    parts = []
    for size in (len(part) for part in np.array_split(class_of_row, clients)):
        # Normalised Gamma variables are Dirichlet. A tiny α can round all of them to 0. One class is then drawn.
        mix = generator.standard_gamma(alpha * prior)
        if not mix.any():
            mix[generator.choice(len(mix), p=prior)] = 1.0
        rows = []
        for _ in range(size):
            weights = np.where(left > 0, mix, 0.0)
            if not weights.any():  # The client's classes have no rows left.
                weights = left.astype(float)
            k = int(generator.choice(len(weights), p=weights / weights.sum()))
            rows.append(pools[k].pop())
            left[k] -= 1
        parts.append(_sorted(np.array(rows, dtype=np.int64)))
    return parts


def _sorted(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(rows).astype(np.int64))
