"""Multiple choice in MMLU's format: prompts with a few shots. A batch shares the prefix of one subject."""

from __future__ import annotations

import logging
from statistics import mode
from string import ascii_uppercase as LETTERS
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler, Subset

from datamodules.contract import DataKind
from datamodules.errors import DataError, counted
from datamodules.sources.splits import is_spelling
from datamodules.sources.tables import Table, blank_rows, check_column, check_texts
from datamodules.text import BadRow, TextData
from datamodules.tokens.questions import (
    PLAIN,
    UNKNOWN,
    Question,
    QuestionDataset,
    SharedPrompts,
    SubjectBatches,
    answer_index,
    header,
    shared_prompts,
)

_log = logging.getLogger(__name__)

NO_ANSWER = (None, -1, "")  # Cells without an answer, which only prediction accepts.


class MultipleChoiceData(TextData):
    """Questions with choices, asked in MMLU's format after a few answered questions (Hendrycks et al. 2021).

    The data are for validation, test and prediction. A batch holds questions of one subject. The batches of a subject
    follow each other. Batches are `datamodules.contract.QuestionBatch`.

    Args:
        path: A data set's name on the hub, or a directory of validation.*, test.* and a split of shots as Parquet or
            JSONL.
        config: The data set's configuration: on the hub, or a folder in the directory.
        shots_split: Split of the answered questions.
        shots: Number of answered questions in a prompt, 0 or more: the first questions of the subject in that split.
        question_column: Column of the questions.
        choices_column: Column of the lists of 2 to 26 choices, as many in each row.
        answer_column: Column of the answers: indices from 0, or letters.
        subject_column: Column of the subjects. With None, or if a table lacks the default column, there is one subject.
        batch_size: Questions in a batch of one process, at least 1.
        max_length: Largest number of tokens of a prompt. A subject with longer prompts gets fewer shots. None takes
            the number of the model's positions.
        subjects: Subjects to ask; None for all.
    """

    kind = DataKind.QUESTIONS

    def __init__(
        self,
        path: str = "cais/mmlu",
        config: str | None = "all",
        shots_split: str = "dev",
        shots: int = 5,
        question_column: str = "question",
        choices_column: str = "choices",
        answer_column: str = "answer",
        subject_column: str | None = "subject",
        batch_size: int = 8,
        max_length: int | None = None,
        subjects: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, config=config, batch_size=batch_size, **kwargs)
        self.check_columns(
            question_column=question_column,
            choices_column=choices_column,
            answer_column=answer_column,
            subject_column=subject_column,
        )
        if shots < 0:
            raise DataError(f"data.shots: {shots} must not be negative.")
        if max_length is not None and max_length < 1:
            raise DataError(f"data.max_length: {max_length} must be 1 or more, or null for the model's limit.")
        if subjects is not None and not subjects:
            raise DataError("data.subjects: the list is empty. Name at least one subject, or use null for all.")
        self.read_as_text(question_column, subject_column)
        self.shots_split, self.shots, self.max_length, self.subjects = shots_split, shots, max_length, subjects
        self.question_column, self.choices_column = question_column, choices_column
        self.answer_column, self.subject_column = answer_column, subject_column

    # ------------------------------------------------------------------------------------------------------ splits

    prediction_files = ("predictions.csv",)

    def setup(self, stage: str) -> None:
        """Tokenise what the stage needs, with the tokenizer of the trainer's model.

        Raises:
            DataError: If the stage is `fit`, or if more questions are unusable than may be skipped.
        """
        if stage == "fit":
            raise DataError(
                "data: MultipleChoiceData has no training rows and works only in validate, test and predict. Train on "
                "other data, such as LanguageModelingData, and test that run with --ckpt_path."
            )
        super().setup(stage)

    def before_splits(self) -> None:
        """Check that the model has positions for `max_length` tokens."""
        if self.max_length is not None:
            self.check_length("max_length", self.max_length)

    def sets(self, split: str) -> dict[str, tuple[Table, bool]]:
        """Return the only set of a split. Nothing is held out from training rows.

        Raises:
            DataError: If there is no such split.
        """
        tables = self.stored_tables(split)
        if not tables:
            name = "validation" if split == "val" else split
            raise DataError(f"data.path: {self.path} has no {name} split. Give data with this split.")
        return {suffix: (table, False) for suffix, table in tables.items()}

    def split_names(self, split: str, suffix: str = "") -> tuple[str, ...]:
        """Return the spellings of a split except the split of the shots: MMLU's `dev` is no validation split."""
        usual, *others = super().split_names(split, suffix)
        return (usual, *(name for name in others if not is_spelling(name, [self.shots_split])))

    def _names_read(self) -> tuple[str, ...]:
        return (*super()._names_read(), self.shots_split, "auxiliary_train")

    def source(self, table: Table) -> str:
        """Return where the questions are from, with the number of subjects and shots."""
        asked = "" if self.subjects is None else f" of {counted(len(self.subjects), 'subject')}"
        return f"{super().source(table)}{asked}, {counted(self.shots, 'shot')} each"

    def _to_predict(self, table: Table) -> QuestionDataset:
        dataset = self.build("predict", table, self.eligible_rows(table))
        self.findings.add_split("predict", len(dataset), table.source or table.where)
        self.add_notes(table)
        return dataset

    def eligible_rows(self, table: Table) -> Tensor:
        """Return the rows of the subjects in `subjects`, (rows,) int64.

        Raises:
            DataError: If a subject has no questions.
        """
        if self.subjects is None:
            return torch.arange(len(table))
        of_row = self._subjects_of(table)
        if missing := sorted(set(self.subjects) - set(of_row)):
            raise DataError(
                f"data.subjects: {table.where} has no questions of {', '.join(missing)}; it has "
                f"{', '.join(sorted(set(of_row)))}."
            )
        return torch.tensor([row for row, subject in enumerate(of_row) if subject in self.subjects])

    def build(self, split: str, table: Table, rows: Tensor) -> QuestionDataset:
        """Return the questions of some rows of a table with their answers, which may be missing in prediction."""
        of_row = self._subjects_of(table)
        asked, bad = self._read(table, rows.tolist(), answered=split != "predict")
        rows = self.drop_bad_rows(split, table, rows, bad | self._too_long(asked, of_row))
        groups: dict[str, list[int]] = {}
        for row in sorted(rows.tolist()):
            groups.setdefault(of_row[row], []).append(row)
        shots = self._shots(table, list(groups))
        fitted: dict[str, tuple[SharedPrompts, int]] = {}
        with Console(stderr=True).status(escape(f"Tokenising the prompts of {table.where!r}")):
            for subject, members in groups.items():
                fitted[subject] = self._fitted(subject, [asked[row].prompt() for row in members], shots[subject])
        self._warn_of_fewer_shots(table, {subject: count for subject, (_, count) in fitted.items()})
        # The subject with the longest prompt comes first, so that a lack of memory shows at once.
        names = sorted(groups, key=lambda subject: -fitted[subject][0].longest)
        first = names[0]
        prompt = header(first) + "".join(shots[first][: fitted[first][1]]) + asked[groups[first][0]].prompt()
        return QuestionDataset(
            names,
            [fitted[name][0] for name in names],
            [groups[name] for name in names],
            {row: -1 if (answer := asked[row].answer) is None else answer for row in rows.tolist()},
            self._letters(prompt, len(asked[groups[first][0]].choices)),
        )

    # --------------------------------------------------------------------------------------------------------- rows

    def _subjects_of(self, table: Table) -> list[str]:
        column = self.subject_column
        if column is None or (column == "subject" and column not in table.data.column_names):
            return [UNKNOWN] * len(table)
        texts = check_texts(table, "subject_column", column)
        return [UNKNOWN if subject is None else subject for subject in texts.data[column][:]]

    def _read(self, table: Table, rows: list[int], answered: bool) -> tuple[dict[int, Question], dict[int, BadRow]]:
        """Return the questions of some rows by row, and the rows that lack a question, choices or an answer.

        A question must have as many choices as most rows have.
        """
        texts = check_texts(table, "question_column", self.question_column)
        check_column(table, "choices_column", self.choices_column)
        if answered:
            check_column(table, "answer_column", self.answer_column)
        data = texts.data
        choices = data[self.choices_column][:]
        answers = data[self.answer_column][:] if self.answer_column in data.column_names else [None] * len(data)
        questions = data[self.question_column][:]
        blank = blank_rows(texts, self.question_column)
        size = mode([len(choices[row]) for row in rows if _are_texts(choices[row])] or [0])
        usable: dict[int, Question] = {}
        bad: dict[int, BadRow] = {}
        for row in rows:
            answer = answer_index(answers[row], size)
            if row in blank:
                bad[row] = BadRow("question_column", f"has no text in column {self.question_column}")
            elif not (_are_texts(choices[row]) and len(choices[row]) == size and 2 <= size <= len(LETTERS)):
                bad[row] = BadRow(
                    "choices_column",
                    f"has {choices[row]!r:.80} in column {self.choices_column}, which must hold lists of 2 to 26 "
                    "texts, as many in each row",
                )
            elif answer is None and (answered or answers[row] not in NO_ANSWER):
                bad[row] = BadRow(
                    "answer_column",
                    f"has {answers[row]!r:.80} in column {self.answer_column}, which must hold indices from 0 to "
                    f"{size - 1} or letters from A to {LETTERS[size - 1]}",
                )
            else:
                usable[row] = Question(questions[row], tuple(choices[row]), answer)
        return usable, bad

    def _shots(self, asked: Table, subjects: list[str]) -> dict[str, list[str]]:
        """Return the shots of each subject.

        Raises:
            DataError: If the split of the shots is missing or contains the questions to ask, or if a subject has too
                few shots.
        """
        if self.shots == 0:
            return {subject: [] for subject in subjects}
        advice = "name another split, or use fewer shots with data.shots"
        table = self._table((self.shots_split,))
        if table is None:
            raise DataError(f"data.shots_split: {self.path} has no {self.shots_split} split for the shots; {advice}.")
        if table.where == asked.where:
            raise DataError(f"data.shots_split: the shots of {table.where} are among the questions to ask; {advice}.")
        examples: dict[str, list[str]] = {subject: [] for subject in subjects}
        of_row = self._subjects_of(table)
        rows = torch.tensor([row for row, subject in enumerate(of_row) if subject in examples])
        if len(rows):
            questions, bad = self._read(table, rows.tolist(), answered=True)
            for row in self.drop_bad_rows(self.shots_split, table, rows, bad).tolist():
                if len(examples[of_row[row]]) < self.shots:
                    examples[of_row[row]].append(questions[row].shot())
        for subject, texts in examples.items():
            if len(texts) < self.shots:
                raise DataError(
                    f"data.shots: {table.where} has {counted(len(texts), 'question')} of {subject} for "
                    f"{counted(self.shots, 'shot')}; {advice}."
                )
        return examples

    # ------------------------------------------------------------------------------------------------------ tokens

    @property
    def _limit(self) -> int | None:
        return self.text_model.position_limit if self.max_length is None else self.max_length

    def _fitted(self, subject: str, questions: list[str], shots: list[str]) -> tuple[SharedPrompts, int]:
        """Return the prompts of a subject with as many shots as fit before every question, and the number of shots."""
        for count in range(len(shots), -1, -1):
            start = header(subject) + "".join(shots[:count])
            prompts = shared_prompts([start + question for question in questions], self.tokenizer)
            if self._limit is None or prompts.longest <= self._limit:
                break
        # The keys and values of a prefix depend on the adapter, and each row may have another adapter.
        return prompts if self.adapter_column is None else prompts.without_prefix(), count

    def _too_long(self, asked: dict[int, Question], subjects: list[str]) -> dict[int, BadRow]:
        """Return the questions that do not fit even without shots, by row."""
        if self._limit is None or not asked:
            return {}
        limit = "positions of the backbone" if self.max_length is None else "that data.max_length allows"
        prompts = [header(subjects[row]) + question.prompt() for row, question in asked.items()]
        lengths = [len(ids) for ids in self.tokenizer(prompts, **PLAIN)["input_ids"]]
        return {
            row: BadRow(
                "max_length",
                f"takes {length} tokens without a shot, more than the {self._limit} {limit} (subject {subjects[row]}, "
                "which data.subjects can leave out)",
            )
            for row, length in zip(asked, lengths, strict=True)
            if length > self._limit
        }

    def _warn_of_fewer_shots(self, table: Table, counts: dict[str, int]) -> None:
        fewer = [f"{subject} {count}" for subject, count in sorted(counts.items()) if count < self.shots]
        if fewer:
            _log.warning(
                f"fewer than {counted(self.shots, 'shot')} for {len(fewer)} of {counted(len(counts), 'subject')} of "
                f"{table.where} to fit {self._limit} tokens: {', '.join(fewer)}."
            )

    def _letters(self, prompt: str, size: int) -> Tensor:
        """Return the tokens of the letters after a prompt, (size,) int64.

        Raises:
            DataError: If a letter is not exactly one token after the prompt, or two letters share a token.
        """
        base, *longer = self.tokenizer([prompt, *(f"{prompt} {x}" for x in LETTERS[:size])], **PLAIN)["input_ids"]
        ends = [ids[len(base) :] for ids in longer if ids[: len(base)] == base]
        if any(len(end) != 1 for end in ends) or len({*map(tuple, ends)}) < size:
            raise DataError(
                "data: the tokenizer of this backbone does not make a separate token of each of the answers A to "
                f"{LETTERS[size - 1]} after `Answer:`. Multiple choice compares the tokens. Choose another backbone."
            )
        return torch.tensor(ends).flatten()

    # ----------------------------------------------------------------------------------------------------- loaders

    def _loaders(self, split: str) -> list[DataLoader[Any]]:
        world, rank = self.world()
        loaders = []
        for data in self.splits[split]:
            assert isinstance(data, QuestionDataset)
            if len(data) < world:
                raise DataError(
                    f"{counted(len(data), 'question is', 'questions are')} fewer than the {world} processes. Use fewer "
                    "processes."
                )
            rows = range(rank, len(data), world)  # A share of each subject, since questions are ordered by subject.
            share = Subset(data, rows)
            groups = [data.groups[i] for i in rows]
            batches = SubjectBatches(SequentialSampler(share), self.batch_size, False, groups)
            loaders.append(self._loader(share, batches, data.collate))
        return loaders

    def complete_prediction(self, row: dict[str, Any], file: int) -> dict[str, Any]:
        """Return the row's number, subject and predicted letter, the known answer, and each log-probability."""
        source = self.predicted[file].data[row["index"]]
        if row.get("error"):
            subject = source.get(self.subject_column, UNKNOWN)
            return {"index": row["index"], "subject": subject, "prediction": "", "error": row["error"]}
        scores = row["log_probabilities"]
        answer = answer_index(source.get(self.answer_column), len(scores))
        return {
            "index": row["index"],
            "subject": source.get(self.subject_column, UNKNOWN),
            "prediction": LETTERS[scores.index(max(scores))],
            "answer": "" if answer is None else LETTERS[answer],
            **{f"log_probability_{letter}": score for letter, score in zip(LETTERS, scores, strict=False)},
            **{key: row[key] for key in ("adapter", "error") if key in row},
        }


def _are_texts(cell: Any) -> bool:
    return isinstance(cell, list) and all(isinstance(text, str) for text in cell)
