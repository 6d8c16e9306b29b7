"""Findings of a data module: the lines that a run prints about its data, and the rows that were skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from datamodules.errors import DataError, counted

MOST_LINES = 10


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first names, and the number of other names."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


class SkippedRow(NamedTuple):
    """A row that is left out of its split.

    Args:
        split: `train`, `val`, `test` or `predict`.
        source: File or data set.
        row: Name or number of the row in its source.
        reason: Why the row cannot be used.
    """

    split: str
    source: str
    row: str
    reason: str


class Findings:
    """Collect the lines about the data that a run prints, and the rows that it skips.

    Args:
        skip_bad_rows: Rows of a split that may be skipped, 0 or more.

    Raises:
        DataError: If `skip_bad_rows` is negative.
    """

    def __init__(self, skip_bad_rows: int = 0) -> None:
        if skip_bad_rows < 0:
            raise DataError(f"data.skip_bad_rows: {skip_bad_rows} must be 0 or more.")
        self.skip_bad_rows = skip_bad_rows
        self.skipped: list[SkippedRow] = []
        self._lines: list[str] = []
        self._taken: set[str] = set()

    def add(self, line: str) -> None:
        """Add a line, unless the same line was added before, in this stage or an earlier stage."""
        if line not in self._lines and line not in self._taken:
            self._lines.append(line)

    def add_split(self, split: str, rows: int, source: str) -> None:
        """Add the line of a split: the number of rows, and their source."""
        self.add(f"{split}: {counted(rows, 'row')} of {source}")

    def add_classes(self, class_names: Sequence[str], counts: Sequence[int]) -> None:
        """Add the line of the classes and their counts in the training rows."""
        numbers = [f"{name} {count:,}" for name, count in zip(class_names, counts, strict=True)]
        self.add(f"labels: {counted(len(class_names), 'class')}: {listed(numbers)}")

    def add_numbers(self, mean: float, deviation: float) -> None:
        """Add the line of the labels of a regression: mean and standard deviation in the training rows."""
        self.add(f"labels: numbers, read as a regression; mean {mean:.4g}, standard deviation {deviation:.4g}")

    def add_unread(self, files: Sequence[str]) -> None:
        """Add the line of the files that belong to no split, if there are any."""
        if files:
            self.add(f"not read, since these names mean no split: {listed(files, 3)}")

    def skip(self, row: SkippedRow, error: Exception | None = None) -> None:
        """Skip a row.

        Args:
            row: The row.
            error: Error to raise if `skip_bad_rows` is 0. Otherwise the raised error names the row and the number of
                rows that may be skipped.

        Raises:
            DataError: If `skip_bad_rows` rows of the row's split have been skipped already.
        """
        if sum(other.split == row.split for other in self.skipped) >= self.skip_bad_rows:
            if isinstance(error, DataError) and not self.skip_bad_rows:
                raise error
            raise DataError(
                f"data.skip_bad_rows: {row.row} of {row.source} cannot be used ({row.reason}), and at most "
                f"{counted(self.skip_bad_rows, 'row')} of {row.split} may be skipped. Fix the row, or increase the key."
            ) from error
        self.skipped.append(row)

    def take_lines(self) -> list[str]:
        """Return the lines added since the last call, at most ten. The tenth line may count the other lines."""
        lines, self._lines = self._lines, []
        self._taken.update(lines)
        if len(lines) > MOST_LINES:
            lines = [
                *lines[: MOST_LINES - 1],
                f"and {counted(len(lines) - MOST_LINES + 1, 'more line')} about the data",
            ]
        return lines
