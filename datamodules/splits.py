"""Which rows of a table belong to which split: seeded, and apart from the run's seed so that runs compare."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules.errors import DataError


def check_splits(val_fraction: float, limits: Mapping[str, int | None]) -> None:
    """Refuse keys that leave nothing.

    Raises:
        DataError: For a fraction outside (0, 1) or a limit below 1.
    """
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise DataError(f"data.max_{name}_samples: {limit} must be 1 or more, or null for all.")
    if not 0 < val_fraction < 1:
        raise DataError(f"data.val_fraction: {val_fraction} must lie in (0, 1).")


def choose_rows(size: int, split: str, held_out: bool, val_fraction: float, seed: int, limit: int | None) -> Tensor:
    """Rows of a split, (rows,) int64.

    Args:
        size: Rows of the table.
        split: `train`, `val` or `test`.
        held_out: Whether the validation rows are a share of the table's training rows.
        val_fraction: That share.
        seed: Seed of what is held out, and of what a limit keeps.
        limit: Most rows; None takes all.

    Raises:
        DataError: If none are left.
    """
    rows = torch.arange(size)
    if held_out:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        held = max(1, round(val_fraction * size))
        rows = order[:held] if split == "val" else order[held:]
    if len(rows) == 0:
        raise DataError(f"data.val_fraction: {val_fraction} of {size} samples leaves none to train on; choose less.")
    if limit is not None and limit < len(rows):
        keep = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit]
        rows = rows[keep]
    return rows
