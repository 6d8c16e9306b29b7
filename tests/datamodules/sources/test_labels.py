"""Whole numbers, names and decimal numbers as labels, and what is no label."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from datamodules.errors import DataError
from datamodules.sources.labels import Labels, missing_label, parse_labels
from datamodules.sources.tables import Table, open_table

NAMED = datasets.ClassLabel(names=["no", "maybe", "yes"])


def table(labels: list[Any], feature: Any = None) -> Table:
    """A table called `here` with a column `label`; None for the feature lets the library choose."""
    features = None if feature is None else datasets.Features({"label": feature})
    return Table(datasets.Dataset.from_dict({"label": labels}, features=features), "here")


def read_labels(table: Table, column: str, class_names: tuple[str, ...] | None = None) -> Labels:
    """Labels of a column, where each row must have one."""
    labels = parse_labels(table, column, class_names)
    if labels.bad:
        raise missing_label(labels, column)
    return labels


def read(labels: list[Any], feature: Any = None, class_names: tuple[str, ...] | None = None) -> Labels:
    return read_labels(table(labels, feature), "label", class_names)


def refuses(*parts: str) -> Any:
    """A DataError whose message has all the parts, in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def same(labels: Labels, values: list[Any], class_names: list[str]) -> bool:
    dtype = torch.int64 if class_names else torch.float32
    return (
        torch.equal(labels.values, torch.tensor(values, dtype=dtype))
        and labels.values.dtype == dtype
        and labels.class_names == class_names
        and labels.where == "here"
    )


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["int64", "int8", "int32", "uint8", "uint64"])
def test_whole_numbers_are_called_by_their_digits(kind: str) -> None:
    assert same(read([2, 0, 0, 3], datasets.Value(kind)), [1, 0, 0, 2], ["0", "2", "3"])


def test_whole_numbers_take_the_names_that_are_given() -> None:
    assert same(read([1, 0, 1], class_names=("bad", "good")), [1, 0, 1], ["bad", "good"])
    assert same(read([0, 0], class_names=("bad", "good")), [0, 0], ["bad", "good"])


@pytest.mark.parametrize(("given", "names"), [(None, ["False", "True"]), (("bad", "good"), ["bad", "good"])])
def test_booleans_are_classes(given: tuple[str, ...] | None, names: list[str]) -> None:
    assert same(read([True, False, True], datasets.Value("bool"), given), [1, 0, 1], names)


def test_booleans_of_files_are_classes(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("label\nTrue\nFalse\nTrue\n")
    (tmp_path / "test.jsonl").write_text('{"label": true}\n{"label": false}\n{"label": true}\n')
    for split in ("train", "test"):
        opened = open_table(str(tmp_path), (split,))
        assert opened is not None
        found = read_labels(opened, "label")
        assert (found.values.tolist(), found.class_names) == ([1, 0, 1], ["False", "True"])


@pytest.mark.parametrize("given", [None, ("a", "b", "c"), ("a", "b")])
def test_the_names_of_the_column_come_first(given: tuple[str, ...] | None) -> None:
    assert same(read([2, 0, 1], NAMED, given), [2, 0, 1], ["no", "maybe", "yes"])


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_names_count_in_their_own_order(kind: str) -> None:
    labels = ["neutral", "entailment", "neutral", "contradiction"]
    assert same(read(labels, datasets.Value(kind)), [2, 1, 2, 0], ["contradiction", "entailment", "neutral"])


def test_names_that_are_digits_are_names() -> None:
    assert same(read(["10", "9", "10"], datasets.Value("string")), [0, 1, 0], ["10", "9"])


@pytest.mark.parametrize("given", [None, ()])
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_decimal_numbers_are_a_regression(kind: str, given: tuple[str, ...] | None) -> None:
    assert same(read([0.25, -3.5, 4.0], datasets.Value(kind), given), [0.25, -3.5, 4.0], [])


def test_decimal_numbers_that_are_whole_are_a_regression_too() -> None:
    assert same(read([1.0, 0.0], datasets.Value("float64")), [1.0, 0.0], [])


def test_whole_numbers_become_a_regression_on_demand() -> None:
    assert same(read([2, 0, 1], datasets.Value("int64"), ()), [2.0, 0.0, 1.0], [])


def test_classes_with_names_become_no_regression() -> None:
    assert same(read([2, 0, 1], NAMED, ()), [2, 0, 1], ["no", "maybe", "yes"])


def test_another_column_and_a_selection_of_rows() -> None:
    data = datasets.Dataset.from_dict({"label": [9, 9, 9, 9], "stars": [0, 1, 2, 1]}).select([3, 0, 2])
    assert same(read_labels(Table(data, "here"), "stars"), [1, 0, 2], ["0", "1", "2"])


@pytest.mark.parametrize("feature", [NAMED, datasets.Value("float32"), datasets.Value("string")])
def test_shards_are_one_column(feature: Any) -> None:
    cells: list[list[Any]] = [[2, 0], [1, 1, 2]]
    if feature.dtype == "string":
        cells = [[NAMED.names[i] for i in part] for part in cells]
    parts = datasets.concatenate_datasets([table(part, feature).data for part in cells])
    values, names = {
        "int64": ([2, 0, 1, 1, 2], ["no", "maybe", "yes"]),
        "float32": ([2.0, 0.0, 1.0, 1.0, 2.0], []),
        "string": ([2, 1, 0, 0, 2], ["maybe", "no", "yes"]),
    }[feature.dtype]
    assert same(read_labels(Table(parts, "here"), "label"), values, names)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("feature", "labels"),
    [
        (NAMED, [0, None, 2, None]),
        (datasets.Value("float32"), [0.5, None]),
        (datasets.Value("string"), ["a", None]),
        (datasets.Value("int64"), [3, None]),
        (datasets.Value("bool"), [True, None]),
    ],
)
@pytest.mark.parametrize("given", [None, (), ("a", "b", "c", "d")])
def test_an_empty_cell_names_its_row(feature: Any, labels: list[Any], given: tuple[str, ...] | None) -> None:
    if (given, feature.dtype) in (((), "string"), (("a", "b", "c", "d"), "float32")):
        return  # refused for its type
    with refuses("data.label_column", "label in here is empty in row 1"):
        read(labels, feature, given)


@pytest.mark.parametrize(("wrong", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_targets_that_are_not_finite_name_their_row(kind: str, wrong: float, said: str) -> None:
    cells = np.array([0.5, 1.0, wrong, 2.0, wrong], kind)
    data = datasets.Dataset.from_dict({"label": pa.array(cells)})
    with refuses("data.label_column", f"label in here is {said} in row 2; 2 of 5 labels cannot be used"):
        read_labels(Table(data, "here"), "label")


@pytest.mark.parametrize(
    ("feature", "labels", "given", "parts"),
    [
        (datasets.Value("int64"), [0, 1, 2, 2], ("a", "b"), ("is 2 in row 2, outside 0 to 1; 2 of 4 labels",)),
        (NAMED, [0, 1, 3], None, ("is 3 in row 2, outside 0 to 2; 1 of 3 labels",)),
    ],
)
def test_labels_out_of_range(
    feature: Any, labels: list[int], given: tuple[str, ...] | None, parts: tuple[str, ...]
) -> None:
    plain = datasets.Dataset.from_dict({"label": labels})  # the library would refuse to store such a label by name
    data = datasets.Dataset(plain.data, datasets.DatasetInfo(features=datasets.Features({"label": feature})))
    with refuses("data.label_column", "label in here", *parts) as told:
        read_labels(Table(data, "here"), "label", given)
    assert "hidden" not in str(told.value)


@pytest.mark.parametrize(
    ("feature", "given"), [(NAMED, None), (datasets.Value("int64"), ("a", "b")), (datasets.Value("int64"), None)]
)
def test_labels_of_minus_one_are_called_hidden(feature: Any, given: tuple[str, ...] | None) -> None:
    with refuses("is -1 in row 0", "3 of 3 labels", "hidden", "predict", "data.test_on_validation: true"):
        read([-1, -1, -1], feature, given)


@pytest.mark.parametrize("feature", [datasets.Value("int64"), datasets.Value("float32")])
def test_targets_of_minus_one_are_called_hidden(feature: Any) -> None:
    with refuses("label in here is -1 throughout", "hidden", "predict", "data.test_on_validation: true"):
        read([-1, -1], feature, ())


@pytest.mark.parametrize(("feature", "given"), [(NAMED, None), (datasets.Value("int64"), ("a", "b"))])
def test_one_label_of_minus_one_is_not_called_hidden(feature: Any, given: tuple[str, ...] | None) -> None:
    with refuses("is -1 in row 1, outside 0 to ", "; 1 of 4 labels", "data.skip_label: -1.") as told:
        read([0, -1, 1, 0], feature, given)
    assert "hidden" not in str(told.value)
    assert "test_on_validation" not in str(told.value)


def test_targets_of_a_regression_may_be_negative() -> None:
    assert same(read([-1.0, 0.5]), [-1.0, 0.5], [])


@pytest.mark.parametrize(
    ("feature", "labels", "given", "wanted"),
    [
        (datasets.List(datasets.Value("int64")), [[0, 1], [1]], None, "numbers or names"),
        (datasets.Value("float32"), [0.0, 1.0], ("a", "b"), "whole numbers or names"),
        (datasets.Value("string"), ["a", "b"], (), "numbers"),
    ],
)
def test_columns_of_another_type(feature: Any, labels: list[Any], given: tuple[str, ...] | None, wanted: str) -> None:
    with refuses("data.label_column", f"label in here must hold {wanted}, and it holds"):
        read(labels, feature, given)


def test_a_column_that_is_not_there() -> None:
    with refuses("data.label_column", "here has no column stars; it has label"):
        read_labels(table([0]), "stars")


def test_labels_of_mixed_types_in_jsonl_are_names(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"label": 0}\n{"label": "yes"}\n')
    opened = open_table(str(file), ("train",))
    assert opened is not None
    found = read_labels(opened, "label")
    assert (found.values.tolist(), found.class_names) == ([0, 1], ["0", "yes"])
    assert "several types" in found.notes[0]


def test_a_word_among_the_numbers_of_a_csv_is_no_class(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("label\n0.5\nnan\n1.25\n")
    opened = open_table(str(file), ("train",))
    assert opened is not None
    with refuses("data.label_column"):
        read_labels(opened, "label", ())  # as STS-B asks for


# ------------------------------------------------------------------------------------------------------------ matching


def labels(values: list[float], class_names: list[str]) -> Labels:
    return Labels(torch.tensor(values), class_names, "here")


def test_labels_are_matched_by_the_names_of_their_classes() -> None:
    read = labels([0, 1, 1, 0], ["b", "c"])
    assert read.matched(["c", "a", "b"]).tolist() == [2, 0, 0, 2]
    assert read.matched(["c", "a", "b"]).dtype == torch.int64
    assert read.values.tolist() == [0, 1, 1, 0]


def test_the_same_classes_leave_the_labels_as_they_are() -> None:
    read = labels([1, 0], ["b", "c"])
    assert read.matched(["b", "c"]) is read.values


def test_a_class_that_does_not_occur_may_be_unknown() -> None:
    assert labels([0, 2], ["a", "b", "c"]).matched(["c", "a"]).tolist() == [1, 0]


def test_a_class_that_occurs_must_be_known() -> None:
    with refuses("data.path", "here", "not trained on (b, d)", "it knows 2: a, c."):
        labels([3, 0, 1], ["a", "b", "c", "d"]).matched(["a", "c"])


def test_a_list_of_many_classes_is_cut() -> None:
    with refuses("not trained on (z)", "it knows 12: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"):
        labels([0], ["z"]).matched([str(i) for i in range(12)])


def test_a_regression_matches_a_regression() -> None:
    read = labels([0.5, 2.0], [])
    assert read.matched([]) is read.values


def test_a_model_of_classes_over_targets_of_a_regression() -> None:
    with refuses("data.label_column", "model is for classification into a, b", "labels of here are for regression"):
        labels([0.5], []).matched(["a", "b"])


def test_a_model_of_a_regression_over_classes() -> None:
    with refuses("data.label_column", "model is for regression", "labels of here are for classification into a, b"):
        labels([0], ["a", "b"]).matched([])
