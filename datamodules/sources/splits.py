"""Splits: which file and folder names mean a split, and which rows of a table belong to each split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from datamodules.errors import DataError

# Spellings of each split's name in lower case, the usual spelling first.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_FILLER = "(?:data|sets?|images?|imgs?|splits?|files|folder)*"  # train_set, images-val, TestData
HELPER_NAMES = {
    *("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"),
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),  # Files of the `datasets` library.
}


def split_of(name: str) -> str | None:
    """Return the split that the name of a folder or the stem of a file means: `train`, `val`, `test` or None.

    Case and separators do not matter: `Training`, `dev`, `test_set` and `Images-Val` mean a split.
    """
    return next((split for split, spellings in SPLITS.items() if is_spelling(name, spellings)), None)


def is_spelling(name: str, spellings: Iterable[str]) -> bool:
    """Return True if a name matches a spelling. Case, separators and words such as `data` do not matter."""
    words = "|".join(_letters(spelling) for spelling in spellings)
    return re.fullmatch(f"{_FILLER}(?:{words}){_FILLER}", _letters(name)) is not None


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def is_helper(name: str) -> bool:
    """Return True for files that hold no data: hidden files, files of systems and editors, files of `datasets`."""
    return name.startswith(".") or name.casefold() in HELPER_NAMES


def check_limits(limits: Mapping[str, int | None]) -> None:
    """Check the largest number of rows of each split.

    Raises:
        DataError: For a limit below 1.
    """
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise DataError(f"data.max_{name}_samples: {limit} must be 1 or more, or null for all.")


def check_fraction(key: str, fraction: float) -> None:
    """Check a share of rows to hold out.

    Raises:
        DataError: If the share is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.{key}: {fraction} must lie in (0, 1).")


def choose_rows(size: int, split: str, shares: Mapping[str, float], seed: int, limit: int | None) -> Tensor:
    """Return the rows of a split, (rows,) int64.

    Args:
        size: Rows of the table.
        split: `train`, `val` or `test`.
        shares: Shares of the table that are held out for `val` and `test`, `val` first; the rest is for training.
            Empty if the whole table belongs to the split.
        seed: Seed of the held-out rows, and of the rows that a limit keeps.
        limit: Largest number of rows; None takes all rows.

    Raises:
        DataError: If no rows are left for the split.
    """
    rows = torch.arange(size)
    if shares:
        rest = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        parts: dict[str, Tensor] = {}
        for name, share in shares.items():
            held = max(1, round(share * size))
            parts[name], rest = rest[:held], rest[held:]
        rows = parts.get(split, rest)
        if len(rows) == 0:
            keys = " and ".join(f"data.{name}_fraction {share:g}" for name, share in shares.items())
            raise DataError(f"{keys}: of {size} rows none is left to train on. Choose smaller shares.")
    if limit is not None and limit < len(rows):
        keep = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit]
        rows = rows[keep]
    return rows
