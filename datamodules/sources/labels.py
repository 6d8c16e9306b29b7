"""Parse the labels of a table: whole numbers, booleans, names, or the numbers of a regression."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import DataError, SplitError
from datamodules.sources.tables import Table, check_column

HIDDEN_LABELS = (
    " The labels are hidden. Use predict for such a split. To test on GLUE, set data.test_on_validation: true."
)
BOOLEANS = ["False", "True"]
UNKNOWN = -1  # Value of a row without a label.
PLAIN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
PLAIN = (
    "For a regression, write plain numbers such as 1234.5, without currency signs, units or separators. Leave the cell "
    "of a row without a number empty, and set data.skip_bad_rows."
)
NUMBER_WITH_SIGNS = re.compile(r"\W*\d[\d.,'\s]*(\W*|\s?[a-zA-Z]{1,3})")  # Such as $700, 1,234.50, 12 % and 5 km.


@dataclass(frozen=True)
class Labels:
    """Targets by row.

    Args:
        values: (rows,) int64, or float32 in regression. A row without a label has -1, or NaN in regression.
        class_names: Names by label; empty in regression.
        where: Name of the table in messages.
        bad: Rows without a label, with the reason.
        left_out: Rows with the label of `skip_label`.
        notes: Lines about assumptions in reading the labels.
    """

    values: Tensor
    class_names: list[str]
    where: str
    bad: Mapping[int, str] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def refuse_numbers_as_names(self, column: str) -> None:
        """Check that class names which hardly recur are not numbers, such as `$700` or `1,234.50`.

        Raises:
            DataError: If most of the names look like numbers. The message has a name that is no plain number.
        """
        numbers = [name for name in self.class_names if len(name) < 40 and NUMBER_WITH_SIGNS.fullmatch(name.strip())]
        if len(self.class_names) <= max(10, len(self.values) // 10) or 2 * len(numbers) <= len(self.class_names):
            return
        others = (name for name in self.class_names if not PLAIN_NUMBER.fullmatch(name.strip()))
        example = next(others, None)
        advice = "For a regression, set model.class_names to []." if example is None else PLAIN
        raise DataError(
            f"data.label_column: {column} in {self.where} holds numbers as text, such as "
            f"{example or numbers[0]!r:.80}. {advice} For classes, set model.class_names to the names."
        )

    def matched(self, class_names: list[str]) -> Tensor:
        """Return the labels as indices into another list of classes, matched by name.

        Booleans match 0 and 1, and `True` and `False` regardless of case.

        Raises:
            DataError: If a class of the rows is not in the list, or if only one of rows and list is for a regression.
        """
        if bool(class_names) != bool(self.class_names):
            kinds = ("regression", f"classification into {', '.join((class_names or self.class_names)[:10])}")
            model, data = kinds if not class_names else kinds[::-1]
            raise DataError(
                f"data.label_column: the model is for {model}, but the labels of {self.where} are for {data}. "
                "Use other labels or another model."
            )
        if class_names == self.class_names:
            return self.values
        places = {name: place for place, name in enumerate(class_names)}
        if self.class_names == BOOLEANS:
            lower = {name.lower(): place for place, name in enumerate(class_names)}
            places = {b: lower[s] for b, n in zip(BOOLEANS, "01", strict=True) for s in (n, b.lower()) if s in lower}
        elif class_names == BOOLEANS:
            places |= {"0": 0, "1": 1}
        used = [self.class_names[i] for i in self.values.unique().tolist() if i != UNKNOWN]
        if unknown := [name for name in used if name not in places]:
            raise DataError(
                f"data.path: {self.where} has classes that the model was not trained on ({', '.join(unknown[:5])}). "
                f"The model knows {len(class_names)}: {', '.join(class_names[:10])}"
                f"{', …' if len(class_names) > 10 else ''}."
            )
        return torch.tensor([*(places.get(name, UNKNOWN) for name in self.class_names), UNKNOWN])[self.values]


def missing_label(labels: Labels, column: str) -> DataError:
    """Return the error of the first row that has no label."""
    row, reason = next(iter(labels.bad.items()))
    count = f"{len(labels.bad):,} of {len(labels.values):,} labels cannot be used"
    skip = " or data.skip_label: -1" if reason.startswith("is -1,") else ""
    value, comma, limits = reason.partition(",")
    return DataError(
        f"data.label_column: {column} in {labels.where} {value} in row {row}{comma}{limits}; {count}. "
        f"Fix or drop such rows, or skip such rows with data.skip_bad_rows{skip}."
    )


def parse_labels(
    table: Table,
    column: str,
    class_names: tuple[str, ...] | None = None,
    skip_label: str | int | None = None,
) -> Labels:
    """Return the labels of a column, and the rows without a label.

    Args:
        table: The rows.
        column: Column of whole numbers (of a ClassLabel, with names), names, booleans, or decimal numbers, which make a
            regression.
        class_names: Names by label, for a column without names. None takes the classes of the rows: whole
            numbers in order, False and True, or names sorted. () makes a regression of a column of numbers.
        skip_label: Label whose rows are left out.

    Raises:
        DataError: If the column is missing, of another type, without any label, or has a name that is not in
            `class_names`.
        SplitError: If every label is -1, which means hidden labels.
    """
    import pyarrow as pa

    check_column(table, "label_column", column)
    cells, notes = _cells(table, column)
    stored = _stored_names(table, column)
    left_out = _equal_rows(cells, stored, skip_label)
    if left_out:
        mask = np.isin(np.arange(len(cells)), [*left_out])
        cells = pa.array(np.where(mask, None, cells.to_numpy(zero_copy_only=False)), cells.type)
    null = {int(row) for row in cells.is_null().to_numpy(zero_copy_only=False).nonzero()[0]}
    if len(left_out) == len(cells):
        raise DataError(
            f"data.skip_label: every label of {table.where} is {skip_label}. Choose another label, or remove the key."
        )
    if len(null) == len(cells):
        raise DataError(f"data.label_column: {column} in {table.where} is empty in every row. Name another column.")
    bad = dict.fromkeys(sorted(null - left_out), "is empty")
    if class_names == () and (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        cells = _typed(cells)
    kind = cells.type
    if pa.types.is_boolean(kind):
        cells, kind, class_names = cells.cast(pa.int64()), pa.int64(), class_names or tuple(BOOLEANS)
    number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    if (class_names == () and number and stored is None) or (not class_names and pa.types.is_floating(kind)):
        values, wrong = _targets(cells, column, table.where, null)
        if class_names is None and bool((values[values.isfinite()] % 1 == 0).all()):
            notes += (
                f"{column} of {table.where}: decimal numbers that are all whole, read as a regression; "
                "write the numbers without a point for classes",
            )
        return Labels(values, [], table.where, dict(sorted((bad | wrong).items())), frozenset(left_out), notes)
    if pa.types.is_integer(kind):
        known_names = stored or class_names
        if set(cells.unique().to_pylist()) <= {-1, None}:
            raise SplitError(f"data.label_column: {column} in {table.where} is -1 in every row.{HIDDEN_LABELS}")
        values, names, wrong = _from_numbers(cells, known_names) if known_names else _from_digits(cells)
        if not known_names:
            notes += _doubts(column, table.where, names, len(cells))
    elif class_names != () and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        values, names = _from_names(cells, column, table.where, class_names)
        wrong = {}
        if not class_names:
            notes += _rare_class_note(column, table.where, len(names), "names", len(cells), "")
        notes += _alike(column, table.where, names)
    else:
        needed = "whole numbers or names" if class_names else "numbers" if class_names == () else "numbers or names"
        advice = " A row has one label: lists of labels are not supported." if pa.types.is_list(kind) else ""
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            texts = ((r, c) for r, c in enumerate(cells.to_pylist()) if c and not PLAIN_NUMBER.fullmatch(c.strip()))
            row, cell = next(texts, (0, cells[0].as_py()))
            advice = f" Row {row} holds {cell!r:.80}. {PLAIN}"
        raise DataError(
            f"data.label_column: {column} in {table.where} must hold {needed}, and it holds {str(kind)[:80]}.{advice}"
        )
    return Labels(values, names, table.where, dict(sorted((bad | wrong).items())), frozenset(left_out), notes)


def _cells(table: Table, column: str) -> tuple[Any, tuple[str, ...]]:
    """Return the cells of a column as one arrow array, with blank names as null, and notes about their type."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Json

    if isinstance(table.data.features[column], Json):  # Values of several types, in JSON.
        values = table.data[column][:]
        if any(isinstance(value, list | dict) for value in values):
            row = next(i for i, value in enumerate(values) if isinstance(value, list | dict))
            raise DataError(
                f"data.label_column: {column} in {table.where} must hold numbers or names, but row {row} holds "
                f"{values[row]!r:.80}. A row has one label."
            )
        cells = pa.array([None if value is None else str(value) for value in values], pa.string())
        return _typed(cells), (f"{column} of {table.where} holds labels of several types",)
    cells = table.data.select_columns(column).with_format("arrow")[:][column].combine_chunks()
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        blank = pc.equal(pc.utf8_trim_whitespace(cells), "")
        cells = pc.if_else(blank, pa.scalar(None, cells.type), cells)
        if column in table.as_text:
            cells = _typed(cells)
        elif (booleans := _booleans(cells)) is not None:
            cells = booleans
    return cells, ()


def _typed(cells: Any) -> Any:
    """Convert text cells to whole numbers, decimal numbers or booleans, if all cells allow it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    trimmed = pc.utf8_trim_whitespace(cells)
    digits = pc.match_substring_regex(trimmed, r"^[+-]?\d+$").fill_null(True)
    kind = pa.int64() if pc.all(digits).as_py() else pa.float64()  # Digits of more than 64 bits stay names.
    try:
        numbers = trimmed.cast(kind)
    except pa.ArrowInvalid:
        pass
    else:
        if kind == pa.int64() or bool(np.isfinite(numbers.to_numpy(zero_copy_only=False).astype(float)).any()):
            return numbers
    booleans = _booleans(cells)
    return cells if booleans is None else booleans


def _booleans(cells: Any) -> Any:
    """Return cells that are all `true` or `false`, regardless of case, as booleans; None for other text."""
    import pyarrow.compute as pc

    texts = pc.utf8_lower(pc.utf8_trim_whitespace(cells))
    values = set(pc.unique(texts).to_pylist()) - {None}
    return pc.equal(texts, "true") if values and values <= {"true", "false"} else None


def _equal_rows(cells: Any, stored: Sequence[str] | None, label: str | int | None) -> set[int]:
    """Return the rows whose label has a given name or number."""
    if label is None:
        return set()
    coded = cells.dictionary_encode()
    target = str(label).strip()
    matches = [
        value is not None
        and (_name(value) == target or (stored is not None and 0 <= value < len(stored) and stored[value] == target))
        for value in coded.dictionary.to_pylist()
    ]
    indices = coded.indices.fill_null(len(matches)).to_numpy()
    return {int(row) for row in np.array([*matches, False])[indices].nonzero()[0]}


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _targets(cells: Any, column: str, where: str, null: set[int]) -> tuple[Tensor, dict[int, str]]:
    """Return the numbers of a regression, and the rows whose number is not finite."""
    values = torch.from_numpy(cells.to_numpy(zero_copy_only=False).astype(np.float32))
    if not null and bool((values == -1).all()):
        raise SplitError(f"data.label_column: {column} in {where} is -1 in every row.{HIDDEN_LABELS}")
    wrong = (~values.isfinite()).nonzero().flatten().tolist()
    return values, {row: f"is {values[row].item()}" for row in wrong if row not in null}


def _from_digits(cells: Any) -> tuple[Tensor, list[str], dict[int, str]]:
    """Return whole numbers as classes in numerical order. Memory does not grow with the size of the numbers."""
    coded = cells.dictionary_encode()
    numbers = coded.dictionary.to_pylist()
    order = sorted(numbers)
    return _placed(coded, {number: place for place, number in enumerate(order)}), [str(n) for n in order], {}


def _from_numbers(cells: Any, names: Sequence[str]) -> tuple[Tensor, list[str], dict[int, str]]:
    """Return whole numbers as indices of names, and the rows whose number has no name."""
    coded = cells.dictionary_encode()
    numbers = coded.dictionary.to_pylist()
    places = {number: number for number in numbers if 0 <= number < len(names)}
    values = _placed(coded, places)
    present = cells.is_valid().to_numpy(zero_copy_only=False)
    wrong = ((values == UNKNOWN).numpy() & present).nonzero()[0].tolist()
    reasons = {row: f"is {cells[row].as_py()}, outside 0 to {len(names) - 1}" for row in wrong}
    return values, list(names), reasons


def _from_names(cells: Any, column: str, where: str, class_names: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    coded = cells.dictionary_encode()
    present = coded.dictionary.to_pylist()
    names = list(class_names or sorted(present))
    places = {name: place for place, name in enumerate(names)}
    if unknown := [name for name in present if name not in places]:
        raise DataError(
            f"data.label_column: {column} in {where} has {', '.join(unknown[:5])}; the classes of this task "
            f"are {', '.join(names)}."
        )
    return _placed(coded, places), names


def _placed(coded: Any, places: Mapping[Any, int]) -> Tensor:
    """Return the index of each row's value; -1 for a value without an index, and for an empty cell."""
    order = np.array([*(places.get(value, UNKNOWN) for value in coded.dictionary.to_pylist()), UNKNOWN], np.int64)
    return torch.from_numpy(order[coded.indices.fill_null(len(order) - 1).to_numpy()])


def _doubts(column: str, where: str, names: list[str], rows: int) -> tuple[str, ...]:
    """Return lines about whole numbers that may not be classes."""
    lines = _rare_class_note(
        column, where, len(names), "whole numbers", rows, "; for a regression set model.class_names to []"
    )
    if names[0] == "-1" and names[1:] == [str(i) for i in range(len(names) - 1)]:
        lines += (f"{column} of {where}: -1 is read as a class; data.skip_label: -1 leaves such rows out",)
    return lines


def _rare_class_note(column: str, where: str, count: int, content: str, rows: int, advice: str) -> tuple[str, ...]:
    """Return a line about classes with few rows each; empty if the classes have more rows."""
    if count <= max(10, rows // 10):
        return ()
    return (f"{column} of {where}: {count:,} different {content} in {rows:,} rows are read as classes{advice}",)


def _alike(column: str, where: str, names: list[str]) -> tuple[str, ...]:
    """Return a line about class names that differ only in case or spaces; empty if there are none."""
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(" ".join(name.casefold().split()), []).append(name)
    similar = next((group for group in by_word.values() if len(group) > 1), None)
    if similar is None:
        return ()
    return (f"{column} of {where}: the classes {' and '.join(map(repr, similar))} differ only in case or spaces",)


def _stored_names(table: Table, column: str) -> list[str] | None:
    """Return the names of a ClassLabel column; None for a column of another kind."""
    from datasets import ClassLabel

    feature = table.data.features[column]
    return feature.names if isinstance(feature, ClassLabel) else None
