"""Labels of a table: whole numbers, names, or the numbers of a regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import DataError
from datamodules.tables import Table, check_column

HIDDEN = " They are hidden: predict is for such a split; GLUE is tested with data.test_on_validation: true."


@dataclass(frozen=True)
class Labels:
    """Targets by row.

    Args:
        values: (rows,) int64, or float32 in regression.
        class_names: Names by label; empty in regression.
        where: What to call the table in a message.
    """

    values: Tensor
    class_names: list[str]
    where: str

    def matched(self, class_names: list[str]) -> Tensor:
        """The labels counted in another list of classes, matched by name.

        Raises:
            DataError: If a class that occurs is not in the list, or only one of the two is a regression.
        """
        if bool(class_names) != bool(self.class_names):
            kinds = ("regression", f"classification into {', '.join(class_names or self.class_names)}")
            model, data = kinds if not class_names else kinds[::-1]
            raise DataError(
                f"data.label_column: the model is for {model}, and the labels of {self.where} are for {data}."
            )
        if class_names == self.class_names:
            return self.values
        used = [self.class_names[i] for i in self.values.unique().tolist()]
        if unknown := [name for name in used if name not in class_names]:
            raise DataError(
                f"data.path: {self.where} has classes that the model was not trained on ({', '.join(unknown[:5])}); it "
                f"knows {len(class_names)}: {', '.join(class_names[:10])}{', …' if len(class_names) > 10 else ''}."
            )
        numbers = torch.tensor([class_names.index(n) if n in class_names else -1 for n in self.class_names])
        return numbers[self.values]


def read_labels(table: Table, column: str, class_names: tuple[str, ...] | None = None) -> Labels:
    """Labels of a column.

    Args:
        table: The rows.
        column: Whole numbers (of a ClassLabel, with its names), names, or decimal numbers for a regression.
        class_names: Names by label, where the column has none of its own; None calls numbers by their digits and sorts
            names; () is a regression.

    Raises:
        DataError: If the column is missing, empty in some row, of another type, not finite, or a label has no name.
    """
    import pyarrow as pa  # as datasets, for a table alone

    check_column(table, "label_column", column)
    cells = table.data.select_columns(column).with_format("arrow")[:][column].combine_chunks()
    if cells.null_count:
        row = cells.is_null().to_pylist().index(True)
        raise DataError(f"data.label_column: {column} in {table.where} is empty in row {row}; mend or drop such rows.")
    if pa.types.is_boolean(cells.type):
        cells, class_names = cells.cast(pa.int64()), class_names or ("0", "1")
    number = pa.types.is_floating(cells.type) or pa.types.is_integer(cells.type)
    named = _stored_names(table, column) is not None
    if (class_names == () and number and not named) or (not class_names and pa.types.is_floating(cells.type)):
        return Labels(_finite(cells, column, table.where), [], table.where)
    if class_names != () and (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        coded = cells.dictionary_encode()
        names = list(class_names or sorted(coded.dictionary.to_pylist()))
        if unknown := [name for name in coded.dictionary.to_pylist() if name not in names]:
            raise DataError(
                f"data.label_column: {column} in {table.where} has {', '.join(unknown[:5])}; the classes of this task "
                f"are {', '.join(names)}."
            )
        order = np.array([names.index(name) for name in coded.dictionary.to_pylist()], dtype=np.int64)
        return Labels(torch.from_numpy(order[coded.indices.to_numpy()]), names, table.where)
    if not pa.types.is_integer(cells.type):
        wanted = "whole numbers or names" if class_names else "numbers" if class_names == () else "numbers or names"
        raise DataError(f"data.label_column: {column} in {table.where} must hold {wanted}, and it holds {cells.type}.")
    values = torch.from_numpy(cells.to_numpy(zero_copy_only=False).astype(np.int64))
    return Labels(values, _names(table, column, values, class_names), table.where)


def _finite(cells: Any, column: str, where: str) -> Tensor:
    values = torch.from_numpy(cells.to_numpy(zero_copy_only=False).astype(np.float32))
    if len(values) and bool((values == -1).all()):
        raise DataError(f"data.label_column: {column} in {where} is -1 throughout.{HIDDEN}")
    wrong = (~values.isfinite()).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"data.label_column: {column} in {where} is {values[row].item()} in row {row}; {len(wrong)} of "
            f"{len(values)} targets are not finite. Mend or drop those rows."
        )
    return values


def _names(table: Table, column: str, values: Tensor, given: tuple[str, ...] | None) -> list[str]:
    names = list(_stored_names(table, column) or given or [str(i) for i in range(int(values.max()) + 1)])
    wrong = ((values < 0) | (values >= len(names))).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        hidden = HIDDEN if bool((values == -1).all()) else " Mend or drop those rows."
        raise DataError(
            f"data.label_column: {column} in {table.where} is {int(values[row])} in row {row}, outside 0 to "
            f"{len(names) - 1}; {len(wrong)} of {len(values)} labels are.{hidden}"
        )
    return names


def _stored_names(table: Table, column: str) -> list[str] | None:
    """The names of a ClassLabel; None for a column of another kind."""
    from datasets import ClassLabel

    feature = table.data.features[column]
    return feature.names if isinstance(feature, ClassLabel) else None
