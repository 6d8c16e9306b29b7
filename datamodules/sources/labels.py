"""Labels of a table: whole numbers, names, or the numbers of a regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import DataError, SplitError
from datamodules.sources.tables import Table, check_column

HIDDEN = " They are hidden: predict is for such a split; GLUE is tested with data.test_on_validation: true."
BOOLEANS = ["False", "True"]
UNKNOWN = -1  # value of a row without a label


@dataclass(frozen=True)
class Labels:
    """Targets by row.

    Args:
        values: (rows,) int64, or float32 in regression; -1 or no number where a row has none.
        class_names: Names by label; empty in regression.
        where: What to call the table in a message.
        bad: Why a row has no label, by row.
        left_out: Rows that have the label to skip.
        notes: Lines about what was assumed in reading them.
    """

    values: Tensor
    class_names: list[str]
    where: str
    bad: Mapping[int, str] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def matched(self, class_names: list[str]) -> Tensor:
        """Return the labels counted in another list of classes, matched by name.

        Booleans match `True` and `False` in any case, and 0 and 1.

        Raises:
            DataError: If a class that occurs is not in the list, or only one of the two is a regression.
        """
        if bool(class_names) != bool(self.class_names):
            kinds = ("regression", f"classification into {', '.join((class_names or self.class_names)[:10])}")
            model, data = kinds if not class_names else kinds[::-1]
            raise DataError(
                f"data.label_column: the model is for {model}, and the labels of {self.where} are for {data}."
            )
        if class_names == self.class_names:
            return self.values
        places = {name: place for place, name in enumerate(class_names)}
        if self.class_names == BOOLEANS:
            words = {name.lower(): place for place, name in enumerate(class_names)}
            places = {b: words[w] for b, n in zip(BOOLEANS, "01", strict=True) for w in (n, b.lower()) if w in words}
        elif class_names == BOOLEANS:
            places |= {"0": 0, "1": 1}
        used = [self.class_names[i] for i in self.values.unique().tolist() if i != UNKNOWN]
        if unknown := [name for name in used if name not in places]:
            raise DataError(
                f"data.path: {self.where} has classes that the model was not trained on ({', '.join(unknown[:5])}); it "
                f"knows {len(class_names)}: {', '.join(class_names[:10])}{', …' if len(class_names) > 10 else ''}."
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
        f"Fix or drop those rows, or leave them out with data.skip_bad_rows{skip}."
    )


def parse_labels(
    table: Table,
    column: str,
    class_names: tuple[str, ...] | None = None,
    skip_label: str | int | None = None,
) -> Labels:
    """Return the labels of a column, and the rows that have none.

    Args:
        table: The rows.
        column: Whole numbers (of a ClassLabel, with its names), names, booleans, or decimal numbers for a regression.
        class_names: Names by label, where the column has none of its own; None takes the classes that occur: whole
            numbers in their order, called by their digits, booleans as False and True, names sorted; () is a
            regression.
        skip_label: Label of rows to leave out.

    Raises:
        DataError: If the column is missing, of another type, without any label, or has a name that is not given.
    """
    import pyarrow as pa

    check_column(table, "label_column", column)
    cells, notes = _cells(table, column)
    stored = _stored_names(table, column)
    left_out = _equal_rows(cells, stored, skip_label)
    if left_out:
        cells = pa.array(np.where(_mask(left_out, len(cells)), None, cells.to_numpy(zero_copy_only=False)), cells.type)
    null = {int(row) for row in cells.is_null().to_numpy(zero_copy_only=False).nonzero()[0]}
    if len(left_out) == len(cells):
        raise DataError(f"data.skip_label: every label of {table.where} is {skip_label}. Choose another, or none.")
    if len(null) == len(cells):
        raise DataError(f"data.label_column: {column} in {table.where} is empty in row 0 and in all others.")
    bad = dict.fromkeys(sorted(null - left_out), "is empty")
    kind = cells.type
    if pa.types.is_boolean(kind):
        cells, kind, class_names = cells.cast(pa.int64()), pa.int64(), class_names or tuple(BOOLEANS)
    number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    if (class_names == () and number and stored is None) or (not class_names and pa.types.is_floating(kind)):
        values, wrong = _targets(cells, column, table.where, null)
        if class_names is None and bool((values[values.isfinite()] % 1 == 0).all()):
            notes += (
                f"{column} of {table.where}: decimal numbers that are all whole, read as a regression; "
                "write them without a point for classes",
            )
        return Labels(values, [], table.where, dict(sorted((bad | wrong).items())), frozenset(left_out), notes)
    if pa.types.is_integer(kind):
        given = stored or class_names
        if set(cells.unique().to_pylist()) <= {-1, None}:
            rows = f"is -1 in row 0 and in all others; {len(cells):,} of {len(cells):,} labels cannot be used"
            raise SplitError(f"data.label_column: {column} in {table.where} {rows}.{HIDDEN}")
        values, names, wrong = _from_numbers(cells, given) if given else _from_digits(cells)
        if not given:
            notes += _doubts(column, table.where, names, len(cells))
    elif class_names != () and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        values, names = _from_names(cells, column, table.where, class_names)
        wrong = {}
        notes += _alike(column, table.where, names)
    else:
        wanted = "whole numbers or names" if class_names else "numbers" if class_names == () else "numbers or names"
        advice = " A row has one label: lists of labels are not supported." if pa.types.is_list(kind) else ""
        raise DataError(
            f"data.label_column: {column} in {table.where} must hold {wanted}, and it holds {str(kind)[:80]}.{advice}"
        )
    return Labels(values, names, table.where, dict(sorted((bad | wrong).items())), frozenset(left_out), notes)


def _cells(table: Table, column: str) -> tuple[Any, tuple[str, ...]]:
    """Return the cells of a column as one arrow array of their own type, blank names as null."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Json

    if isinstance(table.data.features[column], Json):  # values of several types, in JSON
        values = table.data[column][:]
        if any(isinstance(value, list | dict) for value in values):
            row = next(i for i, value in enumerate(values) if isinstance(value, list | dict))
            raise DataError(
                f"data.label_column: {column} in {table.where} must hold numbers or names, and row {row} holds "
                f"{values[row]!r:.80}. A row has one label."
            )
        cells = pa.array([None if value is None else str(value) for value in values], pa.string())
        return _typed(cells), (f"{column} of {table.where} holds labels of several types",)
    cells = table.data.select_columns(column).with_format("arrow")[:][column].combine_chunks()
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        blank = pc.equal(pc.utf8_trim_whitespace(cells), "")
        cells = pc.if_else(blank, pa.scalar(None, cells.type), cells)
        if column in table.as_written:
            cells = _typed(cells)
        elif (words := _booleans(cells)) is not None:
            cells = words
    return cells, ()


def _typed(cells: Any) -> Any:
    """Return text of a file without types as whole numbers, decimal numbers or booleans, if it is such."""
    import pyarrow as pa
    import pyarrow.compute as pc

    trimmed = pc.utf8_trim_whitespace(cells)
    digits = pc.match_substring_regex(trimmed, r"^[+-]?\d+$").fill_null(True)
    kind = pa.int64() if pc.all(digits).as_py() else pa.float64()  # digits of more than 64 bits stay names
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
    """Return text that is true or false in each row as booleans; None for other text."""
    import pyarrow.compute as pc

    words = pc.utf8_lower(pc.utf8_trim_whitespace(cells))
    found = set(pc.unique(words).to_pylist()) - {None}
    return pc.equal(words, "true") if found and found <= {"true", "false"} else None


def _equal_rows(cells: Any, stored: Sequence[str] | None, label: str | int | None) -> set[int]:
    """Return the rows that have a label, given by its name or its number."""
    if label is None:
        return set()
    coded = cells.dictionary_encode()
    wanted = str(label).strip()
    same = [
        value is not None
        and (_name(value) == wanted or (stored is not None and 0 <= value < len(stored) and stored[value] == wanted))
        for value in coded.dictionary.to_pylist()
    ]
    indices = coded.indices.fill_null(len(same)).to_numpy()
    return {int(row) for row in np.array([*same, False])[indices].nonzero()[0]}


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _mask(rows: set[int], size: int) -> Any:
    mask = np.zeros(size, bool)
    mask[sorted(rows)] = True
    return mask


def _targets(cells: Any, column: str, where: str, null: set[int]) -> tuple[Tensor, dict[int, str]]:
    """Return the numbers of a regression, and the rows whose number is not finite."""
    values = torch.from_numpy(cells.to_numpy(zero_copy_only=False).astype(np.float32))
    if not null and bool((values == -1).all()):
        raise SplitError(f"data.label_column: {column} in {where} is -1 throughout.{HIDDEN}")
    wrong = (~values.isfinite()).nonzero().flatten().tolist()
    return values, {row: f"is {values[row].item()}" for row in wrong if row not in null}


def _from_digits(cells: Any) -> tuple[Tensor, list[str], dict[int, str]]:
    """Return whole numbers as the classes that occur; memory grows with the rows, not with the numbers."""
    coded = cells.dictionary_encode()
    numbers = coded.dictionary.to_pylist()
    order = sorted(numbers)
    return _placed(coded, {number: place for place, number in enumerate(order)}), [str(n) for n in order], {}


def _from_numbers(cells: Any, names: Sequence[str]) -> tuple[Tensor, list[str], dict[int, str]]:
    """Return whole numbers with given names, and the rows whose number has none."""
    coded = cells.dictionary_encode()
    numbers = coded.dictionary.to_pylist()
    places = {number: number for number in numbers if 0 <= number < len(names)}
    values = _placed(coded, places)
    present = cells.is_valid().to_numpy(zero_copy_only=False)
    wrong = ((values == UNKNOWN).numpy() & present).nonzero()[0].tolist()
    reasons = {row: f"is {cells[row].as_py()}, outside 0 to {len(names) - 1}" for row in wrong}
    return values, list(names), reasons


def _from_names(cells: Any, column: str, where: str, given: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    coded = cells.dictionary_encode()
    found = coded.dictionary.to_pylist()
    names = list(given or sorted(found))
    places = {name: place for place, name in enumerate(names)}
    if unknown := [name for name in found if name not in places]:
        raise DataError(
            f"data.label_column: {column} in {where} has {', '.join(unknown[:5])}; the classes of this task "
            f"are {', '.join(names)}."
        )
    return _placed(coded, places), names


def _placed(coded: Any, places: Mapping[Any, int]) -> Tensor:
    """Return the place of each row's value, -1 for a value without one and for no value."""
    order = np.array([*(places.get(value, UNKNOWN) for value in coded.dictionary.to_pylist()), UNKNOWN], np.int64)
    return torch.from_numpy(order[coded.indices.fill_null(len(order) - 1).to_numpy()])


def _doubts(column: str, where: str, names: list[str], rows: int) -> tuple[str, ...]:
    """Return lines about whole numbers that may be no classes."""
    lines: tuple[str, ...] = ()
    if len(names) > max(10, rows // 10):
        lines += (
            f"{column} of {where}: {len(names):,} different whole numbers in {rows:,} rows are read as classes; for a "
            "regression write them with a point (3.0) or set model.class_names to []",
        )
    if names[0] == "-1" and names[1:] == [str(i) for i in range(len(names) - 1)]:
        lines += (f"{column} of {where}: -1 is read as a class; data.skip_label: -1 leaves such rows out",)
    return lines


def _alike(column: str, where: str, names: list[str]) -> tuple[str, ...]:
    """Return a line about names that differ in case or spaces alone."""
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(" ".join(name.casefold().split()), []).append(name)
    alike = next((group for group in by_word.values() if len(group) > 1), None)
    if alike is None:
        return ()
    return (f"{column} of {where}: the classes {' and '.join(map(repr, alike))} differ in case or spaces alone",)


def _stored_names(table: Table, column: str) -> list[str] | None:
    """Return the names of a ClassLabel; None for a column of another kind."""
    from datasets import ClassLabel

    feature = table.data.features[column]
    return feature.names if isinstance(feature, ClassLabel) else None
