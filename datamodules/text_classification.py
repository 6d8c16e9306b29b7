"""Text classification and regression: GLUE's tasks, and any other data with one or two texts and a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.base import Collate
from datamodules.contract import DataKind
from datamodules.errors import DataError, counted
from datamodules.sources.columns import columns_line, guess_label_column, guess_text_columns, named_column
from datamodules.sources.labels import Labels, parse_labels
from datamodules.sources.tables import Table, blank_rows, check_column, check_texts, null_rows
from datamodules.text import BadRow, Padding, TrainingTextData
from datamodules.tokens.tokenizing import TokenDataset, tokenized, tokenizer_state

Task = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE (Wang et al. 2018, table 1), in the columns of `nyu-mll/glue`.

    Args:
        columns: Columns of the sentences.
        class_names: Names by label; empty for a regression.
        metrics: Names of the metrics of the task.
        files: Submission files, one for each set of the test split.
        by_name: If true, a submission has the names of classes instead of the numbers.
        limits: Smallest and largest prediction of a regression.
        sets: Suffixes of the sets of the validation and test splits; MNLI has two.
    """

    columns: tuple[str, ...]
    class_names: tuple[str, ...]
    metrics: tuple[str, ...]
    files: tuple[str, ...]
    by_name: bool = False
    limits: tuple[float, float] | None = None
    sets: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Pad:
    """Collate rows of tokens into a padded batch."""

    tokenizer: Any
    padding: Padding
    max_length: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tokens (batch, tokens) with their mask, `index` (batch,) and, if known, `label` (batch,)."""
        tokens = [{k: v for k, v in row.items() if k not in ("label", "index")} for row in rows]
        length = self.max_length if self.padding == "max_length" else None
        batch = dict(self.tokenizer.pad(tokens, padding=self.padding, max_length=length, return_tensors="pt"))
        numbers = {name: torch.tensor([row[name] for row in rows]) for name in ("label", "index") if name in rows[0]}
        return {**batch, **numbers}


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",), ("CoLA",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",), ("SST-2",)),
    "mrpc": GlueTask(PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), ("MRPC",)),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), ("QQP",)),
    "stsb": GlueTask(PAIR, (), ("pearson", "spearman"), ("STS-B",), limits=(0.0, 5.0)),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("MNLI-m", "MNLI-mm"),
        by_name=True,
        sets=("matched", "mismatched"),
    ),
    "qnli": GlueTask(("question", "sentence"), ENTAILMENT, ("accuracy",), ("QNLI",), by_name=True),
    "rte": GlueTask(PAIR, ENTAILMENT, ("accuracy",), ("RTE",), by_name=True),
    "wnli": GlueTask(PAIR, ("not_entailment", "entailment"), ("accuracy",), ("WNLI",)),
}


class TextClassificationData(TrainingTextData):
    """One or two sentences with a label, tokenised once and batched by length.

    Labels are whole numbers, booleans or names. Decimal numbers make a regression. The classes are the labels of the
    training rows, unless the model, the column or the task has the names of the classes. Batches are
    `datamodules.contract.TextBatch`.

    Args:
        path: A data set's name on the hub; a directory of train.*, validation.* and test.* as Parquet, CSV or
            JSONL, or with one such directory for each task; or one such file of training rows.
        task: A task of GLUE, which sets columns, classes and metrics; None for other data.
        config: The data set's configuration: on the hub, or a folder in the directory; None takes the task's.
        text_columns: One or two columns of text. None takes the task's, or guesses the columns from names and cells.
        label_column: Column of the labels. None guesses the column, see `datamodules.sources.columns`.
        id_column: Column that identifies a row in predictions. None takes `idx` or `id`, or else the row's number.
        max_length: Largest number of tokens of a row, with both texts and special tokens. Longer rows are cut.
        padding: Pad each batch to its `longest` row, or every row to `max_length`, for devices that need one shape.
        prediction_format: Format of the predictions: `csv` or `jsonl`, with texts, prediction and the probability of
            every class, or `tsv`, GLUE's submission.
        skip_label: Name or number of a label whose rows are left out, such as -1 for hidden labels.
    """

    kind = DataKind.LABELLED_TEXTS

    def __init__(
        self,
        path: str = "nyu-mll/glue",
        task: Task | None = None,
        config: str | None = None,
        text_columns: list[str] | None = None,
        label_column: str | None = None,
        id_column: str | None = None,
        max_length: int = 128,
        padding: Padding = "longest",
        prediction_format: Literal["csv", "tsv", "jsonl"] = "csv",
        skip_label: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, config=config or task, **kwargs)
        self.task = TASKS[task] if task else None
        columns = (self.task.columns if self.task else ()) if text_columns is None else text_columns
        if path == "nyu-mll/glue" and task is None:
            raise DataError("data.path: nyu-mll/glue has several tasks. Set data.task to one task, or use other data.")
        if text_columns is not None and not 1 <= len(columns) <= 2:
            raise DataError(f"data.text_columns: {text_columns} are {len(columns)} columns. Name one or two.")
        if len(set(columns)) < len(columns):
            raise DataError(f"data.text_columns: {columns[0]} is named twice. Name two columns, or one.")
        if label_column is not None and label_column in columns:
            raise DataError(f"data.label_column: {label_column} is one of data.text_columns. Name another column.")
        if max_length < 2:
            raise DataError(f"data.max_length: {max_length} must be 2 or more.")
        self.read_as_text(*columns, label_column or ("label" if self.task else None))
        self.columns = list(columns)
        self._guessed: list[str] = []
        self.suffixes = (*self.task.sets, "") if self.task else ("",)
        self.label_column = "label" if label_column is None and self.task else label_column
        self.id_column, self.skip_label = id_column, skip_label
        self.max_length, self.padding = max_length, padding
        self.prediction_format = prediction_format
        self.class_names: list[str] | None = None
        self.class_counts: list[int] = []
        self.label_scaling: list[float] | None = None

    # ------------------------------------------------------------------------------------------------------ splits

    def before_splits(self) -> None:
        """Take the classes of the trainer's model, or else of the training rows."""
        self.check_length("max_length", self.max_length)
        assert self.trainer is not None
        self.guess_columns()
        if not self.predicts:
            known = self.model_classes
            self.class_names = known if known is not None else self._labels(self.training_table()).class_names

    def guess_columns(self) -> None:
        """Guess the columns that no key names, from the training rows or else from another split.

        Raises:
            DataError: If no column fits, or several columns do.
        """
        if self.columns and (self.label_column is not None or self.predicts):
            return
        table = next(iter(self.tables_of_any_split().values()))
        self._guessed = [] if self.columns else ["data.text_columns"]
        self.columns = self.columns or guess_text_columns(table)
        if self.label_column is None and not self.predicts:
            self.label_column = guess_label_column(table, self.columns)
            self._guessed += ["data.label_column"] if self.label_column != "label" else []
        if self.predicts:
            self.findings.add(columns_line(f"text of {', '.join(self.columns)}", self._guessed, table, self.columns))
        self.keep_columns(text_columns=self.columns, label_column=self.label_column)

    def check_test_split(self) -> None:
        """Check before a long training that there is a test split with labels.

        Raises:
            SplitError: If there is no test split, or if its labels are hidden.
            DataError: If the labels cannot be read.
        """
        super().check_test_split()
        self.guess_columns()
        assert self.label_column is not None
        for table, _ in self.sets("test").values():
            parse_labels(table, self.label_column, self.task.class_names if self.task else None, self.skip_label)

    @property
    def metrics(self) -> list[str]:
        """Return the names of the task's metrics, which apply unless `model.metrics` is set."""
        if self.task:
            return list(self.task.metrics)
        return ["accuracy", "macro_f1"] if self.class_names else ["pearson", "spearman"]

    def _labels(self, table: Table) -> Labels:
        task_names = self.task.class_names if self.task else None
        # The training rows decide: a validation split with the scores 1, 2 and 3 belongs to the same regression.
        assert self.label_column is not None
        regression = [] in (self.model_classes, self.class_names)
        class_names = () if regression and task_names is None else task_names
        return parse_labels(table, self.label_column, class_names, self.skip_label)

    def eligible_rows(self, table: Table) -> Tensor:
        """Return all rows except the rows with the label of `skip_label`."""
        rows = super().eligible_rows(table)
        if self.skip_label is None:
            return rows
        left_out = self._labels(table).left_out
        count = counted(len(left_out), "row")
        self.findings.add(f"left out of {table.where}: {count} with the label {self.skip_label} (data.skip_label)")
        return rows[[row not in left_out for row in rows.tolist()]]

    def build(self, split: str, table: Table, rows: Tensor) -> TokenDataset:
        """Return the tokens of some rows of a table with their labels; without labels for prediction."""
        for column in self.columns:
            table = check_texts(table, "text_columns", column)
        self.add_notes(table)
        if split == "predict":
            if self.id_column not in (None, "idx"):
                check_column(table, "id_column", self.id_column)
            usable = self.drop_bad_rows(split, table, rows, self._bad_texts(table))
            return TokenDataset(self._tokenize(table.select(usable)))
        assert self.class_names is not None
        labels = self._labels(table)
        values = labels.matched(self.class_names)
        advice = "" if self.skip_label is not None else "; data.skip_label: -1 leaves such rows out"
        bad = {
            row: BadRow("label_column", f"has a label that {reason}{advice if reason.startswith('is -1,') else ''}")
            for row, reason in labels.bad.items()
        }
        rows = self.drop_bad_rows(split, table, rows, self._bad_texts(table) | bad)
        values = values[rows]
        if split == "train":
            if self.model_classes is None:
                labels.refuse_numbers_as_names(str(self.label_column))
            for note in labels.notes:
                self.findings.add(note)
            if self.class_names:
                self.class_counts = values.bincount(minlength=len(self.class_names)).tolist()
                self.findings.add_classes(self.class_names, self.class_counts)
            else:
                numbers = values.double().numpy()
                self.label_scaling = [float(numbers.mean()), float(numbers.std())]
                self.findings.add_numbers(*self.label_scaling)
            content = f"text of {', '.join(self.columns)}; labels of {self.label_column}"
            used = [*self.columns, self.label_column]
            self.findings.add(columns_line(content, self._guessed, table, used))
        return TokenDataset(self._tokenize(table.select(rows)), {"label": values})

    def _bad_texts(self, table: Table) -> dict[int, BadRow]:
        """Return the rows without a text. With two columns, one of the two cells may be blank, but not missing."""
        bad = {
            row: BadRow("text_columns", f"has no text in column {c}")
            for c in self.columns
            for row in null_rows(table, c)
        }
        blank = set.intersection(*(blank_rows(table, column) for column in self.columns))
        reason = f"has no text in column {' and '.join(self.columns)}"
        return {row: BadRow("text_columns", reason) for row in blank} | bad

    # ------------------------------------------------------------------------------------------------------ tokens

    def _tokenize(self, table: Table) -> Any:
        tokenizer, limit = self.tokenizer, self.max_length

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            tokens = tokenizer(
                *rows.values(), truncation=True, max_length=limit, return_attention_mask=False, verbose=False
            )
            columns = {name: [np.asarray(ids, np.int32) for ids in lists] for name, lists in tokens.items()}
            return {**columns, "length": [len(ids) for ids in tokens["input_ids"]]}

        key = {"tokenizer": tokenizer_state(tokenizer), "max_length": limit}
        tokens = tokenized(table, self.columns, encode, key)
        self.warn_of_truncated_rows(tokens, table, limit)
        return tokens

    def collate(self) -> Collate:
        """Return the function that pads batches to their longest row or to `max_length`."""
        return Pad(self.tokenizer, self.padding, self.max_length)

    # -------------------------------------------------------------------------------------------------- prediction

    @property
    def prediction_files(self) -> list[str]:
        """Return a file name for each set: GLUE's names for GLUE's test sets."""
        submits = self.predict_path is None and self.prediction_format == "tsv"
        glue_names = dict(zip(self.task.sets, self.task.files, strict=True)) if submits and self.task else {}
        names = [glue_names.get(s, f"predictions_{s}" if s else "predictions") for s in self.set_names["predict"]]
        return [f"{name}.{self.prediction_format}" for name in names]

    def complete_prediction(self, row: dict[str, Any], file: int) -> dict[str, Any]:
        """Return a row with id, texts, prediction and probabilities; for a submission, with index and prediction."""
        table = self.predicted[file]
        source = table.data[row["index"]]
        column = self.id_column or named_column(table, ("idx", "id"))
        name = source.get(column, row["index"])
        error = {"error": row["error"]} if "error" in row else {}
        if self.prediction_format == "tsv":
            return {"index": name, "prediction": None if row.get("error") else self._submitted(row), **error}
        texts = {column: source[column] for column in self.columns}
        answer = {k: v for k, v in row.items() if k not in ("index", "label", "error")} or {"prediction": None}
        return {"id": name, **texts, **answer, **error}

    def _submitted(self, row: dict[str, Any]) -> Any:
        """Return a prediction in the form of a GLUE submission."""
        if self.task is None:
            return row["prediction"]
        if "label" in row and not self.task.by_name:
            return row["label"]
        if self.task.limits:
            smallest, largest = self.task.limits
            return min(max(row["prediction"], smallest), largest)
        return row["prediction"]
