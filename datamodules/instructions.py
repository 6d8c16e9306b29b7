"""Instructions and responses: Alpaca's columns, or chat messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import Collate
from datamodules.conversations import ROLES, ConversationEncoder, Message, alpaca_template, special_texts
from datamodules.errors import DataError
from datamodules.packing import IGNORED, PackedDataset, PadPacks, PadSequences
from datamodules.tables import Table
from datamodules.text import TextData
from datamodules.tokens import TokenDataset, check_texts, tokenized, tokenizer_state

Template = Literal["alpaca", "chat"]
LEAST = 16  # tokens of a conversation that is worth learning from


@dataclass(frozen=True)
class Columns:
    """Makes conversations of rows.

    Args:
        messages: Column of whole conversations, or None for the others.
        instruction: Column of what is asked.
        input: Column of what the instruction is about, or None.
        response: Column of the answers, or None if they are not to be learnt.
        apart: Whether the template has a place of its own for the input; otherwise it follows the instruction.
        system: What a conversation begins with that has no system message.
        end_mark: Text that ends responses and does not belong to them.
    """

    messages: str | None
    instruction: str
    input: str | None
    response: str | None
    apart: bool
    system: str | None
    end_mark: str | None

    def names(self) -> list[str]:
        """The columns that are read."""
        names = [self.messages] if self.messages else [self.instruction, self.input, self.response]
        return [name for name in names if name is not None]

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        """The messages of a row, responses among them or not."""
        if self.messages:
            messages = [{"role": m["role"], "content": m["content"] or ""} for m in row[self.messages]]
        else:
            asked, given = row[self.instruction], (row[self.input] or "") if self.input else ""
            user = {"content": asked, "input": given} if self.apart else {"content": f"{asked}\n\n{given}".rstrip()}
            messages = [{"role": "user", **user}]
            if self.response:
                messages.append({"role": "assistant", "content": row[self.response] or ""})
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = self._without_mark(message["content"])
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def _without_mark(self, response: str) -> str:
        response = response.strip()
        return response.removesuffix(self.end_mark).rstrip() if self.end_mark else response


class InstructionData(TextData):
    """Prompts and responses, tokenised once; the responses alone are learnt.

    Batches are dicts of `input_ids` and `labels` (batch, tokens) int64, the labels -100 at prompts and padding, with
    `attention_mask` (batch, tokens), or packed with `position_ids` (batch, tokens); to predict, of `input_ids` and
    `attention_mask` padded at the left, and `index` (batch,).

    Args:
        path: A data set's name on the hub; a directory of train.*, validation.* and test.* as Parquet, CSV or
            JSONL; or one such file of training rows.
        config: The data set's configuration: on the hub, or a folder in the directory.
        revision: Branch, tag or commit on the hub.
        template: How a prompt is written: `alpaca`, or `chat` for the tokenizer's own chat template.
        messages_column: Column of conversations, lists of messages with `role` (system, user, assistant) and
            `content`; where a table has it, the next three do not count.
        instruction_column: Column of the instructions.
        input_column: Column of what they are about; a table may be without it.
        response_column: Column of the responses.
        system_prompt: System message of conversations that have none; with `alpaca` it takes the introduction's place.
        end_mark: Text that some sets end their responses with; it is taken off, since the template has its own end.
        empty_responses: What rows without a response are: an `error`, or left out (`skip`).
        batch_size: Conversations (or packs) a step and process, at least 1.
        num_workers: Processes that load, each; 0 loads in the training process, which is fast enough for tokens.
        max_length: Most tokens of a conversation, or of a pack. Of longer ones the prompt loses its middle and then
            the response its end: it keeps half of the room, or all of itself.
        packing: Whether training puts several conversations into one sequence, which do not see each other.
        bucket_by_length: Whether sequences of like length share a batch, which saves most of the padding.
        test_on_validation: Whether the validation split is tested on, and a share of the training rows is held out to
            validate on, for sets without a test split.
        val_fraction: Share of the training rows held out when there is no validation split, in (0, 1).
        val_seed: Seed of that share, apart from the run's seed.
        max_train_samples: Seeded sample of the training rows, for trying out; None takes all.
        max_val_samples: The same for validation.
        max_test_samples: The same for testing.
        predict_path: File of prompts for `predict`; None takes the test split.
    """

    def __init__(
        self,
        path: str = "tatsu-lab/alpaca",
        config: str | None = None,
        revision: str | None = None,
        template: Template = "alpaca",
        messages_column: str = "messages",
        instruction_column: str = "instruction",
        input_column: str | None = "input",
        response_column: str = "output",
        system_prompt: str | None = None,
        end_mark: str | None = "<|endoftext|>",
        empty_responses: Literal["error", "skip"] = "error",
        batch_size: int = 8,
        num_workers: int = 0,
        max_length: int = 512,
        packing: bool = False,
        bucket_by_length: bool = True,
        test_on_validation: bool = False,
        val_fraction: float = 0.05,
        val_seed: int = 0,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        max_test_samples: int | None = None,
        predict_path: str | None = None,
    ) -> None:
        super().__init__(
            path=path,
            config=config,
            revision=revision,
            batch_size=batch_size,
            num_workers=num_workers,
            bucket_by_length=bucket_by_length,
            val_fraction=val_fraction,
            val_seed=val_seed,
            limits={"train": max_train_samples, "val": max_val_samples, "test": max_test_samples},
            predict_path=predict_path,
        )
        self.save_hyperparameters()
        if max_length < LEAST:
            raise DataError(f"data.max_length: {max_length} must be {LEAST} or more.")
        self.template, self.max_length, self.packing = template, max_length, packing
        self.test_on_validation = test_on_validation
        self.messages_column, self.instruction_column = messages_column, instruction_column
        self.input_column, self.response_column = input_column, response_column
        self.system_prompt, self.end_mark, self.empty_responses = system_prompt, end_mark, empty_responses

    def before_splits(self) -> None:
        """See that the model has positions for the length."""
        self.check_length("max_length", self.max_length)

    @property
    def prompt_template(self) -> str:
        """The Jinja template of whole conversations.

        Raises:
            DataError: If it is to be the tokenizer's, and that has none.
        """
        if self.template == "alpaca":
            return alpaca_template(self.tokenizer)
        if not isinstance(self.tokenizer.chat_template, str):
            raise DataError(
                "data.template: the backbone's tokenizer has no chat template of its own; use template: alpaca, or a "
                "backbone that was tuned for chat."
            )
        return self.tokenizer.chat_template

    # ------------------------------------------------------------------------------------------------------ tokens

    def build(self, table: Table, rows: Tensor | None) -> TokenDataset:
        """Conversations of some rows of a table; prompts of all rows, for prediction."""
        columns = self._columns(table, learnt=rows is not None)
        chosen = table if rows is None else table.select(rows)
        kept = self._check_rows(chosen, columns, learnt=rows is not None)
        return TokenDataset(self._tokenize(chosen.select(kept), columns, learnt=rows is not None))

    def _columns(self, table: Table, learnt: bool) -> Columns:
        names = table.data.column_names
        whole = self.messages_column in names
        given = self.input_column
        if not whole:
            if self.instruction_column not in names:
                raise DataError(
                    f"data.instruction_column: {table.where} has neither a column {self.messages_column} of messages "
                    f"nor a column {self.instruction_column}; it has {', '.join(names)}."
                )
            check_texts(table, "instruction_column", self.instruction_column)
            given = None if given == "input" and given not in names else given
            for key, column in (("input_column", given), ("response_column", self.response_column if learnt else None)):
                if column is not None:
                    check_texts(table, key, column, empty=True)
        return Columns(
            messages=self.messages_column if whole else None,
            instruction=self.instruction_column,
            input=given,
            response=self.response_column if learnt else None,
            apart=self.template == "alpaca",
            system=self.system_prompt,
            end_mark=self.end_mark,
        )

    def _check_rows(self, table: Table, columns: Columns, learnt: bool) -> Tensor:
        """The rows that can be used.

        Raises:
            DataError: For the first row that is no conversation, or without a response.
        """
        special = special_texts(self.tokenizer)
        kept, cleaned = [], 0
        for number, row in enumerate(table.data.select_columns(columns.names())):
            if columns.messages:
                _check_messages(row[columns.messages], f"row {number} of {table.where}", self.messages_column)
            messages = columns.conversation(row)
            responses = [m["content"] for m in messages if m["role"] == "assistant"]
            if learnt and (not responses or not all(responses)):
                if self.empty_responses == "error":
                    raise DataError(
                        f"data.response_column: row {number} of {table.where} has no response to learn; mend or drop "
                        "such rows, or leave them out with --data.empty_responses skip."
                    )
                continue
            kept.append(number)
            cleaned += any(text in m["content"] + m.get("input", "") for m in messages for text in special)
        if not kept:
            raise DataError(f"data.path: {table.where} has no row with a response.")
        skipped = len(table) - len(kept)
        if skipped:
            self._say(f"{skipped:,} of {len(table):,} rows of {table.where} have no response and are left out.")
        if cleaned:
            self._say(f"{cleaned:,} rows of {table.where} hold special tokens of the tokenizer as text and lose them.")
        return torch.tensor(kept)

    def _say(self, text: str) -> None:
        assert self.trainer is not None
        if self.trainer.is_global_zero:
            Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)

    def _tokenize(self, table: Table, columns: Columns, learnt: bool) -> datasets.Dataset:
        tokenizer, template = self.tokenizer, self.prompt_template
        encoder = ConversationEncoder(tokenizer, template, self.max_length, tuple(special_texts(tokenizer)))

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows = [
                columns.conversation(dict(zip(batch, row, strict=True))) for row in zip(*batch.values(), strict=True)
            ]
            if not learnt:
                prompts = [np.asarray(encoder.prompt(_asked(row)), np.int32) for row in rows]
                return {"input_ids": prompts, "length": [len(prompt) for prompt in prompts]}
            made = [tuple(np.asarray(part) for part in encoder.conversation(row)) for row in rows]
            return {
                "input_ids": [ids.astype(np.int32) for ids, _ in made],
                "labels": [np.where(mask, ids, IGNORED).astype(np.int32) for ids, mask in made],
                "length": [len(ids) for ids, _ in made],
            }

        key = {
            "task": "instructions" if learnt else "prompts",
            "tokenizer": tokenizer_state(tokenizer),
            "template": template,
            "columns": repr(columns),
            "length": self.max_length,
        }
        tokens = tokenized(table, columns.names(), encode, key)
        self.say_cut(tokens, table, "length", self.max_length)
        return tokens

    # ----------------------------------------------------------------------------------------------------- batches

    def collate(self) -> Collate:
        """Batches to learn, padded at the right."""
        return PadSequences(self.tokenizer.pad_token_id)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, in batches of like length, packed or not."""
        if not self.packing:
            return super().train_dataloader()
        packed = PackedDataset(self.splits["train"][0], self.max_length)
        lengths = packed.lengths if self.bucket_by_length else None
        return self.train_loader(packed, lengths, PadPacks(self.tokenizer.pad_token_id))

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Prompts in batches of like length, padded at the left."""
        data = self.splits["predict"][0]
        lengths = data.lengths if self.bucket_by_length else None
        return [self.evaluation_loader(data, lengths, PadSequences(self.tokenizer.pad_token_id, "left"))]

    # -------------------------------------------------------------------------------------------------- prediction

    prediction_files = ("predictions.jsonl",)

    def complete_prediction(self, row: dict[str, Any], file: int) -> dict[str, Any]:
        """The prompt's columns as they were, and the response; what the file has for one becomes the reference."""
        source = dict(self.predicted[file].data[row["index"]])
        reference = source.pop(self.response_column, None)
        found = {"reference": reference} if reference else {}
        return {"index": row["index"], **source, "response": row["response"], **found}


def _asked(messages: list[Message]) -> list[Message]:
    """A conversation up to the last response, which is the one asked for."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _check_messages(messages: Any, where: str, column: str) -> None:
    """See that a conversation is one.

    Raises:
        DataError: With the row.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"data.messages_column: {column} of {where} is no list of messages.")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES or "content" not in message:
            raise DataError(
                f"data.messages_column: a message in {column} of {where} must have `role` ({', '.join(ROLES)}) and "
                f"`content`; it is {str(message)[:80]}."
            )
