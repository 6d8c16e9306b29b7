"""The output of a model's frozen prefix for every row, computed once, kept on disk and read batch by batch.

The model says what its prefix is (`datamodules.contract.Prefix`), and the data say which rows the prefix gets. A batch
then has `hidden` (batch, tokens, width) in the place of the input, zeros at padding, and all else as it was.

A file holds one split: a .npy array (tokens of all rows, width), in the dtype that the prefix gives, bfloat16 as int16.
The file lies with the `datasets` library's cache (HF_DATASETS_CACHE), named by the hash of the prefix and of the rows,
and is written and verified as `datamodules.loading.cache_files` says: a changed model or data set, an interrupted run
or a damaged file never gives wrong rows.
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
from datamodules.errors import DataError
from datamodules.loading.cache_files import cache_folder, is_intact, write_cache

_log = logging.getLogger(__name__)
FORMAT = 1  # of files; one more whenever their rows would be others
GIB = 2**30
STORED = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2"}
REMEDY = "free some space, set HF_DATASETS_CACHE to another folder, or data.cache_prefix to false"


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of the rows of a data set, read when asked for; worker processes may have it.

    Args:
        path: The file.
        starts: First token of each row in it, (rows,).
        lengths: Tokens of each row, (rows,).
        dtype: Of the hidden states.
    """

    path: Path
    starts: Tensor
    lengths: Tensor
    dtype: torch.dtype

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    @cached_property
    def _opened(self) -> tuple[BinaryIO, int, int]:
        """Return the file, where its rows begin in bytes, and their width."""
        try:
            file = self.path.open("rb", buffering=0)
            (_, width), _, _ = _read_header(file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.cache_prefix: {self.path} can no longer be read ({error}); run again, and it is written anew."
            ) from error
        return file, file.tell(), width

    def batch(self, packs: list[list[int]], tokens: int = 0) -> Tensor:
        """Return hidden states (packs, tokens, width): the rows of each pack one behind the other, then zeros.

        Args:
            packs: Numbers of the rows.
            tokens: Least length; the longest pack has it or more.

        Raises:
            DataError: If the file is no longer there, or no longer whole.
        """
        file, offset, width = self._opened
        longest = max(sum(int(self.lengths[row]) for row in pack) for pack in packs)
        hidden = np.zeros((len(packs), max(longest, tokens), width), STORED[self.dtype])
        for values, pack in zip(hidden, packs, strict=True):
            filled = 0
            for row in pack:
                length = int(self.lengths[row])
                # not mapped into memory: pages that were read would count as this process's own
                place = offset + int(self.starts[row]) * width * hidden.itemsize
                target = values[filled : filled + length]
                if os.preadv(file.fileno(), [target.data], place) != target.nbytes:
                    raise DataError(f"data.cache_prefix: {self.path} has been cut short; remove it and run again.")
                filled += length
        return torch.from_numpy(hidden).view(self.dtype)


@dataclass(frozen=True)
class WithHidden:
    """Makes a batch as another collate function does, with hidden states in the place of the backbone's input.

    Args:
        collate: Makes a batch of rows, or of packs of rows; each row has its `index`.
        states: The hidden states by index.
    """

    collate: Any
    states: HiddenStates

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the batch.

        Raises:
            DataError: If it is padded at the left.
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
    """Return the hidden states of all rows, from the file of an earlier run or computed and written now.

    Args:
        trainer: Knows the device.
        prefix: The model's frozen prefix.
        loader: Gives each row once, in the order of `filling_order`.
        lengths: Tokens of each row; None if all have as many.
        rows_key: Another one for other rows, or rows prepared in another way.
        where: What to call them in a message.
        beat: Is called with each batch that is computed.

    Raises:
        DataError: If the file cannot be written, or rows are padded at the left.
    """
    digest = hashlib.sha256(f"{FORMAT} {prefix.key} {rows_key}".encode()).hexdigest()[:40]
    path = cache_folder() / f"prefix-{digest}.npy"
    size = len(loader.dataset)  # type: ignore[arg-type]
    if not (done := is_intact(path, verify=trainer.local_rank == 0)):
        try:
            with write_cache(path) as file:
                _fill(trainer, prefix, loader, lengths, file, f"{size:,} rows of {where}", path.parent, beat)
        except WriteError as error:
            raise DataError(f"data.cache_prefix: {path} could not be written ({error.reason}); {REMEDY}.") from error
    with path.open("rb") as file:
        (tokens, _), _, dtype = _read_header(file)
    if done:
        _log.info(f"The frozen prefix's output for {size:,} rows of {where} is read from {path}.")
    if lengths is None:
        lengths = torch.full((size,), tokens // size)
    starts = torch.empty(size, dtype=torch.int64)
    order = filling_order(lengths)
    starts[order] = lengths[order].cumsum(0) - lengths[order]
    stored = {np.dtype(name): kind for kind, name in STORED.items()}
    return HiddenStates(path, starts, lengths, stored[dtype])


def filling_order(lengths: Tensor) -> Tensor:
    """Return the rows in the order in which a file has them: the longest first, so that little is padding."""
    return lengths.argsort(descending=True, stable=True)


def _fill(
    trainer: L.Trainer,
    prefix: Prefix,
    loader: DataLoader[Any],
    lengths: Tensor | None,
    file: BinaryIO,
    what: str,
    folder: Path,
    beat: Callable[[], None],
) -> None:
    """Run the prefix over all rows and write what it gives."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    ordered = None if lengths is None else lengths[filling_order(lengths)].tolist()
    written = 0
    for batch in track(loader, "Caching", transient=True, console=Console(stderr=True)):
        beat()
        _check_padding(batch)
        hidden = prefix.states(trainer.strategy.batch_to_device(batch)).cpu()  # (batch, tokens, width)
        if written == 0:
            tokens = size * hidden.shape[1] if ordered is None else sum(ordered)
            _begin(file, (tokens, hidden.shape[2]), hidden.dtype, f"{what} ({prefix})", folder)
        own = [hidden.shape[1]] * len(hidden) if ordered is None else ordered[written : written + len(hidden)]
        for states, length in zip(hidden, own, strict=True):
            stored = states[:length].contiguous()
            file.write((stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).numpy().data)
        written += len(hidden)


def _check_padding(batch: dict[str, Any]) -> None:
    """Check that padding is behind the tokens: rows are kept, and put in, from the first token on."""
    mask = batch.get(MASK)
    if mask is not None and not (mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise DataError(
            "data.cache_prefix: is for texts that are padded at the right, and the tokenizer pads elsewhere; give it "
            "padding_side: right in tokenizer_config.json, or set data.cache_prefix to false."
        )


def _begin(file: BinaryIO, shape: tuple[int, int], dtype: torch.dtype, what: str, folder: Path) -> None:
    """Log the size of the file, check the free space, and write the header."""
    size = shape[0] * shape[1] * dtype.itemsize
    _log.info(f"The frozen prefix's output for {what} is kept in {folder}: {size / GIB:.2f} GiB.")
    if (free := shutil.disk_usage(folder).free) < size:
        raise DataError(
            f"data.cache_prefix: {folder} has {free / GIB:.2f} GiB left, and {what} take {size / GIB:.2f} GiB; "
            f"{REMEDY}."
        )
    header = {"descr": STORED[dtype], "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _read_header(file: BinaryIO) -> tuple[tuple[int, int], bool, np.dtype[Any]]:
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)  # type: ignore[return-value]
