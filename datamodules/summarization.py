"""Summarization: texts with their summaries from XSum, CNN/DailyMail, or any two columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.base import Collate
from datamodules.contract import IGNORE_INDEX, DataKind
from datamodules.errors import DataError
from datamodules.sources.columns import SOURCES, TARGETS, check_one, columns_line, named_column, named_columns
from datamodules.sources.tables import Table, blank_rows, check_column, check_texts
from datamodules.text import BadRow, TrainingTextData
from datamodules.tokens.tokenizing import TokenDataset, tokenized, tokenizer_state


@dataclass(frozen=True)
class PadPairs:
    """Collate rows of source and target tokens into a padded batch."""

    tokenizer: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tokens (batch, source tokens), mask, `labels` (batch, target tokens), `reference` and `index`."""
        batch: dict[str, Any] = dict(
            self.tokenizer.pad(
                [{"input_ids": row["input_ids"]} for row in rows], padding="longest", return_tensors="pt"
            )
        )
        if "labels" in rows[0]:
            labels = [torch.tensor(row["labels"]) for row in rows]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        if "reference" in rows[0]:
            batch["reference"] = [row["reference"] for row in rows]
        return {**batch, "index": torch.tensor([row["index"] for row in rows])}


class SummarizationData(TrainingTextData):
    """Sources and targets, tokenised once and batched by the sources' length.

    Batches are `datamodules.contract.SummaryBatch`.

    Args:
        source_column: Column of the texts to summarise. None takes the first of `document`, `article`, `dialogue`,
            `source`, `text` and similar names.
        target_column: Column of the summaries. None takes the only column named `summary`, `highlights`, `target` or
            `output`, or else the only column named `abstract`, `headline` or `title`.
        id_column: Column that identifies a row in predictions. If a table lacks the default column, predictions have
            the row's number.
        prediction_format: Format of the file of predictions.
        source_prefix: Text before each source, such as T5's `summarize: `.
        batch_size: Samples in a batch of one process, at least 1.
        max_source_length: Largest number of tokens of a source. Longer sources are cut.
        max_target_length: Largest number of tokens of a target for the loss. ROUGE uses the whole text.
    """

    kind = DataKind.SUMMARIES

    def __init__(
        self,
        path: str = "EdinburghNLP/xsum",
        source_column: str | None = None,
        target_column: str | None = None,
        id_column: str = "id",
        prediction_format: Literal["csv", "jsonl"] = "csv",
        source_prefix: str = "",
        batch_size: int = 16,
        max_source_length: int = 1024,
        max_target_length: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, batch_size=batch_size, **kwargs)
        self.check_columns(source_column=source_column, target_column=target_column)
        for key, length in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
            if length < 2:
                raise DataError(f"data.{key}: {length} must be 2 or more.")
        self.read_as_text(source_column, target_column)
        self.source_column, self.target_column, self.id_column = source_column, target_column, id_column
        self.source_prefix = source_prefix
        self.prediction_files = (f"predictions.{prediction_format}",)
        self._guessed: list[str] = []
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def before_splits(self) -> None:
        """Check that the model has positions for the lengths, and guess the columns that no key names."""
        self.check_length("max_source_length", self.max_source_length)
        self.check_length("max_target_length", self.max_target_length)
        if self.source_column is None or self.target_column is None:
            self._guess_columns()

    def _guess_columns(self) -> None:
        """Guess the columns that no key names, from the usual names.

        Raises:
            DataError: If no column has a usual name, or several columns may hold the summaries. Prediction needs no
                summaries.
        """
        table = next(iter(self.tables_of_any_split().values()))
        if self.source_column is None:
            self.source_column = named_column(table, SOURCES, [self.target_column], last_word=True)
            _check_guess(table, "source_column", self.source_column, SOURCES)
        if self.target_column is None:
            targets = named_columns(table, TARGETS, [self.source_column], last_word=True)
            self.target_column = targets[0] if len(targets) == 1 else None
            if not self.predicts:
                check_one(table, "target_column", targets, "summaries")
                _check_guess(table, "target_column", self.target_column, TARGETS[0])
        given = {key: self.hparams[key] for key in ("source_column", "target_column")}
        self._guessed = [f"data.{key}" for key, column in given.items() if column is None]
        if self.predicts and given["source_column"] is None:
            used = [self.source_column, self.target_column]
            self.findings.add(columns_line(f"sources of {self.source_column}", ["data.source_column"], table, used))
        self.keep_columns(source_column=self.source_column, target_column=self.target_column)

    def build(self, split: str, table: Table, rows: Tensor) -> TokenDataset:
        """Return the tokens of some rows of a table, with the targets' texts; without targets for prediction."""
        assert self.source_column is not None
        columns = {"source_column": self.source_column}
        if split != "predict":
            assert self.target_column is not None
            columns["target_column"] = self.target_column
        else:
            if self.id_column != "id":
                check_column(table, "id_column", self.id_column)
        bad: dict[int, BadRow] = {}
        for key, column in columns.items():
            table = check_texts(table, key, column)
            bad |= {row: BadRow(key, f"has no text in column {column}") for row in blank_rows(table, column)}
        self.add_notes(table)
        chosen = table.select(self.drop_bad_rows(split, table, rows, bad))
        tokens = self._tokenize(chosen, list(columns.values()))
        if split == "predict":
            return TokenDataset(tokens)
        if split == "train":
            content = f"sources of {self.source_column}, targets of {self.target_column}"
            self.findings.add(columns_line(content, self._guessed, table, columns.values()))
        target = columns["target_column"]
        references = chosen.data.select_columns([target])
        if target != "reference":
            references = references.rename_column(target, "reference")
        return TokenDataset(tokens, texts=references)

    def _tokenize(self, table: Table, columns: list[str]) -> Any:
        tokenizer, prefix = self.tokenizer, self.source_prefix
        most_source, most_target = self.max_source_length, self.max_target_length
        plain = {"truncation": True, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            source, *target = rows.values()
            ids = tokenizer([prefix + text for text in source], max_length=most_source, **plain)["input_ids"]
            tokens: dict[str, list[Any]] = {
                "input_ids": [np.asarray(row, np.int32) for row in ids],
                "length": [len(row) for row in ids],
            }
            if target:
                labels = tokenizer(text_target=target[0], max_length=most_target, **plain)["input_ids"]
                tokens["labels"] = [np.asarray(row, np.int32) for row in labels]
            return tokens

        key = {"tokenizer": tokenizer_state(tokenizer), "prefix": prefix, "lengths": [most_source, most_target]}
        tokens = tokenized(table, columns, encode, key)
        self.warn_of_truncated_rows(tokens, table, most_source)
        return tokens

    def collate(self) -> Collate:
        """Return the function that pads the sources and the targets of a batch."""
        return PadPairs(self.tokenizer)

    # -------------------------------------------------------------------------------------------------- prediction

    def complete_prediction(self, row: dict[str, Any], file: int) -> dict[str, Any]:
        """Return the document's id, its summary, and its reference; None if the file has no references."""
        source = self.predicted[file].data[row["index"]]
        name = source.get(self.id_column, row["index"])
        error = {"error": row["error"]} if "error" in row else {}
        adapter = {"adapter": row["adapter"]} if "adapter" in row else {}
        summary = {"summary": row.get("summary"), "reference": source.get(self.target_column or "")}
        return {"id": name, **adapter, **summary, **error}


def _check_guess(table: Table, key: str, column: str | None, names: Sequence[str]) -> None:
    """Check that a column was found.

    Raises:
        DataError: If no column has a usual name.
    """
    if column is None:
        raise DataError(
            f"data.{key}: no column of {table.where} has a name such as {', '.join(names[:3])}. Name one of its "
            f"columns: {', '.join(table.data.column_names)}."
        )
