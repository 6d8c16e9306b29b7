"""Instruction tuning: instructions with responses in Alpaca's columns, or chat messages."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import Collate
from datamodules.contract import IGNORE_INDEX, DataKind
from datamodules.errors import DataError, counted
from datamodules.sources.columns import PROMPTS, RESPONSES, check_one, columns_line, named_column, named_columns
from datamodules.sources.tables import Table, check_texts, similar_column
from datamodules.text import BadRow, TrainingTextData
from datamodules.tokens.conversations import (
    Columns,
    ConversationEncoder,
    alpaca_template,
    prompt_messages,
    read_messages,
    response_end,
)
from datamodules.tokens.packing import PackedDataset, PadPacks, PadSequences
from datamodules.tokens.tokenizing import TokenDataset, lengths_of, tokenized, tokenizer_state

_log = logging.getLogger(__name__)
Template = Literal["alpaca", "chat"]
SHAREGPT = "conversations"  # Column of messages, read if the table lacks the configured columns.
LEAST = 16  # Smallest max_length: shorter conversations teach nothing.


class LanguageModelingData(TrainingTextData):
    """Conversations of prompts and responses, tokenised once. Only responses have a loss.

    Batches are `datamodules.contract.InstructionBatch`.

    Args:
        template: Format of prompts: `alpaca`, or `chat` for the tokenizer's own chat template.
        messages_column: Column of conversations: lists of messages with `role` (system, user, assistant) and
            `content`, or with ShareGPT's `from` and `value`. If a table has this column, the next three columns are
            ignored. A table without this column and without instructions may have a column `conversations` instead.
        instruction_column: Column of the instructions. If a table lacks the default column, `prompt`, `question` or
            a similar column is read.
        input_column: Column of the text that an instruction is about, or None. A table may lack the default column.
        response_column: Column of the responses. If a table lacks the default column, its only column with a name such
            as `response`, `completion` or `answer` is read.
        system_prompt: System message for conversations without one. With `alpaca`, the message replaces the
            introduction.
        end_mark: Text to remove from the end of responses, as in some data sets. The template adds another end.
        empty_responses: Treatment of rows without a response: `error`, or `skip` to leave the rows out.
        batch_size: Conversations (or packs) in a batch of one process, at least 1.
        max_length: Largest number of tokens of a conversation, or of a pack. A longer conversation loses the middle of
            its prompt, and then the end of its response. The first response keeps half of `max_length`, or
            all its tokens if fewer.
        packing: If true, training packs several conversations into one sequence. Packed conversations do not attend to
            each other.
        val_fraction: Share of the training rows held out when there is no validation split, in (0, 1).
        prompt: A message to which `predict` responds, instead of the rows of a file.
        prediction_format: Format of the file of predictions.
    """

    kind = DataKind.INSTRUCTIONS

    def __init__(
        self,
        path: str = "tatsu-lab/alpaca",
        template: Template = "alpaca",
        messages_column: str = "messages",
        instruction_column: str = "instruction",
        input_column: str | None = "input",
        response_column: str = "output",
        system_prompt: str | None = None,
        end_mark: str | None = "<|endoftext|>",
        empty_responses: Literal["error", "skip"] = "error",
        batch_size: int = 8,
        max_length: int = 512,
        packing: bool = False,
        val_fraction: float = 0.05,
        prompt: str | None = None,
        prediction_format: Literal["csv", "jsonl"] = "csv",
        **kwargs: Any,
    ) -> None:
        super().__init__(path, batch_size=batch_size, val_fraction=val_fraction, **kwargs)
        if max_length < LEAST:
            raise DataError(f"data.max_length: {max_length} must be {LEAST} or more.")
        self.read_as_text(instruction_column, input_column, response_column)
        self.template, self.max_length, self.packing = template, max_length, packing
        self.messages_column, self.instruction_column = messages_column, instruction_column
        self.input_column, self.response_column = input_column, response_column
        self.system_prompt, self.end_mark, self.empty_responses = system_prompt, end_mark, empty_responses
        self.prompt = prompt
        self.prediction_files = (f"predictions.{prediction_format}",)

    @classmethod
    def check_paths(cls, command: str, keys: Mapping[str, Any]) -> None:
        """Check the path that a command reads. With `prompt`, prediction reads no file.

        Raises:
            DataError: If the path is wrong.
        """
        if command != "predict" or keys["prompt"] is None:
            super().check_paths(command, keys)

    def before_splits(self) -> None:
        """Check that the model has positions for `max_length` tokens."""
        self.check_length("max_length", self.max_length)

    @property
    def prompt_template(self) -> str:
        """Return the Jinja template of whole conversations.

        Raises:
            DataError: If `template` is `chat`, and the tokenizer has no chat template.
        """
        if self.template == "alpaca":
            return alpaca_template(self.tokenizer)
        template = self.tokenizer.chat_template
        # A dict has several templates, such as a template for tools.
        template = template.get("default") if isinstance(template, dict) else template
        if not template:
            raise DataError(
                "data.template: the backbone's tokenizer has no chat template. Use template: alpaca, or a "
                "backbone that was tuned for chat."
            )
        return str(template)

    @property
    def response_end(self) -> int:
        """Return the token with which the template ends a response."""
        return response_end(self.tokenizer, self.prompt_template)

    # ------------------------------------------------------------------------------------------------------ tokens

    def build(self, split: str, table: Table, rows: Tensor) -> TokenDataset:
        """Return the conversations of some rows of a table, or their prompts for prediction."""
        with_responses = split != "predict"
        columns, table = self._columns(table, with_responses)
        if not with_responses:
            self._prompt_columns = columns
        self.add_notes(table)
        encoder = ConversationEncoder(self.tokenizer, self.prompt_template, self.max_length, self.response_end)
        rows = self._check_rows(split, table, rows, columns, encoder)
        tokens = self._tokenize(table.select(rows), columns, encoder, with_responses)
        refused = self._refused(table, rows, tokens, columns, encoder, with_responses)
        if refused:
            usable = self.drop_bad_rows(split, table, rows, refused)
            tokens = tokens.select([i for i, row in enumerate(rows.tolist()) if row not in refused])
            rows = usable
        self.warn_of_truncated_rows(tokens, table, self.max_length)
        if split == "train":
            content = f"conversations of {', '.join(columns.names())}, template {self.template}"
            self.findings.add(columns_line(content, [], table, columns.names()))
        return TokenDataset(tokens)

    def _columns(self, table: Table, with_responses: bool) -> tuple[Columns, Table]:
        """Return the columns to read, and the table with these columns as text."""
        names = table.data.column_names
        messages = self.messages_column if self.messages_column in names else None
        input_column = self.input_column
        if messages is None and self.instruction_column not in names and SHAREGPT in names:
            messages = SHAREGPT
            self.findings.add(f"the column {SHAREGPT} of {table.where} is read as messages")
        if messages is None:
            self._choose_columns(table, with_responses)
            if self.instruction_column not in names:
                raise DataError(
                    f"data.instruction_column: {table.where} has no column {self.instruction_column} with prompts, and "
                    f"no column {self.messages_column} with chats (data.messages_column). Name one of its columns: "
                    f"{', '.join(names)}.{similar_column(self.instruction_column, names)}"
                )
            if input_column is not None and (
                _is_empty(table, input_column) if input_column in names else input_column == "input"
            ):
                input_column = None
            keys = {
                "instruction_column": self.instruction_column,
                "input_column": input_column,
                "response_column": self.response_column if with_responses else None,
            }
            for key, column in keys.items():
                if column is not None:
                    table = check_texts(table, key, column)
        columns = Columns(
            messages=messages,
            instruction=self.instruction_column,
            input=input_column,
            response=self.response_column if with_responses else None,
            input_section=self.template == "alpaca",
            system=self.system_prompt,
            end_mark=self.end_mark,
        )
        return columns, table

    def _choose_columns(self, table: Table, with_responses: bool) -> None:
        """Choose columns with the usual names if the table lacks the default columns.

        Raises:
            DataError: If several columns may hold the responses.
        """
        names, chosen = table.data.column_names, {}
        prompt = named_column(table, PROMPTS, [self.input_column], last_word=True)
        usual = {"instruction_column": ("instruction", [] if prompt is None else [prompt])}
        if with_responses:
            responses = named_columns(table, RESPONSES, [self.input_column], last_word=True)
            usual["response_column"] = ("output", responses)
        for key, (default, columns) in usual.items():
            if self.hparams[key] != default or default in names or not columns:
                continue
            check_one(table, key, columns, "responses")
            chosen[key] = columns[0]
            self.findings.add(
                f"data.{key}: the column {columns[0]} of {table.where} is read, since there is no column {default}"
            )
        self.instruction_column = chosen.get("instruction_column", self.instruction_column)
        self.response_column = chosen.get("response_column", self.response_column)

    def _tables_to_predict(self) -> dict[str, Table]:
        """Return the rows to predict: the prompt, or a file, or the test split."""
        if self.prompt is None:
            return super()._tables_to_predict()
        return {"": Table(datasets.Dataset.from_dict({self.instruction_column: [self.prompt]}), "data.prompt")}

    def _check_rows(
        self, split: str, table: Table, rows: Tensor, columns: Columns, encoder: ConversationEncoder
    ) -> Tensor:
        """Return the rows that hold a conversation, without the rows that `empty_responses: skip` leaves out.

        Raises:
            DataError: If too many rows hold no conversation, no question or no response, or if no row has a response.
        """
        bad: dict[int, BadRow] = {}
        unanswered, cleaned = set(), 0
        for number, row in zip(rows.tolist(), _rows(table.select(rows), columns.names()), strict=True):
            if not columns.messages and row[columns.instruction] is None:
                bad[number] = BadRow("instruction_column", f"has no text in column {columns.instruction}")
                continue
            try:
                raw = columns.conversation(row)
            except DataError as error:
                bad[number] = BadRow("messages_column", f"holds no conversation in column {columns.messages}: {error}")
                continue
            messages = encoder.clean(raw)
            if reason := self._reason(messages, columns, with_responses=split != "predict"):
                if reason.key == "empty_responses":
                    unanswered.add(number)
                else:
                    bad[number] = reason
            cleaned += messages != raw
        if unanswered:
            _log.warning(
                f"left out of {table.where}: {len(unanswered):,} of {counted(len(rows), 'row')}, without a response."
            )
            rows = rows[[row not in unanswered for row in rows.tolist()]]
        if len(rows) == 0:
            raise DataError(f"data.path: {table.where} has no row with a response. Give rows with responses.")
        if cleaned:
            _log.warning(
                f"Special tokens of the tokenizer are removed from {counted(cleaned, 'row')} of {table.where}."
            )
        return self.drop_bad_rows(split, table, rows, bad)

    def _reason(self, messages: list[dict[str, str]], columns: Columns, with_responses: bool) -> BadRow | None:
        """Return why a conversation cannot be used; None if it can be used."""
        key = "messages_column" if columns.messages else "response_column"
        user_messages = [m for m in (messages if with_responses else prompt_messages(messages)) if m["role"] == "user"]
        if not with_responses and not user_messages:
            return BadRow("messages_column", "has no message of a user to respond to")
        if any(not m["content"].strip() and not m.get("input") for m in user_messages):
            return BadRow(
                "messages_column" if columns.messages else "instruction_column", "has an empty message of a user"
            )
        responses = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        if not with_responses or (responses and all(responses)):
            return None
        if self.empty_responses == "skip":
            return BadRow("empty_responses", "no response")
        return BadRow(
            key, "has no response to learn, or an empty one (leave such rows out with --data.empty_responses skip)"
        )

    def _refused(
        self,
        table: Table,
        rows: Tensor,
        tokens: datasets.Dataset,
        columns: Columns,
        encoder: ConversationEncoder,
        with_responses: bool,
    ) -> dict[int, BadRow]:
        """Return the rows that could not be encoded, with the reason. These rows have no tokens."""
        empty = lengths_of(tokens) == 0
        if not empty.any():
            return {}
        refused = {}
        numbers = rows[empty]
        for number, row in zip(numbers.tolist(), _rows(table.select(numbers), columns.names()), strict=True):
            try:
                _encoded(encoder, columns, row, with_responses)
            except DataError as error:
                key, _, reason = str(error).removeprefix("data.").partition(": ")
                refused[number] = BadRow(key, f"cannot be encoded: {reason.rstrip('.')}")
            else:
                refused[number] = BadRow("template", "is empty after the template")
        return refused

    def _tokenize(
        self, table: Table, columns: Columns, encoder: ConversationEncoder, with_responses: bool
    ) -> datasets.Dataset:
        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            conversations = []
            for row in _by_row(batch):
                try:
                    conversations.append(_encoded(encoder, columns, row, with_responses))
                except DataError:  # `_refused` finds rows without tokens, also if the tokens are from the cache.
                    conversations.append(([], []))
            lists = [tuple(np.asarray(part) for part in parts) for parts in conversations]
            encoded: dict[str, list[Any]] = {
                "input_ids": [ids.astype(np.int32) for ids, _ in lists],
                "labels": [np.where(mask, ids, IGNORE_INDEX).astype(np.int32) for ids, mask in lists],
                "length": [len(ids) for ids, _ in lists],
            }
            return encoded if with_responses else {name: encoded[name] for name in ("input_ids", "length")}

        key = {
            "task": "conversations" if with_responses else "prompts of conversations",
            "tokenizer": tokenizer_state(encoder.tokenizer),
            "template": encoder.template,
            "columns": repr(columns),
            "length": self.max_length,
        }
        return tokenized(table, columns.names(), encode, key)

    # ----------------------------------------------------------------------------------------------------- batches

    def collate(self) -> Collate:
        """Return the function that makes batches for training, padded at the right."""
        return PadSequences(self.tokenizer.pad_token_id)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training conversations, shuffled, in batches of similar length if `bucket_by_length` is set.

        Raises:
            DataError: If the conversations fill too few packs for a batch.
        """
        if not self.packing:
            return super().train_dataloader()
        rows = self.splits["train"][0]
        packed = PackedDataset(rows, self.max_length)
        if len(packed) < self.batch_size * self.world()[0]:
            raise DataError(
                f"data.packing: {counted(len(rows), 'conversation')} in {counted(len(packed), 'pack')} of "
                f"{self.max_length} tokens cannot fill one batch of {self.batch_size} for "
                f"{counted(self.world()[0], 'process')}. Choose a smaller batch size."
            )
        lengths = packed.lengths if self.bucket_by_length else None
        collate = self.collated("train", rows, PadPacks(self.tokenizer.pad_token_id))
        return self.train_loader(packed, lengths, collate)

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the prompts, padded at the left, in batches of similar length if `bucket_by_length` is set."""
        data = self.splits["predict"][0]
        lengths = data.lengths if self.bucket_by_length else None
        return [self.evaluation_loader(data, lengths, PadSequences(self.tokenizer.pad_token_id, "left"))]

    # -------------------------------------------------------------------------------------------------- prediction

    def complete_prediction(self, row: dict[str, Any], file: int) -> dict[str, Any]:
        """Return the row's index and columns, the response, and the file's response as `reference`."""
        source = dict(self.predicted[file].data[row["index"]])
        column = self._prompt_columns.messages
        if row.get("error"):
            reference = None
            source.pop(self.response_column, None)
        elif column:
            messages = read_messages(source[column])
            source[column] = source[column][: len(prompt_messages(messages))]
            reference = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        else:
            reference = source.pop(self.response_column, None)
        if isinstance(reference, str):
            reference = self._prompt_columns.without_mark(reference)
        answer = {"response": row.get("response"), **({"reference": reference} if reference else {})}
        answer |= {key: row[key] for key in ("adapter", "error") if key in row}
        plain: dict[str, Any] = json.loads(json.dumps(source, default=str))  # Other types, such as dates, become text.
        return {"index": row["index"], **{k: v for k, v in plain.items() if k not in ("index", *answer)}, **answer}


def _encoded(
    encoder: ConversationEncoder, columns: Columns, row: dict[str, Any], with_responses: bool
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a row, and a mask of the tokens with loss; in prediction, the tokens of the prompt."""
    messages = columns.conversation(row)
    if with_responses:
        return encoder.conversation(messages)
    prompt = encoder.prompt(prompt_messages(messages))
    return prompt, [False] * len(prompt)


def _is_empty(table: Table, column: str) -> bool:
    """Return True if no row has a value. Readers of text files give such a column another type than text."""
    rows = table.data.select_columns(column).with_format("arrow").iter(batch_size=10_000)
    return all(batch[column].null_count == len(batch) for batch in rows)


def _rows(table: Table, names: list[str]) -> Iterator[dict[str, Any]]:
    for batch in table.data.select_columns(names).iter(batch_size=1000):
        yield from _by_row(batch)


def _by_row(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
