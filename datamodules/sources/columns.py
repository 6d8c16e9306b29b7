"""Guess which columns of a table hold texts and labels: from their names, or else from their cells."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.errors import DataError
from datamodules.sources.findings import listed
from datamodules.sources.tables import Table, check_column

# Names in lower case, the likeliest first. A column of inputs is the first match, and a line names the other columns.
# Labels, summaries and responses decide what is learnt: two matches of a group are an error.
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
    ("label", "labels", "gold_label", "class", "target", "y"),
    (
        *("category", "sentiment", "intent", "topic", "emotion", "polarity", "spam", "is_spam", "rating", "stars"),
        *("score", "similarity", "tag", "genre", "type"),
    ),
)
SOURCES = ("document", "article", "dialogue", "source", "text", "body", "content", "input")
TARGETS = (("summary", "highlights", "target", "output"), ("abstract", "headline", "title"))
PROMPTS = ("instruction", "prompt", "question", "query", "input", "user")
RESPONSES = (("output", "response", "completion", "answer", "assistant", "reply"),)
NO_LABELS = ("date", "day", "time", "timestamp", "created", "created_at", "updated_at", "id", "idx", "index", "nr")
MOST_CLASSES = 100  # Maximum of different values in a column of labels that is guessed from cells.


def named_column(
    table: Table, names: Sequence[str], used: Collection[str | None] = (), last_word: bool = False
) -> str | None:
    """Return the table's column with the first matching name, regardless of case; None if no name matches.

    Args:
        table: The rows.
        names: Names in lower case, the likeliest first.
        used: Columns that are not returned.
        last_word: If no whole name matches, match the last word of a name, as in `Customer Question` or `best_answer`.
    """
    return next(iter(named_columns(table, [[name] for name in names], used, last_word)), None)


def named_columns(
    table: Table, groups: Sequence[Sequence[str]], used: Collection[str | None] = (), last_word: bool = False
) -> list[str]:
    """Return all columns with a name of the first group that matches, regardless of case.

    Args:
        table: The rows.
        groups: Groups of names in lower case, the likeliest group first.
        used: As for `named_column`.
        last_word: As for `named_column`.
    """
    columns = {column: column.strip().lower() for column in table.data.column_names if column not in used}
    last_words = {column: re.split(r"[\W_]+", name)[-1] for column, name in columns.items()}
    spellings = (columns, last_words) if last_word else (columns,)
    matches = [[column for column in spelt if spelt[column] in names] for spelt in spellings for names in groups]
    return next(filter(None, matches), [])


def check_one(table: Table, key: str, columns: Sequence[str], content: str) -> None:
    """Check that at most one column may have the content.

    Raises:
        DataError: If there are several columns. The message has the key and all columns.
    """
    if len(columns) > 1:
        raise DataError(
            f"data.{key}: {len(columns)} columns of {table.where} may hold the {content} ({', '.join(columns)}). "
            "Name one."
        )


def columns_line(content: str, guessed: Sequence[str], table: Table, used: Collection[str | None]) -> str:
    """Return the line about the columns that are read: with the keys that override a guess, and the other columns.

    Args:
        content: Content of the columns that are read, such as `text of review`.
        guessed: Keys whose columns were guessed.
        table: The rows.
        used: The columns that are read.
    """
    verb = "overrides" if len(guessed) == 1 else "override"
    guess = f" (guessed; {' and '.join(guessed)} {verb})" if guessed else ""
    others = [column for column in table.data.column_names if column not in used]
    return f"columns: {content}{guess}" + (f"; not used: {listed(others)}" if others else "")


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
        names = ", ".join(table.data.column_names)
        raise DataError(
            f"data.text_columns: no column of {table.where} holds text. The columns are {names}. Name one or two."
        )
    return [max(lengths, key=lengths.__getitem__)]


def guess_label_column(table: Table, texts: Sequence[str]) -> str:
    """Return the column of the labels: the only column of a group of names, else with few, recurring values.

    If no column has recurring values, the only column of numbers is returned if the numbers are decimal. Columns named
    like a date or an id are not considered.

    Args:
        table: The training rows.
        texts: Columns of the texts.

    Raises:
        DataError: If there is no such column, or more than one.
    """
    others = [c for c in table.data.column_names if c not in texts and c.strip().lower() not in NO_LABELS]
    candidates = named_columns(table, LABELS, texts) or [column for column in others if _holds_classes(table, column)]
    check_one(table, "label_column", candidates, "labels")
    if candidates:
        return candidates[0]
    if numbers := [column for column in others if _holds_numbers(table, column)]:
        whole = any("int" in table.data.features[column].dtype for column in numbers)
        if len(numbers) == 1 and not whole:
            return numbers[0]
        verb, target = ("holds", numbers[0]) if len(numbers) == 1 else ("hold", "one of these columns")
        advice = " For whole numbers, also set model.class_names to []." if whole else ""
        raise DataError(
            f"data.label_column: no column of {table.where} looks like a label. {listed(numbers)} {verb} numbers. "
            f"For a regression, set data.label_column to {target}.{advice}"
        )
    check_column(table, "label_column", "label")  # Without `label`, raises with advice about the file's first line.
    raise DataError(
        f"data.label_column: {table.where} has no column of labels beside the texts ({', '.join(texts)}). Name the "
        "columns with data.text_columns and data.label_column."
    )


def _is_text(table: Table, column: str) -> bool:
    feature = table.data.features[column]
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _holds_numbers(table: Table, column: str) -> bool:
    """Return True for a column of numbers, unless its name is a number too: then the file has no line of names."""
    feature = table.data.features[column]
    is_number = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float"))
    return is_number and not re.fullmatch(r"[-+.]?\d[-+\d.eE]*", column.strip())


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
