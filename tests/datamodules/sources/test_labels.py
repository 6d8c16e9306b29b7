"""Parsing of labels: integers, names, decimal numbers, and values that are no label."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from datamodules.sources.labels import Labels, missing_label, parse_labels
from datamodules.sources.tables import Reading, Table
from tests.support.data import opened, put
from tests.support.refusals import refuses

NAMED = datasets.ClassLabel(names=["no", "maybe", "yes"])
WHOLE, DECIMAL, TEXT, BOOLEAN = (datasets.Value(kind) for kind in ("int64", "float32", "string", "bool"))
Given = tuple[str, ...] | None


def read_table(cells: list[Any], feature: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"label": cells}, features=datasets.Features({"label": feature}))


def read(labels: Any, feature: Any = None, given: Given = None, column: str = "label") -> Labels:
    """Return the parsed labels of a table, where each row must have a label.

    Args:
        labels: Cells of the column of a table called `here`, or the table itself.
        feature: Type of the column. Values are not checked against this type. With None, `datasets` infers the type.
        given: Names of the classes.
        column: Name of the column.
    """
    if not isinstance(labels, Table):
        data = datasets.Dataset.from_dict({"label": labels})
        if feature is NAMED:  # `from_dict` would refuse class numbers out of range
            data = datasets.Dataset(data.data, datasets.DatasetInfo(features=datasets.Features({"label": feature})))
        elif feature is not None:
            data = read_table(labels, feature)
        labels = Table(data, "here")
    parsed = parse_labels(labels, column, given)
    if parsed.bad:
        raise missing_label(parsed, column)
    return parsed


def same(labels: Labels, values: list[Any], class_names: list[str]) -> bool:
    expected = torch.tensor(values, dtype=torch.int64 if class_names else torch.float32)
    equal = torch.equal(labels.values, expected) and labels.values.dtype == expected.dtype
    return equal and labels.class_names == class_names


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("cells", "feature", "given", "values", "names"),
    [
        *(
            ([2, 0, 0, 3], datasets.Value(f"{u}int{n}"), None, [1, 0, 0, 2], ["0", "2", "3"])
            for u, n in (("", 8), ("u", 64))
        ),
        ([10**15, -5, 2], WHOLE, None, [2, 0, 1], ["-5", "2", str(10**15)]),
        ([1, 0, 1], WHOLE, ("bad", "good"), [1, 0, 1], ["bad", "good"]),
        ([0, 0], WHOLE, ("bad", "good"), [0, 0], ["bad", "good"]),
        ([2, 0, 1], WHOLE, (), [2.0, 0.0, 1.0], []),
        ([True, False, True], BOOLEAN, None, [1, 0, 1], ["False", "True"]),
        ([True, False, True], BOOLEAN, ("bad", "good"), [1, 0, 1], ["bad", "good"]),
        (["TRUE", "False", "true"], TEXT, None, [1, 0, 1], ["False", "True"]),
        # class names of the column override given names
        *(([2, 0, 1], NAMED, given, [2, 0, 1], NAMED.names) for given in (None, (), ("a", "b", "c"), ("a", "b"))),
        *(
            (["b", "a", "b", "c"], datasets.Value(kind), None, [1, 0, 1, 2], ["a", "b", "c"])
            for kind in ("string", "large_string")
        ),
        (["10", "9", "10"], TEXT, None, [0, 1, 0], ["10", "9"]),
        *(
            ([0.25, -3.5, 4.0], datasets.Value(k), given, [0.25, -3.5, 4.0], [])
            for k in ("float64", "float32")
            for given in (None, ())
        ),
        ([1.0, 0.0], DECIMAL, None, [1.0, 0.0], []),
        ([-1.0, 0.5], DECIMAL, None, [-1.0, 0.5], []),
    ],
)
def test_labels_of_every_type_are_parsed(
    cells: list[Any], feature: Any, given: Given, values: list[Any], names: list[str]
) -> None:
    assert same(read(cells, feature, given), values, names)
    half = len(cells) // 2  # shards form one column, and rows may be selected
    shards = [read_table(part, feature) for part in (cells[:half], cells[half:]) if part]
    whole = datasets.concatenate_datasets(shards).add_column("other", range(len(cells)))
    assert same(read(Table(whole, "here"), given=given), values, names)
    if names and given is None and feature is not NAMED:
        assert read(Table(whole.select([0, 0]), "here")).values.tolist() in ([0, 0], [1, 1])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("cells", "values", "names"),
    [
        ([True, False, True], [1, 0, 1], ["False", "True"]),
        (["true", " false", "TRUE"], [1, 0, 1], ["False", "True"]),
        ([1001, 2000], [0, 1], ["1001", "2000"]),
        (["1", "9" * 24], [0, 1], ["1", "9" * 24]),
        ([0, "yes", 0], [0, 1, 0], ["0", "yes"]),
        ([0.5, 2.0], [0.5, 2.0], []),
    ],
)
def test_labels_in_files_are_parsed(
    tmp_path: Path, suffix: str, cells: list[Any], values: list[Any], names: list[str]
) -> None:
    lines = "label\n" + "".join(f"{cell}\n" for cell in cells)
    content = lines if suffix == ".csv" else "".join(json.dumps({"label": cell}) + "\n" for cell in cells)
    reading = Reading(as_text=("label",))
    assert same(read(opened(put(tmp_path / f"train{suffix}", content), reading=reading)), values, names)


@pytest.mark.parametrize(
    ("cells", "note"),
    [
        (["Yes", "yes ", "no"], "'Yes' and 'yes '"),
        ([1.0, 2.0], "all whole, read as a regression"),
        ([7 * i for i in range(40)], "40 different whole numbers in 40 rows are read as classes; for a regression"),
        ([0, 1, -1], "-1 is read as a class; data.skip_label: -1"),
        ([f"name {i}" for i in range(40)], "40 different names in 40 rows are read as classes"),
        ([f"${i % 8}" for i in range(40)], None),  # bands of prices
        ([i % 5 for i in range(40)], None),
    ],
)
def test_ambiguous_labels_are_noted(cells: list[Any], note: str | None) -> None:
    notes = read(cells).notes
    assert notes == () if note is None else note in notes[0]


# ----------------------------------------------------------------------------------------------------------- bad input

HIDDEN = ("hidden", "predict", "data.test_on_validation: true")
FOUR = ("a", "b", "c", "d")
LISTS = datasets.List(WHOLE)
BAD: list[tuple[Any, Any, Given, tuple[str, ...]]] = [
    # the message on an empty cell names its row
    *(([0, None, 2, None], NAMED, given, ("is empty in row 1",)) for given in (None, (), FOUR)),
    *(([0.5, None], DECIMAL, given, ("is empty in row 1",)) for given in (None, ())),
    *((["a", None], TEXT, given, ("is empty in row 1",)) for given in (None, FOUR)),
    *(([3, None], WHOLE, given, ("is empty in row 1",)) for given in (None, (), FOUR)),
    *(([True, None], BOOLEAN, given, ("is empty in row 1",)) for given in (None, (), FOUR)),
    ([None, None], WHOLE, None, ("is empty in every row",)),
    # NaN and infinity
    *(
        (pa.array(np.array([0.5, 1, x, 2, x], kind)), None, None, (f"is {x} in row 2; 2 of 5 labels cannot be used",))
        for x in (float("nan"), float("inf"), -float("inf"))
        for kind in ("float32", "float64")
    ),
    # numbers out of range
    ([0, 1, 2, 2], WHOLE, ("a", "b"), ("is 2 in row 2, outside 0 to 1; 2 of 4 labels",)),
    ([0, 1, 3], NAMED, None, ("is 3 in row 2, outside 0 to 2; 1 of 3 labels",)),
    ([0, -1, 1, 0], NAMED, None, ("is -1 in row 1, outside 0 to 2; 1 of 4 labels", "data.skip_label: -1.")),
    ([0, -1, 1, 0], WHOLE, ("a", "b"), ("is -1 in row 1, outside 0 to 1; 1 of 4 labels", "data.skip_label: -1.")),
    # hidden labels
    *(
        ([-1] * 3, feature, given, ("is -1 in every row", *HIDDEN))
        for feature, given in ((NAMED, None), (WHOLE, ("a", "b")), (WHOLE, None))
    ),
    *(([-1, -1], feature, (), ("is -1 in every row", *HIDDEN)) for feature in (WHOLE, DECIMAL)),
    # other types
    ([[0, 1], [1]], LISTS, None, ("must hold numbers or names, and it holds", "lists of labels are not supported")),
    ([0.0, 1.0], DECIMAL, ("a", "b"), ("must hold whole numbers or names, and it holds",)),
    (
        ["0.5", "$7"],
        TEXT,
        (),
        ("must hold numbers, and it holds", "Row 1 holds '$7'. For a regression, write plain numbers"),
    ),
    (["a", "z"], TEXT, ("a", "b"), ("has z; the classes of this task are a, b",)),
]


@pytest.mark.parametrize(("cells", "feature", "given", "parts"), BAD)
def test_bad_labels_are_refused(cells: Any, feature: Any, given: Given, parts: tuple[str, ...]) -> None:
    with refuses("data.label_column: label in here", *parts) as told:
        read(cells, feature, given)
    assert ("hidden" in str(told.value)) is (HIDDEN[0] in parts)


@pytest.mark.parametrize(
    ("cells", "example"),
    [
        *(
            ([form.format(i) for i in range(20)], form.format(0))
            for form in ("${}", "1,{:03}.50", "{},5", "{} %", "€ {}")
        ),
        ([*(f"{i}.5" for i in range(19)), "on request"], "on request"),
        ([f"{i}.5" for i in range(20)], "0.5"),
        ([f"${i}" for i in range(10)] * 2, None),  # bands of prices
        ([f"{i} apples" for i in range(20)], None),
        ([f"c{i}" for i in range(20)], None),
    ],
)
def test_numbers_as_text_are_refused_as_names(cells: list[str], example: str | None) -> None:
    labels = read(cells, TEXT)
    with nullcontext() if example is None else refuses("label in here holds numbers as text, such as", example):
        labels.refuse_numbers_as_names("label")


def test_numbers_as_text_make_a_regression_on_demand() -> None:
    assert same(read(["0.5", " -3 "], TEXT, ()), [0.5, -3.0], [])


def test_bad_files_and_columns_are_refused(tmp_path: Path) -> None:
    with refuses("data.label_column", "here has no column stars; it has label"):
        read([0], column="stars")
    table = opened(put(tmp_path / "train.csv", "label\n0.5\nnone\n1.25\n"))
    with refuses("data.label_column", "must hold numbers, and it holds"):  # a string among numbers
        read(table, given=())
    whole = {str(i): "a" for i in range(99)}
    table = opened(put(tmp_path / "train.json", json.dumps({"label": whole})))
    with refuses("must hold numbers or names, and it holds struct<") as told:
        read(table)
    assert len(str(told.value)) < 300
    with refuses("data.skip_label: every label of here is 1"):
        parse_labels(Table(read_table([1, 1], WHOLE), "here"), "label", skip_label="1")


@pytest.mark.parametrize(
    ("cells", "feature", "skip"),
    [
        ([0, -1, 1], WHOLE, -1),
        (["a", " none", "b"], TEXT, "none"),
        ([0, 1, 2], NAMED, "maybe"),
        ([0, 1, 2], NAMED, 1),
        ([0.5, 3.0, 1.5], DECIMAL, 3),
    ],
)
def test_rows_of_a_label_are_left_out(cells: list[Any], feature: Any, skip: Any) -> None:
    parsed = parse_labels(Table(read_table(cells, feature), "here"), "label", skip_label=skip)
    assert (parsed.left_out, parsed.bad) == ({1}, {})
    assert "none" not in parsed.class_names and "-1" not in parsed.class_names


# ------------------------------------------------------------------------------------------------------------ matching


def labels(values: list[float], class_names: list[str]) -> Labels:
    return Labels(torch.tensor(values), class_names, "here")


@pytest.mark.parametrize(
    ("values", "names", "known", "matched"),
    [
        ([0, 1, 1, 0], ["b", "c"], ["c", "a", "b"], [2, 0, 0, 2]),
        ([1, 0], ["b", "c"], ["b", "c"], [1, 0]),
        ([0, 2], ["a", "b", "c"], ["c", "a"], [1, 0]),  # no row has class b
        ([0, -1], ["b"], ["a", "b"], [1, -1]),
        ([0.5, 2.0], [], [], [0.5, 2.0]),
        *(([1, 0, 1], ["False", "True"], known, [1, 0, 1]) for known in (["0", "1"], ["false", "true"])),
        ([1, 0], ["False", "True"], ["true", "maybe", "FALSE"], [0, 2]),
        ([1, 0, 1], ["0", "1"], ["False", "True"], [1, 0, 1]),
    ],
)
def test_labels_are_matched_by_class_names(
    values: list[float], names: list[str], known: list[str], matched: list[float]
) -> None:
    read = labels(values, names)
    assert read.matched(known).tolist() == matched
    assert read.matched(known).dtype == read.values.dtype
    assert read.values.tolist() == values


@pytest.mark.parametrize(
    ("values", "names", "known", "parts"),
    [
        (
            [3, 0, 1],
            ["a", "b", "c", "d"],
            ["a", "c"],
            ("path: here", "not trained on (b, d)", "The model knows 2: a, c."),
        ),
        (
            [0],
            ["z"],
            [*"0123456789", "x"],
            ("not trained on (z)", "The model knows 11: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"),
        ),
        ([0.5], [], ["a", "b"], ("model is for classification into a, b", "labels of here are for regression")),
        ([0], ["a", "b"], [], ("model is for regression", "labels of here are for classification into a, b")),
    ],
)
def test_labels_without_a_known_class_are_refused(
    values: list[float], names: list[str], known: list[str], parts: tuple[str, ...]
) -> None:
    with refuses("data.", *parts):
        labels(values, names).matched(known)
