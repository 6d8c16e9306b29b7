"""Multiple choice in MMLU's format: prompts with a few shots, batched by subject over the tokens that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase as LETTERS
from typing import Any

import datasets
import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset

from datamodules.errors import DataError
from datamodules.splits import choose_rows
from datamodules.tables import Table, check_column, open_table
from datamodules.text import TextData
from datamodules.tokens import TokenDataset, check_texts

UNKNOWN = "unknown"  # subject of tables that name none
HIDDEN = (None, -1, "")  # answers of which prediction can do without
CHUNK = 256  # prompts that are tokenised together: the tokenizer's own records take far more memory than the tokens
Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Args:
        text: The question.
        choices: What to choose from.
        answer: Index of the right choice; None if it is not known.
    """

    text: str
    choices: tuple[str, ...]
    answer: int | None

    def prompt(self) -> str:
        """The question as it is asked, up to the answer."""
        lines = [self.text, *(f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=False))]
        return "\n".join([*lines, "Answer:"])

    def shot(self) -> str:
        """The question as an example."""
        assert self.answer is not None
        return f"{self.prompt()} {LETTERS[self.answer]}\n\n"


def header(subject: str) -> str:
    """The first words of all prompts of a subject (Hendrycks et al. 2021)."""
    about = "" if subject == UNKNOWN else f" about {subject.replace('_', ' ')}"
    return f"The following are multiple choice questions (with answers){about}.\n\n"


@dataclass(frozen=True)
class SharedPrompts:
    """Prompts as what they all begin with, and what follows in each.

    Args:
        prefix: Tokens that all prompts share, (P,).
        rests: The others, one or more for each prompt.
    """

    prefix: Tokens
    rests: list[Tokens]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.prefix) + max(len(rest) for rest in self.rests)


def shared_prompts(prompts: Sequence[str], tokenizer: Any) -> SharedPrompts:
    """Tokenise whole prompts and part them behind their longest common prefix, which leaves a token of each at least.

    No more than 256 prompts are there as a whole at a time.
    """
    first: Tokens | None = None
    common, tails = [], []  # with the first prompt; and what is behind that
    for i in range(0, len(prompts), CHUNK):
        for ids in tokenizer(list(prompts[i : i + CHUNK]), **_PLAIN)["input_ids"]:
            tokens: Tokens = np.asarray(ids, np.int32)
            first = tokens if first is None else first
            size = min(len(first), len(tokens))
            differ = first[:size] != tokens[:size]
            common.append(int(differ.argmax()) if differ.any() else size)
            tails.append(tokens[common[-1] :].copy())
    assert first is not None
    start = min(min(n, n + len(tail) - 1) for n, tail in zip(common, tails, strict=True))
    rests = [np.concatenate([first[start:n], tail]) for n, tail in zip(common, tails, strict=True)]
    return SharedPrompts(first[:start].copy(), rests)


_PLAIN = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}


class QuestionDataset(TokenDataset):
    """Questions as tokens behind the prefix of their subject, a subject's together and its longest first.

    Args:
        subjects: Names of the subjects, in the order of the questions.
        prompts: Their prompts.
        rows: Row in the table of each prompt of each subject.
        answers: Index of the right choice by row, -1 if it is not known.
        choices: Tokens of the letters, (n_choices,) int64.
    """

    def __init__(
        self,
        subjects: list[str],
        prompts: list[SharedPrompts],
        rows: list[list[int]],
        answers: dict[int, int],
        choices: Tensor,
    ) -> None:
        self.subjects, self.choices = subjects, choices
        self.prefixes = [torch.from_numpy(p.prefix).long() for p in prompts]
        ordered = [
            (group, rows[group][i], shared.rests[i])
            for group, shared in enumerate(prompts)
            for i in sorted(range(len(shared.rests)), key=lambda i, rests=shared.rests: -len(rests[i]))  # type: ignore[misc]
        ]
        tokens = [rest for _, _, rest in ordered]
        data = datasets.Dataset.from_dict({"input_ids": tokens, "length": [len(rest) for rest in tokens]})
        self.groups = [group for group, _, _ in ordered]
        targets = {
            "group": torch.tensor(self.groups),
            "row": torch.tensor([row for _, row, _ in ordered]),
            "answer": torch.tensor([answers[row] for _, row, _ in ordered]),
        }
        super().__init__(data, targets)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of one subject; see `MMLUData`."""
        group = rows[0]["group"]
        tokens = [torch.tensor(row["input_ids"]) for row in rows]
        return {
            "prefix": self.prefixes[group],
            "input_ids": pad_sequence(tokens, batch_first=True),
            "lengths": torch.tensor([len(ids) for ids in tokens]),
            "choices": self.choices,
            "answers": torch.tensor([row["answer"] for row in rows]),
            "subject": self.subjects[group],
            "index": torch.tensor([row["row"] for row in rows]),
        }


class SubjectBatches(BatchSampler):
    """Neighbours of one subject, at most `batch_size` of them.

    Args:
        sampler: Order of the questions.
        batch_size: Most questions of a batch.
        drop_last: Of no effect, every question is asked; it is what Lightning sets in prediction.
        groups: Subject of each question.
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, groups: Sequence[int]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in self.sampler:
            if batch and (len(batch) == self.batch_size or self.groups[index] != self.groups[batch[0]]):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def __len__(self) -> int:
        """Number of batches."""
        return sum(1 for _ in self)


class MMLUData(TextData):
    """Questions with choices, asked in MMLU's format behind a few answered ones (Hendrycks et al. 2021).

    For validation, testing and prediction. Batches are of one subject, and the batches of a subject come together: dicts
    of `prefix` (P,), the tokens that all prompts of the subject begin with, `input_ids` (batch, tokens), what follows
    in each, padded at the right, `lengths` (batch,), `choices` (n_choices,), the letters' tokens, `answers` (batch,),
    -1 if unknown, and `index` (batch,), rows of the table, all int64; and `subject`, its name.

    Args:
        path: A data set's name on the hub, or a directory of validation.*, test.* and a split of shots as Parquet or
            JSONL.
        config: The data set's configuration: on the hub, or a folder in the directory.
        revision: Branch, tag or commit on the hub, such as `refs/convert/parquet`.
        shots_split: Split of the answered questions.
        shots: How many of them a prompt has: the first ones of its subject, 0 or more.
        question_column: Column of the questions.
        choices_column: Column of the lists of 2 to 26 choices, as many in each row.
        answer_column: Column of the answers: indices from 0, or letters.
        subject_column: Column of the subjects; if there is none, all questions are of one.
        batch_size: Questions a step and process, at least 1.
        num_workers: Processes that load, each; 0 loads in the main process, which is fast enough for tokens.
        max_length: Most tokens of a prompt; a subject with a longer one takes fewer shots. None for as many as the
            model has positions for.
        max_val_samples: Seeded sample of the validation rows, for trying out; None takes all.
        max_test_samples: The same for testing.
        subjects: Subjects to ask; None for all.
        predict_path: File of rows for `predict`, with answers or without; None takes the test split.
    """

    def __init__(
        self,
        path: str = "cais/mmlu",
        config: str | None = "all",
        revision: str | None = None,
        shots_split: str = "dev",
        shots: int = 5,
        question_column: str = "question",
        choices_column: str = "choices",
        answer_column: str = "answer",
        subject_column: str | None = "subject",
        batch_size: int = 8,
        num_workers: int = 0,
        max_length: int | None = None,
        max_val_samples: int | None = None,
        max_test_samples: int | None = None,
        subjects: list[str] | None = None,
        predict_path: str | None = None,
    ) -> None:
        super().__init__(
            path=path,
            config=config,
            revision=revision,
            batch_size=batch_size,
            num_workers=num_workers,
            bucket_by_length=True,
            val_fraction=0.1,  # of no effect: there is no training split to hold some out from
            val_seed=0,
            limits={"val": max_val_samples, "test": max_test_samples},
            predict_path=predict_path,
        )
        self.save_hyperparameters()
        if shots < 0:
            raise DataError(f"data.shots: {shots} must not be negative.")
        if max_length is not None and max_length < 1:
            raise DataError(f"data.max_length: {max_length} must be 1 or more, or null for the model's limit.")
        self.shots_split, self.shots, self.max_length, self.subjects = shots_split, shots, max_length, subjects
        self.question_column, self.choices_column = question_column, choices_column
        self.answer_column, self.subject_column = answer_column, subject_column
