"""Questions with choices: their words, their tokens behind what they share, and batches of one subject."""

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

UNKNOWN = "unknown"  # subject of tables that name none
CHUNK = 256  # prompts that are tokenised together: the tokenizer's own records take far more memory than the tokens
PLAIN = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
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
        """Return the question as it is asked, up to the answer."""
        lines = [self.text, *(f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=False))]
        return "\n".join([*lines, "Answer:"])

    def shot(self) -> str:
        """Return the question as an example."""
        assert self.answer is not None
        return f"{self.prompt()} {LETTERS[self.answer]}\n\n"


def header(subject: str) -> str:
    """Return the first words of all prompts of a subject (Hendrycks et al. 2021)."""
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
        """Return the tokens of the longest prompt."""
        return len(self.prefix) + max(len(rest) for rest in self.rests)


def shared_prompts(prompts: Sequence[str], tokenizer: Any) -> SharedPrompts:
    """Tokenise whole prompts and part them behind their longest common prefix, which leaves a token of each at least.

    No more than 256 prompts are there as a whole at a time.
    """
    first: Tokens | None = None
    common, tails = [], []  # with the first prompt; and what is behind that
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
        """Return a batch of one subject; see `MultipleChoiceData`."""
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


def answer_index(answer: Any, size: int) -> int | None:
    """Return the index of an answer that is an index or a letter; None for anything else.

    Args:
        answer: What a row holds.
        size: Number of choices.
    """
    if isinstance(answer, str) and len(letter := answer.strip()) == 1 and letter in LETTERS[:size]:
        return LETTERS.index(letter)
    return answer if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < size else None
