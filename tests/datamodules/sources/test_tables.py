"""The same rows come out of every kind of file and every layout, or one message says what is wrong where."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.errors import DataError
from datamodules.sources.splits import SPLITS
from datamodules.sources.tables import READERS, Reading, Table, check_column, open_file, open_table

SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")
Rows = list[tuple[str, int]]
ROWS: Rows = [("a film", 0), ("the film, it was", 1), ('it "is" not', 0), ("ü\u2028 – 日本", 1)]


def write(file: Path, rows: Rows) -> Path:
    """Columns `text` and `label` as the suffix says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.table({"text": [t for t, _ in rows], "label": [i for _, i in rows]}), file)
    elif file.suffix == ".csv":
        mark = ","
        quoted = [(t.replace('"', '""'), i) for t, i in rows]
        file.write_text(f"text{mark}label\n" + "".join(f'"{t}"{mark}{i}\n' for t, i in quoted), "utf-8")
    else:
        lines = (json.dumps({"text": t, "label": i}, ensure_ascii=False) for t, i in rows)
        file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return file


def put(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, "utf-8")
    return file


def opened(path: Path, splits: Sequence[str] = ("train",), config: str | None = None) -> Table:
    table = open_table(str(path), splits, config)
    assert table is not None
    return table


def rows_of(table: Table) -> Rows:
    columns = table.data[:]
    assert len(table) == len(columns["text"])
    return list(zip(columns["text"], columns["label"], strict=True))


def refuses(*parts: str) -> Any:
    """A DataError whose message has all the parts, in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["{}", "{}-00000-of-00001", "data/{}-0", "{}/0000", "default/{}/0000"])
def test_splits_by_name(tmp_path: Path, name: str, suffix: str) -> None:
    for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        write(tmp_path / (name.format(split) + suffix), rows)
    assert rows_of(opened(tmp_path)) == ROWS[:3]
    assert rows_of(opened(tmp_path, ("test",))) == ROWS[3:]
    assert opened(tmp_path).where == str(tmp_path / (name.format("train") + suffix))
    assert open_table(str(tmp_path), ("validation", "val")) is None


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["train-0000{}", "train-0000{}-of-00004", "train/0000{}"])
def test_shards_follow_each_other(tmp_path: Path, name: str, suffix: str) -> None:
    for i in (2, 0, 3, 1):
        write(tmp_path / (name.format(i) + suffix), ROWS[i : i + 1])
    assert rows_of(opened(tmp_path)) == ROWS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_file_is_training_rows(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"reviews{suffix}", ROWS)
    assert rows_of(opened(file)) == ROWS
    assert rows_of(opened(file, ("other", "train"))) == ROWS
    for splits in (SPLITS["val"], SPLITS["test"]):
        assert open_table(str(file), splits) is None


def test_a_split_under_two_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "dev.csv", ROWS[:1])
    assert rows_of(opened(tmp_path, SPLITS["val"])) == ROWS[:1]
    write(tmp_path / "validation.csv", ROWS[1:2])
    with refuses("data.path", "rows of validation under 2 names, dev and validation"):
        open_table(str(tmp_path), SPLITS["val"])
    others = [name for name in SPLITS["val"] if name != "dev"]
    assert rows_of(opened(tmp_path, others)) == ROWS[1:2]  # as for the shots of MMLU


def test_splits_may_be_of_different_kinds(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:2])
    write(tmp_path / "validation.csv", ROWS[2:])
    assert rows_of(opened(tmp_path)) == ROWS[:2]
    assert rows_of(opened(tmp_path, SPLITS["val"])) == ROWS[2:]


def test_other_files_are_none_of_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ROWS[:1])
    for name in ("train_matched.csv", "mytrain.csv", "train.txt", "train.csv.bak"):
        put(tmp_path / name, "text,label\nno,9\n")
    assert rows_of(opened(tmp_path)) == ROWS[:1]


def test_a_directory_called_train_is_not_the_split(tmp_path: Path) -> None:
    write(tmp_path / "train/train.csv", ROWS[:1])
    write(tmp_path / "train/test.csv", ROWS[1:])
    assert rows_of(opened(tmp_path / "train")) == ROWS[:1]
    assert rows_of(opened(tmp_path / "train", ("test",))) == ROWS[1:]


def test_a_file_that_was_changed_is_read_anew(tmp_path: Path) -> None:
    file = write(tmp_path / "train.csv", ROWS[:2])
    assert rows_of(opened(file)) == ROWS[:2]
    write(file, ROWS[1:])
    assert rows_of(opened(file)) == ROWS[1:]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_path_with_the_signs_of_a_pattern_is_taken_literally(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"run1/train{suffix}", ROWS[:1])
    write(tmp_path / f"run[1]/train{suffix}", ROWS[1:])
    assert rows_of(opened(tmp_path / "run[1]")) == ROWS[1:]


# ------------------------------------------------------------------------------------------------------ configurations


def write_configs(folder: Path, *configs: str) -> Path:
    """A clone of a repository with a folder for each configuration: CNN/DailyMail, GLUE."""
    for i, config in enumerate(configs):
        write(folder / config / "train-00000-of-00001.parquet", ROWS[i : i + 1])
        write(folder / config / "test-00000-of-00001.parquet", ROWS[i + 1 : i + 2])
    return folder


def test_a_folder_of_the_configuration_is_taken(tmp_path: Path) -> None:
    configs = ("1.0.0", "2.0.0", "3.0.0")
    write_configs(tmp_path, *configs)
    for i, config in enumerate(configs):
        assert rows_of(opened(tmp_path, config=config)) == ROWS[i : i + 1]
        assert rows_of(opened(tmp_path, SPLITS["test"], config)) == ROWS[i + 1 : i + 2]
        assert rows_of(opened(tmp_path / config, config=config)) == ROWS[i : i + 1]  # the folder itself
        assert open_table(str(tmp_path), SPLITS["val"], config) is None


@pytest.mark.parametrize("name", ["train", "data/train-0", "train/0000", "default/train/0000"])
def test_a_folder_of_the_configuration_has_any_layout(tmp_path: Path, name: str) -> None:
    write(tmp_path / f"rte/{name}.csv", ROWS[:1])
    write(tmp_path / f"mrpc/{name}.csv", ROWS[1:])
    assert rows_of(opened(tmp_path, config="mrpc")) == ROWS[1:]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_in_the_folders_of_several_configurations(tmp_path: Path, split: str) -> None:
    write_configs(tmp_path, "3.0.0", "1.0.0", "2.0.0")
    with refuses("data.path", f"{tmp_path} has rows of {split} in the folders 1.0.0, 2.0.0, 3.0.0", "give the folder"):
        open_table(str(tmp_path), (split,))
    with refuses("data.path", "in the folders 1.0.0, 2.0.0, 3.0.0", "none of them is 4.0.0", "give the folder"):
        open_table(str(tmp_path), (split,), "4.0.0")


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_only_folder_is_of_another_configuration(tmp_path: Path, split: str) -> None:
    write_configs(tmp_path, "rte")
    with refuses("data.path", f"{tmp_path} has rows of {split} in the folders rte", "none of them is mrpc"):
        open_table(str(tmp_path), (split,), "mrpc")
    assert len(opened(tmp_path, (split,))) == 1  # no other was asked for


def test_a_folder_of_the_configuration_without_rows(tmp_path: Path) -> None:
    write_configs(tmp_path, "rte")
    (tmp_path / "mrpc").mkdir()
    with refuses("data.path", f"{tmp_path / 'mrpc'} holds no file of training rows"):
        open_table(str(tmp_path), ("train",), "mrpc")


@pytest.mark.parametrize("config", [None, "rte"])
def test_rows_beside_a_folder_of_other_rows(tmp_path: Path, config: str | None) -> None:
    write(tmp_path / "train.csv", ROWS[:1])
    write(tmp_path / "old/train.csv", ROWS[1:])
    with refuses("data.path", f"{tmp_path} has rows of train in the folders", "old", "give the folder"):
        open_table(str(tmp_path), ("train",), config)


@pytest.mark.parametrize("config", [None, "rte"])
@pytest.mark.parametrize("name", ["train", "data/train-0", "train/0000", "default/train/0000", "data/train/0000"])
def test_folders_that_are_no_configuration_do_not_count(tmp_path: Path, name: str, config: str | None) -> None:
    write(tmp_path / f"{name}.csv", ROWS[:2])
    assert rows_of(opened(tmp_path, config=config)) == ROWS[:2]
    write(tmp_path / "data/train-9.csv", ROWS[2:])
    assert sorted(rows_of(opened(tmp_path, config=config))) == sorted(ROWS)


# --------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ",")])
def test_words_for_nothing_are_words_and_empty_cells_are_missing(tmp_path: Path, suffix: str, mark: str) -> None:
    words = ["NA", "null", "None", "nan", "N/A", "NULL", "#N/A", "NaN", "<NA>", "n/a"]
    lines = [f"{word}{mark}{i}" for i, word in enumerate(words)]
    file = put(tmp_path / f"train{suffix}", "\n".join([f"text{mark}label", *lines, f"{mark}10", f'""{mark}11']) + "\n")
    columns = opened(file).data[:]
    assert columns["text"] == [*words, None, None]
    assert columns["label"] == list(range(12))


def test_empty_text_and_null_of_jsonl_are_told_apart(tmp_path: Path) -> None:
    file = put(tmp_path / "train.jsonl", '{"text": ""}\n{"text": null}\n{"text": "NA"}\n{}\n')
    assert opened(file).data[:]["text"] == ["", None, "NA", None]


def test_separators_and_line_ends_inside_quotes_belong_to_the_text(tmp_path: Path) -> None:
    put(tmp_path / "train.csv", 'text,label\n"a, ""b""\nc",1\n')
    put(tmp_path / "test.csv", 'text,label\n"a,b",1\n')
    assert opened(tmp_path).data[:]["text"] == ['a, "b"\nc']
    assert opened(tmp_path, ("test",)).data[:]["text"] == ["a,b"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_numbers_are_numbers(tmp_path: Path, suffix: str) -> None:
    features = opened(write(tmp_path / f"train{suffix}", ROWS)).data.features
    assert features["label"].dtype == "int64"
    assert features["text"].dtype in ("string", "large_string")


def test_parquet_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    data.to_parquet(str(tmp_path / "train.parquet"))
    assert opened(tmp_path).data.features["label"].names == ["no", "yes"]


# ----------------------------------------------------------------------------------------------------------- selection


def test_rows_of_a_table_are_taken_in_the_order_that_is_given(tmp_path: Path) -> None:
    table = opened(write(tmp_path / "train.csv", ROWS))
    chosen = table.select(torch.tensor([2, 0]))
    assert rows_of(chosen) == [ROWS[2], ROWS[0]]
    assert chosen.where == table.where
    assert rows_of(table.select(torch.tensor([3, 2, 1, 0]))) == ROWS[::-1]  # as many, in another order
    assert table.select(torch.arange(4)) is table


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "~/nowhere", "some/other/folder"])
def test_a_path_that_is_not_there(path: str) -> None:
    with refuses("data.path", path, "is not here"):
        open_table(path, ("train",))


@pytest.mark.parametrize("name", ["some-data", "some/data"])
def test_a_name_on_the_hub_without_a_connection(name: str) -> None:
    with refuses(
        "data.path", name, "is not a directory here", "could not be loaded from the hub", "--data.path DIRECTORY"
    ):
        open_table(name, ("train",), "config")


def test_the_hub_is_asked_for_a_split_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_dict({"text": ["a"]})
    asked = []

    def names(name: str, config: str | None, revision: str | None) -> list[str]:
        asked.append((name, config, revision))
        return ["train", "valid", "val"]

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, config, revision, split))
        return data

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    table = open_table("some/data", SPLITS["val"], "rte", "refs/convert/parquet")
    assert table is not None
    assert (table.data, table.where) == (data, "some/data/rte/val")
    assert open_table("some/data", SPLITS["test"], "rte") is None
    plain = open_table("some/data", SPLITS["train"])
    assert plain is not None
    assert plain.where == "some/data/train"
    assert asked == [
        ("some/data", "rte", "refs/convert/parquet"),
        ("some/data", "rte", "refs/convert/parquet", "val"),
        ("some/data", "rte", None),
        ("some/data", None, None),
        ("some/data", None, None, "train"),
    ]


def test_a_directory_without_training_rows(tmp_path: Path) -> None:
    write(tmp_path / "test.csv", ROWS)
    with refuses("data.path", str(tmp_path), "no file of training rows", "train.parquet", "train/*.parquet"):
        open_table(str(tmp_path), ("train",))
    assert rows_of(opened(tmp_path, ("test",))) == ROWS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train-0{suffix}", ROWS)
    file = put(tmp_path / f"train-1{suffix}", "")
    with refuses("data.path", f"{file} is an empty file"):
        open_table(str(tmp_path), ("train",))


@pytest.mark.parametrize("keep", [3, 60, -20])
def test_truncated_parquet(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path / "train.parquet", ROWS)
    file.write_bytes(file.read_bytes()[:keep])
    with refuses("data.path", str(file), "cannot be read as parquet", "damaged"):
        open_table(str(tmp_path), ("train",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "la'),
        ("train.jsonl", "text,label\na,1\n"),
        ("train.csv", 'text,label\na,1\n"b'),
        ("train.csv", "text,label\na,1\nb,2,3\n"),
        ("train.csv", 'text,label\na,1\n"b'),
        ("train.parquet", "text,label\na,1\n"),
    ],
)
def test_files_that_are_cut_or_of_another_kind(tmp_path: Path, name: str, content: str) -> None:
    file = put(tmp_path / name, content)
    with refuses("data.path", str(file), f"cannot be read as {file.suffix[1:]}"):
        open_table(str(tmp_path), ("train",))


def test_a_csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00\x81,\xb5\n\xa0,1\n")
    with refuses("data.encoding", "train.csv", "is not utf-8", "likely utf-16"):
        open_table(str(tmp_path), ("train",))


def test_shards_of_other_columns_are_named(tmp_path: Path) -> None:
    files = [put(tmp_path / "train-0.csv", "text,label\na,1\n"), put(tmp_path / "train-1.csv", "body,stars\na,1\n")]
    with refuses("data.path", str(files[0]), str(files[1]), "cannot be read as csv"):
        open_table(str(tmp_path), ("train",))


@pytest.mark.parametrize("name", ["notes.txt", "train"])
def test_a_file_of_an_unknown_kind(tmp_path: Path, name: str) -> None:
    file = put(tmp_path / name, "a")
    with refuses("data.path", str(file), "must be one of .parquet, .csv, .tsv, .jsonl"):
        open_table(str(file), ("train",))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_not_taken_for_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def read(files: list[Path], reading: Reading) -> Any:
        if wrapped:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from full
        raise full

    monkeypatch.setitem(READERS, ".csv", read)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = write(tmp_path / "train.csv", ROWS)
    with refuses(
        "data.path", str(file), f"the cache {tmp_path / 'cache'}", "No space left", "set HF_DATASETS_CACHE"
    ) as told:
        open_table(str(file), ("train",))
    assert "damaged" not in str(told.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    cache = put(tmp_path / "cache", "a file in its place")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    file = write(tmp_path / f"new{suffix}", ROWS)
    with refuses("data.predict_path", str(file), f"the cache {cache}", "set HF_DATASETS_CACHE"):
        open_file(str(file), "predict_path")


# ------------------------------------------------------------------------------------------------------------ one file


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_for_prediction(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"new{suffix}", ROWS)
    table = open_file(str(file), "predict_path")
    assert rows_of(table) == ROWS
    assert table.where == str(file)


def test_no_file_for_prediction(tmp_path: Path) -> None:
    text = put(tmp_path / "new.txt", "a")
    for path in (text, tmp_path / "gone.csv", tmp_path):
        with refuses(f"data.predict_path: {path} is missing, or is not a file of .parquet, .csv, .tsv, .jsonl"):
            open_file(str(path), "predict_path")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [("new.csv", "", "is an empty file"), ("new.jsonl", '{"text', "cannot be read as jsonl")],
)
def test_a_damaged_file_for_prediction_is_told_under_its_key(
    tmp_path: Path, name: str, content: str, part: str
) -> None:
    file = put(tmp_path / name, content)
    with refuses("data.predict_path", str(file), part):
        open_file(str(file), "predict_path")


def test_a_column_that_is_there_and_one_that_is_not(tmp_path: Path) -> None:
    table = opened(write(tmp_path / "train.csv", ROWS))
    check_column(table, "label_column", "label")
    with refuses("data.label_column", table.where, "has no column lable; it has text, label."):
        check_column(table, "label_column", "lable")


def test_a_configuration_below_data(tmp_path: Path) -> None:
    for name in ("rte", "mrpc"):
        put(tmp_path / "data" / name / "train.csv", f"text,label\n{name},1\n")
    table = open_table(str(tmp_path), ("train",), "rte")
    assert table is not None
    assert table.data["text"][:] == ["rte"]


def test_folders_of_several_data_sets_are_told_whatever_their_kinds_and_names(tmp_path: Path) -> None:
    put(tmp_path / "one" / "train.jsonl", '{"text": "a"}\n')
    put(tmp_path / "two" / "train.csv", "text\nb\n")
    with refuses("data.path", "in the folders one, two", "data.config"):
        open_table(str(tmp_path), ("train",))
    put(tmp_path / "one" / "validation.csv", "text\na\n")
    put(tmp_path / "two" / "val.csv", "text\nb\n")
    with refuses("data.path", "in the folders one, two"):
        open_table(str(tmp_path), ("validation", "val"))


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.csv").symlink_to(tmp_path / "gone.csv")
    with refuses("data.path", "train.csv", "link to one that is not there"):
        open_table(str(tmp_path), ("train",))
