"""Cache the output of a model's frozen prefix: computed once for every row, kept on disk, read batch by batch.

The model defines the prefix (`datamodules.contract.Prefix`), and the data module defines the rows. A batch then has
`hidden` (batch, tokens, width) instead of the input, with zeros at padding. The other keys do not change.

A file holds one split: a .npy array (tokens of all rows, width) in the dtype of the prefix's output, bfloat16 as int16.
The file is in the folder `onesided` of the cache of the `datasets` library (HF_DATASETS_CACHE). The name is a hash of
the prefix and the rows. `datamodules.loading.cache_files` writes and verifies the file. A changed model, changed data,
an interrupted run or a damaged file therefore never give wrong rows.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.atomic import WriteError
from datamodules.contract import HIDDEN, INPUTS, MASK, Prefix
from datamodules.errors import DataError, counted
from datamodules.loading.cache_files import cache_folder, is_intact, write_cache

_log = logging.getLogger(__name__)
FORMAT = 1  # Version of the files. Increase the version whenever the content of the rows changes.
GIB = 2**30
STORED = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2"}
REMEDY = "free some space, set HF_DATASETS_CACHE to another folder, or data.cache_prefix to false"


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of the rows of a data set, read when needed. Worker processes may hold this object.

    Args:
        path: The file.
        starts: Position of each row's first token in the file, (rows,).
        lengths: Tokens of each row, (rows,).
        dtype: Dtype of the hidden states.
    """

    path: Path
    starts: Tensor
    lengths: Tensor
    dtype: torch.dtype

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    @cached_property
    def _opened(self) -> tuple[BinaryIO, int, int]:
        """Return the open file, the offset of the first row in bytes, and the width of the rows."""
        try:
            file = self.path.open("rb", buffering=0)
            (_, width), _, _ = _read_header(file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.cache_prefix: {self.path} can no longer be read ({error}). Run the command again to "
                "rebuild the file."
            ) from error
        return file, file.tell(), width

    def batch(self, packs: list[list[int]], tokens: int = 0) -> Tensor:
        """Return the hidden states of packs of rows, (packs, tokens, width). Zeros follow the last row of a pack.

        Args:
            packs: Row numbers of each pack.
            tokens: Smallest number of tokens of the result.

        Raises:
            DataError: If the file is missing or truncated.
        """
        file, offset, width = self._opened
        longest = max(sum(int(self.lengths[row]) for row in pack) for pack in packs)
        hidden = np.zeros((len(packs), max(longest, tokens), width), STORED[self.dtype])
        for values, pack in zip(hidden, packs, strict=True):
            filled = 0
            for row in pack:
                length = int(self.lengths[row])
                # Read instead of memory-mapping: mapped pages would count as memory of this process.
                position = offset + int(self.starts[row]) * width * hidden.itemsize
                target = values[filled : filled + length]
                if os.preadv(file.fileno(), [target.data], position) != target.nbytes:
                    raise DataError(
                        f"data.cache_prefix: {self.path} is truncated. Remove the file and run the command again."
                    )
                filled += length
        return torch.from_numpy(hidden).view(self.dtype)


@dataclass(frozen=True)
class WithHidden:
    """Collate rows with another collate function, and replace the backbone's input by hidden states.

    Args:
        collate: Collate function of rows, or of packs of rows. Each row has its `index`.
        states: The hidden states by index.
    """

    collate: Any
    states: HiddenStates

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the batch.

        Raises:
            DataError: If the batch is not padded at the right, or the file is missing or truncated.
        """
        batch = dict(self.collate(rows))
        _check_padding(batch)
        packs = [[row["index"] for row in (pack if isinstance(pack, list) else [pack])] for pack in rows]
        tokens = batch["input_ids"].shape[1] if "input_ids" in batch else 0
        others = {key: value for key, value in batch.items() if key not in INPUTS}
        return {**others, HIDDEN: self.states.batch(packs, tokens)}


def hidden_states(
    trainer: L.Trainer,
    prefix: Prefix,
    loader: DataLoader[Any],
    lengths: Tensor | None,
    rows_key: str,
    where: str,
    beat: Callable[[], None],
) -> HiddenStates:
    """Return the hidden states of all rows of a data set, from an earlier run's file or computed and written now.

    Args:
        trainer: Trainer with the device of the model.
        prefix: The model's frozen prefix.
        loader: Loader of each row once, in the order of `filling_order`.
        lengths: Number of tokens of each row; None if all rows have the same number.
        rows_key: Identifies the rows and their preparation: other rows have another key.
        where: Name of the rows in messages.
        beat: Function to call for each computed batch.

    Raises:
        DataError: If the file cannot be written, or rows are not padded at the right.
        ModelError: If the backbone cannot continue from the output of the prefix.
    """
    digest = hashlib.sha256(f"{FORMAT} {prefix.key} {rows_key}".encode()).hexdigest()[:40]
    path = cache_folder() / f"prefix-{digest}.npy"
    size = len(loader.dataset)  # type: ignore[arg-type]
    if not (is_cached := is_intact(path, verify=trainer.local_rank == 0)):
        try:
            with write_cache(path) as file:
                _fill(trainer, prefix, loader, lengths, file, f"{counted(size, 'row')} of {where}", path.parent, beat)
        except WriteError as error:
            raise DataError(f"data.cache_prefix: {path} could not be written ({error.reason}); {REMEDY}.") from error
    with path.open("rb") as file:
        (tokens, _), _, dtype = _read_header(file)
    if is_cached:
        _log.info(f"The frozen prefix's output for {counted(size, 'row')} of {where} is read from {path}.")
    if lengths is None:
        lengths = torch.full((size,), tokens // size)
    starts = torch.empty(size, dtype=torch.int64)
    order = filling_order(lengths)
    starts[order] = lengths[order].cumsum(0) - lengths[order]
    stored = {np.dtype(name): kind for kind, name in STORED.items()}
    return HiddenStates(path, starts, lengths, stored[dtype])


def filling_order(lengths: Tensor) -> Tensor:
    """Return the order of the rows in a file: the longest row first, which saves padding."""
    return lengths.argsort(descending=True, stable=True)


def _fill(
    trainer: L.Trainer,
    prefix: Prefix,
    loader: DataLoader[Any],
    lengths: Tensor | None,
    file: BinaryIO,
    description: str,
    folder: Path,
    beat: Callable[[], None],
) -> None:
    """Run the prefix over all rows and write its output."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    ordered = None if lengths is None else lengths[filling_order(lengths)].tolist()
    written = 0
    for batch in track(loader, "Caching", transient=True, console=Console(stderr=True)):
        beat()
        _check_padding(batch)
        hidden = prefix.states(trainer.strategy.batch_to_device(batch)).cpu()  # (batch, tokens, width)
        if written == 0:
            tokens = size * hidden.shape[1] if ordered is None else sum(ordered)
            _begin(file, (tokens, hidden.shape[2]), hidden.dtype, f"{description} ({prefix})", folder)
        tokens_of_rows = (
            [hidden.shape[1]] * len(hidden) if ordered is None else ordered[written : written + len(hidden)]
        )
        for states, length in zip(hidden, tokens_of_rows, strict=True):
            stored = states[:length].contiguous()
            file.write((stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).numpy().data)
        written += len(hidden)


def _check_padding(batch: dict[str, Any]) -> None:
    """Check that a batch is padded at the right, since rows are cached from their first token on."""
    mask = batch.get(MASK)
    if mask is not None and not (mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise DataError(
            "data.cache_prefix: the cache needs texts that are padded at the right, and the tokenizer pads elsewhere. "
            "Set padding_side: right in tokenizer_config.json, or data.cache_prefix to false."
        )


def _begin(file: BinaryIO, shape: tuple[int, int], dtype: torch.dtype, description: str, folder: Path) -> None:
    """Log the size of the file, check that the disk has room, and write the header."""
    size = shape[0] * shape[1] * dtype.itemsize
    _log.info(f"The frozen prefix's output for {description} is kept in {folder}: {size / GIB:.2f} GiB.")
    if (free := shutil.disk_usage(folder).free) < size:
        raise DataError(
            f"data.cache_prefix: {folder} has {free / GIB:.2f} GiB left, and {description} take {size / GIB:.2f} GiB; "
            f"{REMEDY}."
        )
    header = {"descr": STORED[dtype], "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _read_header(file: BinaryIO) -> tuple[tuple[int, int], bool, np.dtype[Any]]:
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)  # type: ignore[return-value]
