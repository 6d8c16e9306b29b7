"""Multiple-choice questions: prompts, their tokens after a shared prefix, and batches of one subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase as LETTERS
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler

from datamodules.tokens.tokenizing import TokenDataset

UNKNOWN = "unknown"  # Subject of tables without subjects.
CHUNK = 256  # Prompts that are tokenised together. The tokenizer's records need far more memory than the tokens.
PLAIN = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Args:
        text: The question.
        choices: The choices.
        answer: Index of the right choice; None if unknown.
    """

    text: str
    choices: tuple[str, ...]
    answer: int | None

    def prompt(self) -> str:
        """Return the question with its choices, up to the answer."""
        lines = [self.text, *(f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=False))]
        return "\n".join([*lines, "Answer:"])

    def shot(self) -> str:
        """Return the question with its answer, as a shot."""
        assert self.answer is not None
        return f"{self.prompt()} {LETTERS[self.answer]}\n\n"


def header(subject: str) -> str:
    """Return the first line of all prompts of a subject (Hendrycks et al. 2021)."""
    about = "" if subject == UNKNOWN else f" about {subject.replace('_', ' ')}"
    return f"The following are multiple choice questions (with answers){about}.\n\n"


@dataclass(frozen=True)
class SharedPrompts:
    """Prompts, split into their common prefix and the rest of each prompt.

    Args:
        prefix: Tokens with which all prompts begin, (prefix tokens,).
        rests: Remaining tokens of each prompt, one or more.
    """

    prefix: Tokens
    rests: list[Tokens]

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest prompt."""
        return len(self.prefix) + max(len(rest) for rest in self.rests)

    def without_prefix(self) -> SharedPrompts:
        """Return the same prompts with an empty prefix, for questions that do not share keys and values."""
        return SharedPrompts(self.prefix[:0], [np.concatenate([self.prefix, rest]) for rest in self.rests])


def shared_prompts(prompts: Sequence[str], tokenizer: Any) -> SharedPrompts:
    """Tokenise whole prompts, and split them after their longest common prefix. Each prompt keeps at least one token.

    The tokens of at most 256 whole prompts are in memory at a time.
    """
    first: Tokens | None = None
    common, tails = [], []  # Number of tokens shared with the first prompt, and the other tokens.
    for i in range(0, len(prompts), CHUNK):
        for ids in tokenizer(list(prompts[i : i + CHUNK]), **PLAIN)["input_ids"]:
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


class QuestionDataset(TokenDataset):
    """Questions as tokens after the prefix of their subject, ordered by subject, the longest question first.

    Args:
        subjects: Names of the subjects, in the order of the questions.
        prompts: Prompts of each subject.
        rows: For each subject, the table rows of its prompts.
        answers: Index of the right choice by row, -1 if unknown.
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
        """Collate questions of one subject into a `QuestionBatch`."""
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
    """Group neighbouring questions of one subject into batches of at most `batch_size`.

    Args:
        sampler: Order of the questions.
        batch_size: Largest number of questions in a batch.
        drop_last: Ignored, since every question is asked. Lightning passes this argument in prediction.
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
        """Return the number of batches."""
        return sum(1 for _ in self)


def answer_index(answer: Any, size: int) -> int | None:
    """Return the index of an answer, which is an index or a letter; None for other content.

    Args:
        answer: Content of the cell.
        size: Number of choices.
    """
    if isinstance(answer, str) and len(letter := answer.strip()) == 1 and letter in LETTERS[:size]:
        return LETTERS.index(letter)
    return answer if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < size else None
