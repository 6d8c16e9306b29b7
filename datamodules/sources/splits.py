"""Splits: the file and folder names that mean one, and the rows of a table that belong to each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from datamodules.errors import DataError

# Spellings of each split, the usual one first, in lower case.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_FILLER = "(?:data|sets?|images?|imgs?|splits?|files|folder)*"  # train_set, images-val, TestData
HELPER_NAMES = {
    *("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"),
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),  # of the `datasets` library
}


def split_of(name: str) -> str | None:
    """Return the split that the name of a folder or the stem of a file means: `train`, `val`, `test` or None.

    Case and separators do not matter: `Training`, `dev`, `test_set` and `Images-Val` mean a split.
    """
    return next((split for split, spellings in SPLITS.items() if is_spelling(name, spellings)), None)


def is_spelling(name: str, spellings: Iterable[str]) -> bool:
    """Return True if a name is one of some spellings, whatever its case, separators and words such as `data`."""
    words = "|".join(_letters(spelling) for spelling in spellings)
    return re.fullmatch(f"{_FILLER}(?:{words}){_FILLER}", _letters(name)) is not None


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def is_helper(name: str) -> bool:
    """Return True for files and folders that systems and editors leave beside data: dot-names, __MACOSX, Thumbs.db."""
    return name.startswith(".") or name.casefold() in HELPER_NAMES


def check_limits(limits: Mapping[str, int | None]) -> None:
    """Check the most rows of each split.

    Raises:
        DataError: For a limit below 1.
    """
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise DataError(f"data.max_{name}_samples: {limit} must be 1 or more, or null for all.")


def check_fraction(key: str, fraction: float) -> None:
    """Check the share of rows that are held out.

    Raises:
        DataError: If the share leaves nothing.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.{key}: {fraction} must lie in (0, 1).")


def choose_rows(size: int, split: str, held_out: bool, val_fraction: float, seed: int, limit: int | None) -> Tensor:
    """Return the rows of a split, (rows,) int64.

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
