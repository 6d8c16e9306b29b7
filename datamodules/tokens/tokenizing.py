"""Tokenise texts once, and read the tokens from a cache on disk, keyed by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import torch
import xxhash
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.atomic import Digest, WriteError
from datamodules.errors import DataError, counted
from datamodules.loading.batching import Draw, index_of
from datamodules.loading.cache_files import cache_folder, is_intact, write_cache
from datamodules.sources.tables import Table

FORMAT = 1  # Version of cached tokens. Increase the version whenever the encoding of a task changes.
BATCH = 1000  # Rows that are encoded together.
Encode = Callable[[dict[str, list[Any]]], dict[str, list[Any]]]


class TokenDataset(Dataset[dict[str, Any]]):
    """Rows of tokens on disk, with their targets in memory.

    Args:
        data: Columns of token lists, and `length`.
        targets: One number for each row, by name.
        texts: Columns of text that a batch also holds.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        targets: Mapping[str, Tensor] | None = None,
        texts: datasets.Dataset | None = None,
    ) -> None:
        self.data = data
        self.targets = dict(targets or {})
        self.texts = texts
        self.numbers: Tensor | None = None  # (rows,) int64: numbers to return as `index`, if some rows are left out.
        self.lengths = lengths_of(data)
        self.columns = [name for name in data.column_names if name != "length"]
        self.tokens = data.select_columns(self.columns)

    def __len__(self) -> int:
        return len(self.data)

    def digest(self) -> str:
        """Return a hash of the tokens of all rows, without the labels."""
        digest = hashlib.sha256()
        _add_rows(digest, self.tokens.select_columns([name for name in self.columns if name != "labels"]))
        return digest.hexdigest()

    def rows_digest(self) -> str:
        """Return a digest of all content of the rows: tokens, targets and texts, in order."""
        digest = xxhash.xxh3_128()
        _add_rows(digest, self.tokens)
        if self.texts is not None:
            _add_rows(digest, self.texts)
        for name, values in sorted(self.targets.items()):
            digest.update(name.encode() + values.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """Return one row."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[dict[str, Any]]:
        """Return the rows of a batch, each with its `index`."""
        indices = [index_of(key) for key in keys]
        columns = self.tokens[indices] | (self.texts[indices] if self.texts is not None else {})
        return [
            {name: values[i] for name, values in columns.items()}
            | {name: values[index].item() for name, values in self.targets.items()}
            | {"index": index if self.numbers is None else int(self.numbers[index])}
            for i, index in enumerate(indices)
        ]


def tokenized(table: Table, columns: Sequence[str], encode: Encode, key: Mapping[str, Any]) -> datasets.Dataset:
    """Return rows of tokens, from the cache if the same texts were encoded with the same key before.

    The cache is in the folder of the `datasets` library (HF_DATASETS_CACHE). The name of a cache file is a hash of the
    texts and the key: a moved table finds its file, and a changed table gets a new file. A damaged file is rebuilt
    (`datamodules.loading.cache_files`). Rows are read and written in batches, so that memory does not grow with the
    number of rows.

    Args:
        table: Rows of text.
        columns: Columns that `encode` gets.
        encode: Function from a batch of columns to a batch of token lists, with their `length`.
        key: Everything besides the texts that determines the tokens: `tokenizer_state`, lengths.

    Raises:
        DataError: If the cache cannot be written.
    """
    texts = table.data.select_columns(list(columns))
    versions = [FORMAT, datasets.__version__, version("tokenizers"), version("transformers")]
    digest = hashlib.sha256(json.dumps([dict(key), list(columns), versions], sort_keys=True).encode())
    _add_rows(digest, texts)
    name = digest.hexdigest()[:40]
    cache = cache_folder() / f"{name}.arrow"
    if not is_intact(cache):
        with Console(stderr=True).status(escape(f"Tokenising {counted(len(texts), 'row')} of {table.where!r}")):
            try:
                with write_cache(cache) as file:
                    _write_tokens(texts, encode, file)
            except WriteError as error:
                raise DataError(
                    f"The tokens of {table.where} could not be written to {cache.parent} ({error.reason}). Free some "
                    "space, or set HF_DATASETS_CACHE to another folder."
                ) from error
    return datasets.Dataset.from_file(str(cache))


def _add_rows(digest: Digest, data: datasets.Dataset) -> None:
    """Add all rows of a table to a digest, in their order."""
    for rows in data.with_format("arrow").iter(batch_size=10_000):
        for batch in rows.combine_chunks().to_batches():
            digest.update(batch.serialize())


def lengths_of(data: datasets.Dataset) -> Tensor:
    """Return the column `length` of rows of tokens, (rows,) int32. Only this column is read into memory."""
    return torch.from_numpy(data.with_format("numpy", columns=["length"])["length"][:]).to(torch.int32)


def _write_tokens(texts: datasets.Dataset, encode: Encode, file: BinaryIO) -> None:
    """Encode rows batch by batch and write them as an Arrow stream."""
    batches = (encode(rows) for rows in texts.iter(batch_size=BATCH))
    first = next(batches)
    schema = pa.schema({name: pa.int32() if name == "length" else pa.list_(pa.int32()) for name in first})
    with pa.ipc.new_stream(file, schema) as stream:
        for columns in chain([first], batches):
            stream.write_batch(pa.RecordBatch.from_pydict(columns, schema))


def tokenizer_state(tokenizer: Any) -> str:
    """Return a hash of everything that determines how a tokenizer splits a text."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {k: v for k, v in state.items() if k not in ("truncation", "padding")}  # Each call sets both.
    else:
        state = sorted(tokenizer.get_vocab().items())
    names = [  # Without the paths of the tokenizer's files.
        type(tokenizer).__name__,
        tokenizer.model_input_names,
        tokenizer.truncation_side,
        {k: str(v) for k, v in tokenizer.init_kwargs.items() if not k.endswith(("_file", "_or_path", "local", "only"))},
    ]
    return hashlib.sha256(json.dumps([state, names], sort_keys=True).encode()).hexdigest()
