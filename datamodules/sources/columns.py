"""Guess which columns of a table hold texts and labels: from their names, or else from their cells."""

from __future__ import annotations

import re
from collections.abc import Sequence

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.errors import DataError
from datamodules.sources.tables import Table, check_column

# Names in lower case, the likeliest first.
TEXTS = (
    *("text", "sentence", "review", "comment", "message", "content", "body", "document", "tweet", "post", "question"),
    *("utterance", "sms", "email", "headline", "title", "description", "abstract", "article", "input"),
)
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
    *(("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("query", "passage")),
    *(("query", "document"), ("question", "answer"), ("question", "context")),
)
LABELS = (
    *("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "emotion", "polarity", "spam"),
    *("is_spam", "rating", "stars", "score", "similarity", "tag", "genre", "type", "gold_label", "y"),
)
SOURCES = ("document", "article", "dialogue", "source", "text", "body", "content", "input")
TARGETS = ("summary", "highlights", "target", "abstract", "headline", "title", "output")
PROMPTS = ("instruction", "prompt", "question", "query", "input", "user")
RESPONSES = ("output", "response", "completion", "answer", "assistant", "reply")
NO_LABELS = ("date", "day", "time", "timestamp", "created", "created_at", "updated_at", "id", "idx", "index", "nr")
MOST_CLASSES = 100  # Maximum of different values in a column of labels that is guessed from cells.


def named_column(table: Table, names: Sequence[str], last_word: bool = False) -> str | None:
    """Return the table's column with the first matching name, regardless of case; None if no name matches.

    Args:
        table: The rows.
        names: Names in lower case.
        last_word: If no whole name matches, match the last word of a name, as in `Customer Question` or `best_answer`.
    """
    columns = {column.strip().lower(): column for column in reversed(table.data.column_names)}
    named = next((columns[name] for name in names if name in columns), None)
    if named is None and last_word:
        columns = {re.split(r"[\W_]+", column)[-1]: name for column, name in columns.items()}
        named = next((columns[name] for name in names if name in columns), None)
    return named


def guess_text_columns(table: Table) -> list[str]:
    """Return the column of the texts, or the two columns of a table of pairs.

    If no column has a usual name, the column with the longest texts is returned.

    Raises:
        DataError: If no column has a usual name, and no column holds text.
    """
    columns = {column.strip().lower(): column for column in table.data.column_names}
    for first, second in PAIRS:
        if first in columns and second in columns and _is_text(table, columns[first]):
            return [columns[first], columns[second]]
    if (named := named_column(table, TEXTS)) is not None:
        return [named]
    lengths = {column: _mean_length(table, column) for column in table.data.column_names if _is_text(table, column)}
    if not lengths:
        listed = ", ".join(table.data.column_names)
        raise DataError(
            f"data.text_columns: no column of {table.where} holds text. The columns are {listed}. Name one or two."
        )
    return [max(lengths, key=lengths.__getitem__)]


def guess_label_column(table: Table, texts: Sequence[str]) -> str:
    """Return the column of the labels: by its name, or else the only column with few, recurring values.

    Columns named like a date or an id are not considered.

    Args:
        table: The training rows.
        texts: Columns of the texts.

    Raises:
        DataError: If there is no such column, or more than one.
    """
    if (named := named_column(table, [name for name in LABELS if name not in texts])) is not None:
        return named
    others = [c for c in table.data.column_names if c not in texts and c.strip().lower() not in NO_LABELS]
    candidates = [column for column in others if _holds_classes(table, column)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        check_column(table, "label_column", "label")  # Without `label`, raises with advice about the file's first line.
        raise DataError(
            f"data.label_column: {table.where} has no column of labels beside the texts ({', '.join(texts)}). Name the "
            "columns with data.text_columns and data.label_column."
        )
    listed = ", ".join(candidates)
    raise DataError(
        f"data.label_column: {len(candidates)} columns of {table.where} may hold the labels ({listed}). Name one."
    )


def _is_text(table: Table, column: str) -> bool:
    feature = table.data.features[column]
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _cells(table: Table, column: str) -> pa.ChunkedArray:
    return table.data.with_format("arrow")[:][column]


def _mean_length(table: Table, column: str) -> float:
    return float(pc.mean(pc.utf8_length(_cells(table, column))).as_py() or 0.0)


def _holds_classes(table: Table, column: str) -> bool:
    """Return True if a column has 2 to 100 different values, each twice or more on average."""
    if not isinstance(table.data.features[column], datasets.Value | datasets.ClassLabel):
        return False
    cells = _cells(table, column).drop_null()
    return 2 <= len(cells.unique()) <= min(MOST_CLASSES, len(cells) // 2)
