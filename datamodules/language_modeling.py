"""Instructions and responses: Alpaca's columns, or chat messages."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import Collate
from datamodules.contract import IGNORE_INDEX, DataKind
from datamodules.errors import DataError
from datamodules.sources.columns import PROMPTS, RESPONSES, named_column
from datamodules.sources.tables import Table, check_texts
from datamodules.text import BadRow, TrainingTextData
from datamodules.tokens.conversations import (
    Columns,
    ConversationEncoder,
    alpaca_template,
    question,
    read_messages,
    response_end,
)
from datamodules.tokens.packing import PackedDataset, PadPacks, PadSequences
from datamodules.tokens.tokenizing import TokenDataset, lengths_of, tokenized, tokenizer_state

_log = logging.getLogger(__name__)
Template = Literal["alpaca", "chat"]
SHAREGPT = "conversations"  # column of messages that is taken where the usual ones are missing
LEAST = 16  # tokens of a conversation that is worth learning from


class LanguageModelingData(TrainingTextData):
    """Prompts and responses, tokenised once; the responses alone are learnt.

    Batches are `datamodules.contract.InstructionBatch`.

    Args:
        template: How a prompt is written: `alpaca`, or `chat` for the tokenizer's own chat template.
        messages_column: Column of conversations, lists of messages with `role` (system, user, assistant) and
            `content`, or `from` and `value` as ShareGPT has them; where a table has it, the next three do not count.
            A table without it and without instructions may have `conversations` instead.
        instruction_column: Column of the instructions; a table without it may have `prompt`, `question` or the like.
        input_column: Column of what they are about; a table may be without it.
        response_column: Column of the responses; a table without it may have `response`, `completion`, `answer` or the
            like.
        system_prompt: System message of conversations that have none; with `alpaca` it takes the introduction's place.
        end_mark: Text that some sets end their responses with; it is taken off, since the template has its own end.
        empty_responses: What rows without a response are: an `error`, or left out (`skip`).
        batch_size: Conversations (or packs) a step and process, at least 1.
        max_length: Most tokens of a conversation, or of a pack. Of longer ones the prompt loses its middle and then
            the response its end: it keeps half of the room, or all of itself.
        packing: Whether training puts several conversations into one sequence, which do not see each other.
        val_fraction: Share of the training rows held out when there is no validation split, in (0, 1).
        prompt: A message for `predict` to respond to, in place of a file.
        prediction_format: Format of what `predict` writes.
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
        self.read_as_written(instruction_column, input_column, response_column)
        self.template, self.max_length, self.packing = template, max_length, packing
        self.messages_column, self.instruction_column = messages_column, instruction_column
        self.input_column, self.response_column = input_column, response_column
        self.system_prompt, self.end_mark, self.empty_responses = system_prompt, end_mark, empty_responses
        self.prompt = prompt
        self.prediction_files = (f"predictions.{prediction_format}",)

    def before_splits(self) -> None:
        """Check that the model has positions for the length."""
        self.check_length("max_length", self.max_length)

    @property
    def prompt_template(self) -> str:
        """Return the Jinja template of whole conversations.

        Raises:
            DataError: If it is to be the tokenizer's, and that has none.
        """
        if self.template == "alpaca":
            return alpaca_template(self.tokenizer)
        own = self.tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own  # some have more, for tools
        if not own:
            raise DataError(
                "data.template: the backbone's tokenizer has no chat template of its own; use template: alpaca, or a "
                "backbone that was tuned for chat."
            )
        return str(own)

    @property
    def response_end(self) -> int:
        """Return the token that the template ends a response with."""
        return response_end(self.tokenizer, self.prompt_template)

    # ------------------------------------------------------------------------------------------------------ tokens

    def build(self, split: str, table: Table, rows: Tensor) -> TokenDataset:
        """Return the conversations of some rows of a table; for prediction, the prompts."""
        learnt = split != "predict"
        columns, table = self._columns(table, learnt)
        if not learnt:
            self._asked = columns
        self.add_notes(table)
        encoder = ConversationEncoder(self.tokenizer, self.prompt_template, self.max_length, self.response_end)
        rows = self._check_rows(split, table, rows, columns, encoder)
        tokens = self._tokenize(table.select(rows), columns, encoder, learnt)
        refused = self._refused(table, rows, tokens, columns, encoder, learnt)
        if refused:
            kept = self.without_bad(split, table, rows, refused)
            tokens = tokens.select([i for i, row in enumerate(rows.tolist()) if row not in refused])
            rows = kept
        self.warn_of_cut_rows(tokens, table, self.max_length)
        if split == "train":
            self.findings.add(f"columns: conversations of {', '.join(columns.names())}, template {self.template}")
        return TokenDataset(tokens)

    def _columns(self, table: Table, learnt: bool) -> tuple[Columns, Table]:
        """Return the columns to read, and the table with text in these columns."""
        names = table.data.column_names
        messages = self.messages_column if self.messages_column in names else None
        given = self.input_column
        if messages is None and self.instruction_column not in names and SHAREGPT in names:
            messages = SHAREGPT
            self.findings.add(f"the column {SHAREGPT} of {table.where} is read as messages")
        if messages is None:
            self._choose_columns(table, learnt)
            if self.instruction_column not in names:
                raise DataError(
                    f"data.instruction_column: {table.where} has neither a column {self.messages_column} of messages "
                    f"nor a column {self.instruction_column}; it has {', '.join(names)}."
                )
            if given is not None and (_is_empty(table, given) if given in names else given == "input"):
                given = None
            keys = {
                "instruction_column": self.instruction_column,
                "input_column": given,
                "response_column": self.response_column if learnt else None,
            }
            for key, column in keys.items():
                if column is not None:
                    table = check_texts(table, key, column)
        columns = Columns(
            messages=messages,
            instruction=self.instruction_column,
            input=given,
            response=self.response_column if learnt else None,
            apart=self.template == "alpaca",
            system=self.system_prompt,
            end_mark=self.end_mark,
        )
        return columns, table

    def _choose_columns(self, table: Table, learnt: bool) -> None:
        """Choose columns of the usual names where those of the keys are missing."""
        names, chosen = table.data.column_names, {}
        keys = {"instruction_column": PROMPTS} | ({"response_column": RESPONSES} if learnt else {})
        for key, known in keys.items():
            column = self.hparams[key]
            if column in names or (found := named_column(table, [n for n in known if n != self.input_column])) is None:
                continue
            chosen[key] = found
            self.findings.add(f"the column {found} of {table.where} is read as data.{key}, since {column} is not there")
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
        """Return the rows that hold a conversation, without those that may be skipped.

        Raises:
            DataError: If more rows than may be skipped are no conversation, ask nothing, or have no response to learn.
        """
        bad: dict[int, BadRow] = {}
        silent, cleaned = set(), 0
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
            if reason := self._reason(messages, columns, learnt=split != "predict"):
                if reason.key == "empty_responses":
                    silent.add(number)
                else:
                    bad[number] = reason
            cleaned += messages != raw
        if silent:
            _log.warning(f"{len(silent):,} of {len(rows):,} rows of {table.where} have no response and are left out.")
            rows = rows[[row not in silent for row in rows.tolist()]]
        if len(rows) == 0:
            raise DataError(f"data.path: {table.where} has no row with a response.")
        if cleaned:
            _log.warning(f"{cleaned:,} rows of {table.where} hold special tokens of the tokenizer, which are removed.")
        return self.without_bad(split, table, rows, bad)

    def _reason(self, messages: list[dict[str, str]], columns: Columns, learnt: bool) -> BadRow | None:
        """Return the reason why a conversation cannot be used, or None."""
        key = "messages_column" if columns.messages else "response_column"
        asked = [m for m in (messages if learnt else question(messages)) if m["role"] == "user"]
        if not learnt and not asked:
            return BadRow("messages_column", "has no message of a user to respond to")
        if any(not m["content"].strip() and not m.get("input") for m in asked):
            return BadRow(
                "messages_column" if columns.messages else "instruction_column", "has an empty message of a user"
            )
        responses = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        if not learnt or (responses and all(responses)):
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
        learnt: bool,
    ) -> dict[int, BadRow]:
        """Return the rows that the template refused, which have no tokens, with its reason."""
        empty = lengths_of(tokens) == 0
        if not empty.any():
            return {}
        refused = {}
        numbers = rows[empty]
        for number, row in zip(numbers.tolist(), _rows(table.select(numbers), columns.names()), strict=True):
            try:
                _encoded(encoder, columns, row, learnt)
            except DataError as error:
                key, _, reason = str(error).removeprefix("data.").partition(": ")
                refused[number] = BadRow(key, f"cannot be encoded: {reason.rstrip('.')}")
            else:
                refused[number] = BadRow("template", "becomes no text in the template")
        return refused

    def _tokenize(self, table: Table, columns: Columns, encoder: ConversationEncoder, learnt: bool) -> datasets.Dataset:
        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            made = []
            for row in _by_row(batch):
                try:
                    made.append(_encoded(encoder, columns, row, learnt))
                except DataError:  # `_refused` finds the rows without tokens, in the cache too
                    made.append(([], []))
            lists = [tuple(np.asarray(part) for part in parts) for parts in made]
            encoded: dict[str, list[Any]] = {
                "input_ids": [ids.astype(np.int32) for ids, _ in lists],
                "labels": [np.where(mask, ids, IGNORE_INDEX).astype(np.int32) for ids, mask in lists],
                "length": [len(ids) for ids, _ in lists],
            }
            return encoded if learnt else {name: encoded[name] for name in ("input_ids", "length")}

        key = {
            "task": "conversations" if learnt else "prompts of conversations",
            "tokenizer": tokenizer_state(encoder.tokenizer),
            "template": encoder.template,
            "columns": repr(columns),
            "length": self.max_length,
        }
        return tokenized(table, columns.names(), encode, key)

    # ----------------------------------------------------------------------------------------------------- batches

    def collate(self) -> Collate:
        """Return the function that pads conversations at the right."""
        return PadSequences(self.tokenizer.pad_token_id)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader that shuffles batches of like length, packed or not."""
        if not self.packing:
            return super().train_dataloader()
        rows = self.splits["train"][0]
        packed = PackedDataset(rows, self.max_length)
        if len(packed) < self.batch_size * self.world()[0]:
            raise DataError(
                f"data.packing: {len(rows)} conversations fill {len(packed)} packs of {self.max_length} tokens, fewer "
                f"than one batch of {self.batch_size} × {self.world()[0]} processes; choose a smaller batch."
            )
        lengths = packed.lengths if self.bucket_by_length else None
        collate = self.collated("train", rows, PadPacks(self.tokenizer.pad_token_id))
        return self.train_loader(packed, lengths, collate)

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader of prompts in batches of like length, padded at the left."""
        data = self.splits["predict"][0]
        lengths = data.lengths if self.bucket_by_length else None
        return [self.evaluation_loader(data, lengths, PadSequences(self.tokenizer.pad_token_id, "left"))]

    # -------------------------------------------------------------------------------------------------- prediction

    def complete_prediction(self, row: dict[str, Any], file: int) -> dict[str, Any]:
        """Return the columns of the prompt with the response; a response in the file becomes the reference."""
        source = dict(self.predicted[file].data[row["index"]])
        column = self._asked.messages
        if row.get("error"):
            reference = None
            source.pop(self.response_column, None)
        elif column:
            messages = read_messages(source[column])
            source[column] = source[column][: len(question(messages))]
            reference = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        else:
            reference = source.pop(self.response_column, None)
        if isinstance(reference, str):
            reference = self._asked.without_mark(reference)
        made = {"response": row.get("response"), **({"reference": reference} if reference else {})}
        made |= {"error": row["error"]} if "error" in row else {}
        plain: dict[str, Any] = json.loads(json.dumps(source, default=str))  # a date, say, as text
        return {"index": row["index"], **{k: v for k, v in plain.items() if k not in ("index", *made)}, **made}


def _encoded(
    encoder: ConversationEncoder, columns: Columns, row: dict[str, Any], learnt: bool
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a row, or of the prompt to predict, and which of them are learnt."""
    messages = columns.conversation(row)
    if learnt:
        return encoder.conversation(messages)
    prompt = encoder.prompt(question(messages))
    return prompt, [False] * len(prompt)


def _is_empty(table: Table, column: str) -> bool:
    """Return True if no row has a value; the libraries that read text then take the column for one of another type."""
    rows = table.data.select_columns(column).with_format("arrow").iter(batch_size=10_000)
    return all(batch[column].null_count == len(batch) for batch in rows)


def _rows(table: Table, names: list[str]) -> Iterator[dict[str, Any]]:
    for batch in table.data.select_columns(names).iter(batch_size=1000):
        yield from _by_row(batch)


def _by_row(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
