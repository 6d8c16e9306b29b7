"""Summarization: texts with their summaries from XSum, CNN/DailyMail, or any two columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.base import Collate
from datamodules.contract import IGNORE_INDEX, DataKind
from datamodules.errors import DataError
from datamodules.sources.columns import SOURCES, TARGETS, named_column
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
        target_column: Column of the summaries. None takes the first of `summary`, `highlights`, `target` and
            similar names.
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
        self._guessed = False
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
            DataError: If no column has a usual name. Prediction needs no target.
        """
        predicts = self.predicts
        table = next(iter(self.tables_of_any_split().values()))
        columns = {"source_column": (self.source_column, SOURCES), "target_column": (self.target_column, TARGETS)}
        for key, (configured, names) in columns.items():
            unused = [name for name in names if name != self.source_column]
            column = configured or named_column(table, unused, last_word=True)
            if column is None and not (predicts and key == "target_column"):
                raise DataError(
                    f"data.{key}: no column of {table.where} has a name such as {', '.join(names[:3])}. Name one of "
                    f"its columns: {', '.join(table.data.column_names)}."
                )
            if key == "source_column":
                self.source_column = column
            else:
                self.target_column = column
        self._guessed = True
        if predicts and self.hparams["source_column"] is None:
            self.findings.add(f"columns: sources of {self.source_column} (guessed; data.source_column overrides)")
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
            guess = " (guessed; data.source_column and data.target_column override)" if self._guessed else ""
            self.findings.add(f"columns: sources of {self.source_column}, targets of {self.target_column}{guess}")
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
