"""Findings of a data module: the lines that a run prints about its data, and the rows that were skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from datamodules.errors import DataError

MOST_LINES = 10


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first names, and the number of those that are left out."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class SkippedRow(NamedTuple):
    """A row that is left out of its split.

    Args:
        split: `train`, `val`, `test` or `predict`.
        source: File or data set.
        row: Name or number of the row in it.
        reason: Why it cannot be used.
    """

    split: str
    source: str
    row: str
    reason: str


class Findings:
    """Collects what a data module read, assumed and skipped.

    Args:
        skip_bad_rows: Rows of a split that may be skipped, 0 or more.

    Raises:
        DataError: If that is negative.
    """

    def __init__(self, skip_bad_rows: int = 0) -> None:
        if skip_bad_rows < 0:
            raise DataError(f"data.skip_bad_rows: {skip_bad_rows} must be 0 or more.")
        self.skip_bad_rows = skip_bad_rows
        self.skipped: list[SkippedRow] = []
        self._lines: list[str] = []
        self._taken: set[str] = set()

    def add(self, line: str) -> None:
        """Add a line; a line that was printed before, in an earlier stage too, is left out."""
        if line not in self._lines and line not in self._taken:
            self._lines.append(line)

    def add_split(self, split: str, rows: int, source: str) -> None:
        """Add the line of a split: its number of rows and where they are from."""
        self.add(f"{split}: {rows:,} rows of {source}")

    def add_classes(self, class_names: Sequence[str], counts: Sequence[int]) -> None:
        """Add the line of the classes with their counts in the training rows; no class means a regression."""
        if not class_names:
            self.add("labels: numbers, read as a regression")
            return
        counted = [f"{name} {count:,}" for name, count in zip(class_names, counts, strict=True)]
        self.add(f"labels: {len(class_names):,} classes: {listed(counted)}")

    def add_unread(self, files: Sequence[str]) -> None:
        """Add the line of the files that belong to no split, if there are any."""
        if files:
            self.add(f"not read, since no split is called so: {listed(files, 3)}")

    def skip(self, row: SkippedRow, error: Exception | None = None) -> None:
        """Skip a row.

        Args:
            row: The row.
            error: What is raised if no more rows may be skipped; None makes a message of the row.

        Raises:
            DataError: If `skip_bad_rows` rows of its split have been skipped already.
        """
        if sum(other.split == row.split for other in self.skipped) >= self.skip_bad_rows:
            if isinstance(error, DataError) and not self.skip_bad_rows:
                raise error
            raise DataError(
                f"data.skip_bad_rows: {row.row} of {row.source} cannot be used ({row.reason}), and at most "
                f"{self.skip_bad_rows} rows of {row.split} may be skipped. Fix the row, or raise the key."
            ) from error
        self.skipped.append(row)

    def take_lines(self) -> list[str]:
        """Return the lines found since the last call, at most ten, the last of which counts what is left out."""
        lines, self._lines = self._lines, []
        self._taken.update(lines)
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} more lines about the data"]
        return lines
