from __future__ import annotations

import pytest

from datamodules.errors import DataError
from datamodules.sources.findings import Findings, SkippedRow


def test_at_most_ten_lines_are_returned_and_each_line_once() -> None:
    findings = Findings()
    for i in range(13):
        findings.add(f"line {i}")
        findings.add(f"line {i}")
    lines = findings.take_lines()
    assert lines[:9] == [f"line {i}" for i in range(9)]
    assert lines[9:] == ["and 4 more lines about the data"]
    findings.add("line 12")  # as in a later stage
    assert findings.take_lines() == []


def test_classes_are_listed_with_their_counts() -> None:
    findings = Findings()
    findings.add_split("train", 12_345, "train.csv")
    findings.add_classes([f"c{i}" for i in range(12)], list(range(12)))
    findings.add_numbers(683.25, 0.00012345)
    split, classes, regression = findings.take_lines()
    assert split == "train: 12,345 rows of train.csv"
    assert classes.startswith("labels: 12 classes: c0 0, c1 1,")
    assert classes.endswith("c9 9 and 2 more")
    assert regression == "labels: numbers, read as a regression; mean 683.2, standard deviation 0.0001234"


def test_skip_bad_rows_limits_the_skipped_rows_of_each_split() -> None:
    findings = Findings(2)
    for split in ("train", "val"):
        for row in ("row 1", "row 2"):
            findings.skip(SkippedRow(split, "a.csv", row, "it is empty"))
    with pytest.raises(
        DataError, match=r"data.skip_bad_rows: row 3 of a.csv cannot be used \(it is empty\), and .* 2 rows"
    ):
        findings.skip(SkippedRow("val", "a.csv", "row 3", "it is empty"))
    assert len(findings.skipped) == 4
    with pytest.raises(DataError, match="own words"):
        Findings().skip(SkippedRow("val", "a.csv", "row 3", "it is empty"), DataError("own words"))
    with pytest.raises(DataError, match="skip_bad_rows: -1"):
        Findings(-1)
