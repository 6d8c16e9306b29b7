"""Tables by split from the hub or from Parquet, CSV and JSONL files, memory-mapped by the `datasets` library."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.errors import DataError

if TYPE_CHECKING:  # a run on a folder of images imports no datasets
    import datasets

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}


def _read_parquet(files: list[str]) -> Any:
    import datasets

    return datasets.Dataset.from_parquet(files)


def _read_csv(files: list[str]) -> Any:
    import datasets

    # empty cells alone are missing: "null" and "NA" are words
    return datasets.Dataset.from_csv(files, keep_default_na=False, na_values=[""])


def _read_json(files: list[str]) -> Any:
    import datasets

    return datasets.Dataset.from_json(files)


READERS: dict[str, Callable[[list[str]], Any]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
}


@dataclass(frozen=True)
class Table:
    """Rows on disk.

    Args:
        data: The rows.
        where: What to call them in a message: a file, or a name on the hub with its split.
    """

    data: datasets.Dataset
    where: str

    def __len__(self) -> int:
        return len(self.data)

    def select(self, rows: Tensor) -> Table:
        """Some rows, (rows,) int64, in their order; all in order are the table itself."""
        if torch.equal(rows, torch.arange(len(self))):
            return self
        return Table(self.data.select(rows.tolist()), self.where)


def open_table(
    path: str, splits: Sequence[str], config: str | None = None, revision: str | None = None
) -> Table | None:
    """Open the first of some splits that there is.

    Args:
        path: A directory with files named `train.parquet`, `train-00000-of-00001.csv` or `train/0000.jsonl`, one file
            of one of these kinds, which is its own and only training split, or a name on the hub.
        splits: Names of the split, best first.
        config: The data set's configuration: on the hub, or a folder of that name in the directory.
        revision: Branch, tag or commit on the hub, such as `refs/convert/parquet`.

    Returns:
        The table; None if there is no such split.

    Raises:
        DataError: If the path cannot be had, holds nothing of this kind, or is damaged.
    """
    folder = Path(path)
    if folder.is_file():
        return _read([folder]) if "train" in splits else None
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise DataError(f"data.path: {path} is not here; give a directory, a file or a data set's name on the hub.")
        return _from_hub(path, splits, config, revision)
    if config is not None:
        folder = next((f for f in (folder / config, folder / "data" / config) if f.is_dir()), folder)
    found = [
        files
        for suffix in READERS
        for name in splits
        if (files := [f for f in sorted(folder.rglob(f"*{suffix}")) if _is_of_split(f, name, folder)])
    ]
    if found:
        _check_one_set([f for files in found for f in files], splits, folder, config)
        return _read(found[0])
    if "train" in splits:
        raise DataError(
            f"data.path: {folder} holds no file of training rows: train.parquet, train.csv, train.jsonl, or several as "
            "train-*.parquet or train/*.parquet."
        )
    return None


def open_file(path: str, key: str) -> Table:
    """Open one file, for prediction.

    Raises:
        DataError: Under the given key, if it is not there, of another kind, or damaged.
    """
    if not Path(path).is_file() or Path(path).suffix not in READERS:
        raise DataError(f"data.{key}: {path} is no file of {', '.join(READERS)} here.")
    return _read([Path(path)], key)


def check_column(table: Table, key: str, column: str) -> None:
    """See that a column is there.

    Raises:
        DataError: Under the given key, with the columns there are.
    """
    if column not in table.data.column_names:
        raise DataError(
            f"data.{key}: {table.where} has no column {column}; it has {', '.join(table.data.column_names)}."
        )


def _is_of_split(file: Path, split: str, root: Path) -> bool:
    if any(part.startswith(".") for part in file.relative_to(root).parts):  # copies that editors keep
        return False
    return (
        file.stem == split or file.stem.startswith(f"{split}-") or (file.parent.name == split and file.parent != root)
    )


def _check_one_set(files: list[Path], splits: Sequence[str], root: Path, config: str | None) -> None:
    """Refuse files of several data sets, or of another one than asked for."""
    usual = {*splits, "data", "default"}
    sets = {"/".join(p for p in f.relative_to(root).parts[:-1] if p not in usual) or "." for f in files}
    if len(sets) > 1 or (config is not None and sets != {"."}):
        asked = f", and none of them is {config}" if config is not None else ""
        raise DataError(
            f"data.path: {root} has rows of {splits[0]} in the folders {', '.join(sorted(sets))}{asked}; give the "
            "folder of one data set as data.path, or its name as data.config."
        )


def _read(files: list[Path], key: str = "path") -> Table:
    names = [str(f) for f in files]
    suffix = files[0].suffix
    if suffix not in READERS:
        raise DataError(f"data.{key}: {files[0]} must be one of {', '.join(READERS)}.")
    if gone := [f for f in files if not f.is_file()]:
        raise DataError(f"data.{key}: {gone[0]} is no file, or a link to one that is not there.")
    if empty := [f for f in files if f.stat().st_size == 0]:
        raise DataError(f"data.{key}: {empty[0]} is an empty file.")
    try:
        data = READERS[suffix]([glob.escape(name) for name in names])  # the library takes them for patterns
    except Exception as error:  # truncated, another format, columns of mixed types; the library raises many kinds
        if "corresponds to no data" in str(error):
            raise DataError(f"data.{key}: {names[0]} has no rows.") from error
        cause: BaseException = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:  # the library copies what it reads; a damaged file has no errno
            import datasets

            raise DataError(
                f"data.{key}: {names[0]} could not be read into the cache {datasets.config.HF_DATASETS_CACHE} "
                f"({cause}); free some space, or set HF_DATASETS_CACHE to another folder."
            ) from error
        reason = str(cause).strip().splitlines()
        raise DataError(
            f"data.{key}: {', '.join(names)} cannot be read as {suffix[1:]} ({reason[0] if reason else repr(cause)}). "
            "It may be damaged, or a column may hold values of several types."
        ) from error
    return Table(data, names[0])


def _from_hub(name: str, splits: Sequence[str], config: str | None, revision: str | None) -> Table | None:
    import datasets

    try:
        available = datasets.get_dataset_split_names(name, config, revision=revision)
        found = next((s for s in splits if s in available), None)
        if found is None:
            return None
        data = datasets.load_dataset(name, config, split=found, revision=revision)
    except Exception as error:  # whatever a network or a repository can raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path: {name} is no directory here, and from the hub it could not be had ({reason}). Without a "
            "connection the data and the model each take a local path: --data.path DIRECTORY and --model.weights "
            "FILE.safetensors for images, --model.backbone DIRECTORY for text."
        ) from error
    return Table(data, f"{name}/{config}/{found}" if config else f"{name}/{found}")
