"""Sources of tables: every kind of file and layout gives the same rows, or one message names the fault and the file."""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.sources.splits import SPLITS
from datamodules.sources.tables import (
    READERS,
    Reading,
    Table,
    blank_rows,
    check_column,
    check_texts,
    match_columns,
    null_rows,
    open_file,
    open_table,
)
from tests.support.data import fake_hub, opened, put
from tests.support.refusals import refuses
from tests.support.rows import write_rows

SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")
Rows = list[tuple[str, int]]
ROWS: Rows = [("a film", 0), ("the film, it was", 1), ('it "is" not', 0), ("ü\u2028 – 日本", 1)]
each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


def write(file: Path, rows: Rows) -> Path:
    """Write columns `text` and `label` in the format of the suffix."""
    if file.suffix == ".parquet":
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [t for t, _ in rows], "label": [i for _, i in rows]}), file)
        return file
    if file.suffix == ".csv":
        quoted = [(t.replace('"', '""'), i) for t, i in rows]
        return put(file, "text,label\n" + "".join(f'"{t}",{i}\n' for t, i in quoted))
    return put(file, "".join(json.dumps({"text": t, "label": i}, ensure_ascii=False) + "\n" for t, i in rows))


def rows_of(table: Table) -> Rows:
    columns = table.data[:]
    assert len(table) == len(columns["text"])
    return list(zip(columns["text"], columns["label"], strict=True))


# ------------------------------------------------------------------------------------------------------------- layouts


@each_suffix
@pytest.mark.parametrize("name", ["{}", "{}-00000-of-00001", "data/{}-0", "{}/0000", "default/{}/0000"])
def test_splits_are_found_by_name(tmp_path: Path, name: str, suffix: str) -> None:
    for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        write(tmp_path / (name.format(split) + suffix), rows)
    assert rows_of(opened(tmp_path)) == ROWS[:3]
    assert rows_of(opened(tmp_path, ("test",))) == ROWS[3:]
    assert opened(tmp_path).where == str(tmp_path / (name.format("train") + suffix))
    assert open_table(str(tmp_path), ("validation", "val")) is None


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train.csv", "Dev.csv", "TEST.csv"),
        ("train.CSV", "val.CSV", "Testing.Csv"),
        ("training.csv", "dev.csv", "test_data.csv"),
        ("wrapped/Training/0.csv", "wrapped/Validation/0.csv", "wrapped/Testing/0.csv"),
        ("train_set.csv", "evaluation.csv", "test-set.csv"),
        ("train.jsonl", "validation.csv", "test.jsonl"),
    ],
)
def test_names_of_splits_are_recognised(tmp_path: Path, train: str, val: str, test: str) -> None:
    for i, name in enumerate((train, val, test)):
        write(tmp_path / name.replace(".CSV", ".csv").replace(".Csv", ".csv"), ROWS[i : i + 1]).rename(tmp_path / name)
    for name in ("train_matched.csv", "mytrain.csv", "train.txt", "train.csv.bak", "__MACOSX/train.csv"):
        put(tmp_path / name, "text,label\nno,9\n")
    for i, split in enumerate(("train", "val", "test")):
        assert rows_of(opened(tmp_path, SPLITS[split])) == ROWS[i : i + 1]


LINES = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)
TABLE = "text,label\n" + "".join(f"w{i},{i}\n" for i in range(3))


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("Train.TSV", TABLE.replace(",", "\t").encode(), None),
        ("train.csv.gz", gzip.compress(TABLE.encode(), mtime=0), None),
        ("train.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), ROWS),
        ("train.ndjson", LINES.encode(), ROWS),
        ("train.json", f"[{LINES.strip().replace(chr(10), ',')}]".encode(), ROWS),
        ("train.json", f'{{"data": [{LINES.strip().replace(chr(10), ",")}], "version": 2}}'.encode(), ROWS),
        ("train.csv", TABLE.replace("\n", "\r\n").encode(), None),
        ("train.csv", b"\xef\xbb\xbf" + TABLE.encode(), None),
    ],
)
def test_every_kind_of_file_is_read(tmp_path: Path, name: str, content: bytes, rows: Rows | None) -> None:
    put(tmp_path / name, content)
    assert rows_of(opened(tmp_path)) == (rows or [(f"w{i}", i) for i in range(3)])


@each_suffix
@pytest.mark.parametrize("name", ["train-0000{}", "train-0000{}-of-00004", "train/0000{}"])
def test_shards_are_joined_in_order(tmp_path: Path, name: str, suffix: str) -> None:
    for i in (2, 0, 3, 1):
        write(tmp_path / (name.format(i) + suffix), ROWS[i : i + 1])
    assert rows_of(opened(tmp_path)) == ROWS


@each_suffix
def test_a_single_file_has_training_rows_or_rows_to_predict(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"run[1]/reviews{suffix}", ROWS)  # [1] is not taken as a glob pattern
    write(tmp_path / f"run1/reviews{suffix}", ROWS[:1])
    assert rows_of(opened(file)) == rows_of(opened(file, ("other", "train"))) == ROWS
    assert [open_table(str(file), SPLITS[split]) for split in ("val", "test")] == [None, None]
    table = open_file(str(file), "predict_path")
    assert (rows_of(table), table.where) == (ROWS, str(file))
    write(file, ROWS[1:])  # a changed file is read again
    assert rows_of(opened(file)) == ROWS[1:]


def test_a_directory_called_train_may_have_several_splits(tmp_path: Path) -> None:
    write(tmp_path / "train/train.csv", ROWS[:1])
    write(tmp_path / "train/test.csv", ROWS[1:])
    assert rows_of(opened(tmp_path / "train")) == ROWS[:1]
    assert rows_of(opened(tmp_path / "train", ("test",))) == ROWS[1:]


# ------------------------------------------------------------------------------------------------------ configurations


def write_configs(folder: Path, *configs: str) -> Path:
    """Write a repository with one folder for each configuration, as CNN/DailyMail and GLUE have."""
    for i, config in enumerate(configs):
        write(folder / config / "train-00000-of-00001.parquet", ROWS[i : i + 1])
        write(folder / config / "test-00000-of-00001.parquet", ROWS[i + 1 : i + 2])
    return folder


@pytest.mark.parametrize("below", ["", "data/"])
def test_the_folder_of_the_configuration_is_read(tmp_path: Path, below: str) -> None:
    configs = ("1.0.0", "2.0.0", "3.0.0")
    write_configs(tmp_path, *(below + config for config in configs))
    for i, config in enumerate(configs):
        assert rows_of(opened(tmp_path, config=config)) == ROWS[i : i + 1]
        assert rows_of(opened(tmp_path, SPLITS["test"], config)) == ROWS[i + 1 : i + 2]
        # data.path may be this folder
        assert rows_of(opened(tmp_path / below / config, config=config)) == ROWS[i : i + 1]
        assert open_table(str(tmp_path), SPLITS["val"], config) is None


@pytest.mark.parametrize("name", ["train", "data/train-0", "train/0000", "default/train/0000", "data/train/0000"])
def test_folders_of_splits_are_not_configurations(tmp_path: Path, name: str) -> None:
    write(tmp_path / f"rte/{name}.csv", ROWS[:1])
    write(tmp_path / f"mrpc/{name}.csv", ROWS[1:])
    assert rows_of(opened(tmp_path, config="mrpc")) == ROWS[1:]
    for config in (None, "rte"):
        write(tmp_path / f"{config}/plain/{name}.csv", ROWS[:2])
        write(tmp_path / f"{config}/plain/data/train-9.csv", ROWS[2:])
        assert sorted(rows_of(opened(tmp_path / f"{config}/plain", config=config))) == sorted(ROWS)


# --------------------------------------------------------------------------------------------------------------- cells


def test_words_such_as_na_are_text_and_empty_cells_are_missing(tmp_path: Path) -> None:
    words = ["NA", "null", "None", "nan", "N/A", "NULL", "#N/A", "NaN", "<NA>", "n/a"]
    lines = [f"{word},{i}" for i, word in enumerate(words)]
    file = put(tmp_path / "train.csv", "\n".join(["text,label", *lines, ",10", '"",11', '"a, ""b""\nc",12']) + "\n")
    assert rows_of(opened(file)) == [*((word, i) for i, word in enumerate([*words, None, None, 'a, "b"\nc']))]
    write_rows(tmp_path / "train.jsonl", [{"text": ""}, {"text": None}, {"text": "NA"}, {}])
    assert opened(tmp_path / "train.jsonl").data["text"][:] == ["", None, "NA", None]


def test_the_index_of_pandas_is_not_a_column(tmp_path: Path) -> None:
    rows = pd.DataFrame({"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 1]})
    rows[rows["label"] == 1].to_parquet(tmp_path / "train.parquet")
    assert "__index_level_0__" in pq.read_schema(tmp_path / "train.parquet").names
    assert opened(tmp_path / "train.parquet").data.to_dict() == {"text": ["a", "c", "d"], "label": [1, 1, 1]}


def test_types_of_columns_are_inferred_or_kept(tmp_path: Path) -> None:
    for suffix in (".csv", ".jsonl"):
        features = opened(write(tmp_path / f"train{suffix}", ROWS)).data.features
        assert (features["label"].dtype, features["text"].dtype.removeprefix("large_")) == ("int64", "string")
    named = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, named).to_parquet(str(tmp_path / "train.parquet"))
    assert opened(tmp_path / "train.parquet").data.features["label"].names == ["no", "yes"]
    put(tmp_path / "digits.csv", "text,label\n007,1\n1.50,0\n")
    assert opened(tmp_path / "digits.csv", reading=Reading(as_text=("text",))).data["text"][:] == ["007", "1.50"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-32", "latin-1"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_encodings_need_data_encoding(tmp_path: Path, encoding: str, suffix: str) -> None:
    content = 'text\ncafé\n"Straße"\n' if suffix == "csv" else '{"text": "café"}\n{"text": "Straße"}\n'
    put(tmp_path / f"train.{suffix}", content, encoding)
    likely = "cp1252" if encoding == "latin-1" else encoding
    with refuses("data.encoding: ", f"train.{suffix} is not utf-8", f"likely {likely}"):
        open_table(str(tmp_path), ["train"])
    assert opened(tmp_path, reading=Reading(encoding)).data["text"][:] == ["café", "Straße"]


@pytest.mark.parametrize("encoding", ["rot13", "base64", "hex", "nonsense"])
def test_encodings_that_are_no_text_encodings_are_refused(encoding: str) -> None:
    with refuses(f"data.encoding: '{encoding}' is unknown to Python"):
        Reading(encoding)


def test_tsv_rows_joined_by_a_stray_quotation_mark_are_noted(tmp_path: Path) -> None:
    put(tmp_path / "train.tsv", 'text\tlabel\na\t0\n"b\t1\nc\t0\n"d\t1\ne\t0\n')
    (note,) = opened(tmp_path, reading=Reading(as_text=("text", "label"))).notes
    assert "text of" in note and "1 cell holds tabs and line breaks" in note


def test_select_returns_rows_in_the_given_order(tmp_path: Path) -> None:
    table = opened(write(tmp_path / "train.csv", ROWS))
    chosen = table.select(torch.tensor([2, 0]))
    assert (rows_of(chosen), chosen.where) == ([ROWS[2], ROWS[0]], table.where)
    assert rows_of(table.select(torch.tensor([3, 2, 1, 0]))) == ROWS[::-1]  # all rows in another order
    assert table.select(torch.arange(4)) is table
    check_column(table, "label_column", "label")
    with refuses("data.label_column", table.where, "has no column lable; it has text, label. Did you mean 'label'?"):
        check_column(table, "label_column", "lable")
    with refuses("has no column LABELS; it has text, label. Did you mean 'label'?"):
        check_column(table, "label_column", "LABELS")


def test_columns_may_differ_in_case(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("Text,LABEL,label,k\n007,1,a,2\n008,0,b,3\n")
    table = open_table(str(path), ["train"], reading=Reading(as_text=("text",)))
    assert table is not None
    matched = match_columns(table, {"text_columns[0]": "text", "label_column": "label", "id_column": "id"})
    assert matched.data.column_names == ["text", "LABEL", "label", "k"]  # `label` itself is there
    assert matched.data["text"][:] == ["007", "008"]  # read as text under the name in the file
    assert matched.as_text == {"text"}
    assert matched.notes == (f"data.text_columns[0]: text is read from the column Text of {path}",)
    assert match_columns(matched, {"text_columns[0]": "text"}) is matched
    assert match_columns(table, {"label_column": "Label"}) is table  # two names differ in case alone


# ---------------------------------------------------------------------------------------------------- columns of text


def column(cells: list[Any], feature: Any = None) -> Table:
    features = None if feature is None else datasets.Features({"text": feature})
    return Table(datasets.Dataset.from_dict({"text": cells}, features=features), "here")


@pytest.mark.parametrize(
    ("cells", "kind", "texts"),
    [
        (["a", None], "string", ["a", None]),
        (["a", None], "large_string", ["a", None]),
        ([7, None], "int64", ["7", None]),
        ([0.5, 2.0], "float64", ["0.5", "2.0"]),
        ([True, False], "bool", ["True", "False"]),
    ],
)
def test_numbers_in_a_text_column_are_read_as_text(cells: list[Any], kind: str, texts: list[Any]) -> None:
    table = column(cells, datasets.Value(kind))
    two_columns = Table(table.data.add_column("more", cells), "here")
    checked = check_texts(two_columns, "source_column", "text")
    assert (checked.data["text"][:], checked.data.column_names) == (texts, ["text", "more"])
    assert checked.notes == (() if "string" in kind else (f"text of here holds {kind}, read as text",))


@pytest.mark.parametrize(
    ("cells", "feature", "message"),
    [
        ([None, None], datasets.Value("null"), "text in here is empty in every row"),
        ([0, 1], datasets.ClassLabel(names=["a", "b"]), "must hold text, and it holds"),
        ([["a"], ["b"]], datasets.List(datasets.Value("string")), "must hold text, and it holds List"),
        ([b"a"], datasets.Value("binary"), "must hold text, and it holds binary"),
    ],
)
def test_a_column_without_text_is_refused(cells: list[Any], feature: Any, message: str) -> None:
    with refuses("data.source_column", message):
        check_texts(column(cells, feature), "source_column", "text")


def test_a_jsonl_column_may_mix_texts_and_numbers(tmp_path: Path) -> None:
    mixed = opened(write_rows(tmp_path / "train.jsonl", [{"text": "a"}, {"text": 3}]))
    assert check_texts(mixed, "text_columns", "text").data["text"][:] == ["a", "3"]


@pytest.mark.parametrize(("empty", "size"), [([0], 3), ([2, 4], 6), ([10_000, 10_001], 10_100)])
def test_rows_without_text_are_found(empty: list[int], size: int) -> None:
    table = column([None if i in empty else " " if i == 1 else "a" for i in range(size)])
    assert null_rows(table, "text") == set(empty)
    assert blank_rows(table, "text") == {*empty, 1}
    chosen = Table(table.data.select([1, empty[0]]), "here")
    assert null_rows(chosen, "text") == {1}


# ----------------------------------------------------------------------------------------------------------------- hub


def test_an_existing_split_is_requested_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = fake_hub(monkeypatch, lambda split: [{"text": split}], "train", "valid", "val")
    table = opened(Path("some/data"), SPLITS["val"], "rte", revision="refs/convert/parquet")
    assert (table.data["text"][:], table.where) == (["val"], "some/data/rte/val")
    assert open_table("some/data", SPLITS["test"], "rte") is None
    assert opened(Path("some/data"), SPLITS["train"]).where == "some/data/train"
    first, second = ("some/data", "rte", "refs/convert/parquet"), ("some/data", None, None)
    assert requests == [first, first, ("some/data", "rte", None), second, second]


# ----------------------------------------------------------------------------------------------------------- bad input

Files = dict[str, str | bytes]
PARQUET = "train.parquet"
# files, arguments of open_table, parts of the message
BAD: dict[str, tuple[Files, dict[str, Any], tuple[str, ...]]] = {
    "a split twice": (
        {"dev.csv": TABLE, "validation.csv": TABLE},
        {"splits": SPLITS["val"]},
        ("rows of validation under 2 names, dev and validation",),
    ),
    "several configurations": (
        {f"{name}/train.csv": TABLE for name in ("3.0.0", "1.0.0")},
        {},
        ("has rows of train in the folders 1.0.0, 3.0.0", "Give the folder"),
    ),
    "another configuration": (
        {f"{name}/test.csv": TABLE for name in ("3.0.0", "1.0.0")},
        {"splits": ("test",), "config": "4.0.0"},
        ("in the folders 1.0.0, 3.0.0", "none of them is 4.0.0", "Give the folder"),
    ),
    "the only one is another": (
        {"rte/train.csv": TABLE},
        {"config": "mrpc"},
        ("has rows of train in the folders rte", "none of them is mrpc"),
    ),
    "a configuration without rows": (
        {"rte/train.csv": TABLE, "mrpc/notes.txt": ""},
        {"config": "mrpc"},
        ("mrpc holds no file of training rows",),
    ),
    "rows beside a folder": ({"train.csv": TABLE, "old/train.csv": TABLE}, {}, ("in the folders", "old", "Give the")),
    "rows beside another folder": ({"train.csv": TABLE, "old/train.csv": TABLE}, {"config": "rte"}, ("old",)),
    "kinds of two sets": ({"one/train.jsonl": LINES, "two/train.csv": TABLE}, {}, ("one, two", "data.config")),
    "names of two sets": (
        {"one/validation.csv": TABLE, "two/val.csv": TABLE},
        {"splits": SPLITS["val"]},
        ("in the folders one, two",),
    ),
    "no training rows": ({"test.csv": TABLE}, {}, ("no file of training rows", "train.parquet", "train/*.parquet")),
    "an unknown name": ({"reviews.csv": TABLE}, {}, ("The folder holds reviews.csv. Rename the files, or give one",)),
    **{
        f"an empty {suffix}": ({f"train-0{suffix}": b"PAR1", f"train-1{suffix}": ""}, {}, ("is an empty file",))
        for suffix in SUFFIXES
    },
    "cut lines": ({"train.jsonl": '{"text": "a"}\n{"text": "b", "la'}, {}, ("line 2 of", "cannot be read as jsonl")),
    "no lines": ({"train.jsonl": TABLE}, {}, ("cannot be read as jsonl",)),
    "a cut cell": (
        {"train.csv": 'text,label\na,1\n"b,2\nc,1\n'},
        {},
        ("cannot be read as csv", "near line 3, is never"),
    ),
    "more cells": ({"train.csv": "text,label\na,1\nb,2,3\n"}, {}, ("Line 3 has 3 cells, and the first line names 2",)),
    "longer rows": ({"train.csv": "text,label\na,1,x\nb,2,y\n"}, {}, ("more cells than its first line has names",)),
    "a column twice": (
        {"train.csv": "text,text,label\na,b,1\n"},
        {"reading": Reading(as_text=("text",))},
        ("has 2 columns text",),
    ),
    "no Parquet": ({PARQUET: TABLE}, {}, (PARQUET, "cannot be read as parquet", "damaged")),
    "no text": (
        {"train.csv": b"\xff\xfe\x00\x81,\xb5\n\xa0,1\n"},
        {},
        ("encoding", "is not utf-8", "likely utf-16"),
    ),
    "a byte of no text": ({"train.jsonl": b'{"text": "a"}\n\xff\n'}, {}, ("line 2 of",)),
    "shards of other columns": (
        {"train-0.csv": TABLE, "train-1.csv": "body,stars\na,1\n"},
        {},
        ("train-0.csv", "train-1.csv", "cannot be read as csv"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(tmp_path: Path, case: str) -> None:
    files, arguments, parts = BAD[case]
    for name, content in files.items():
        put(tmp_path / name, content)
    with refuses("data.", *parts):
        open_table(str(tmp_path), **{"splits": ("train",), **arguments})


@pytest.mark.parametrize("keep", [3, 60, -20])
def test_truncated_parquet_is_refused(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path / PARQUET, ROWS)
    file.write_bytes(file.read_bytes()[:keep])
    with refuses("data.path", str(file), "cannot be read as parquet", "damaged"):
        open_table(str(tmp_path), ("train",))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *((path, "is not here") for path in ("/nowhere/at/all", "./nowhere", "~/nowhere", "some/other/folder")),
        *((path, "could not be loaded from the hub") for path in ("some-data", "some/data")),
    ],
)
def test_a_missing_path_is_refused(path: str, message: str) -> None:
    with refuses("data.path", path, message, *(["--data.path DIRECTORY"] if "hub" in message else [])):
        open_table(path, ("train",), "config")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("new.txt", "a", " is no table. Name a file of .parquet, .csv, .tsv, .jsonl"),
        ("gone.csv", None, " is missing. Name an existing file (.parquet"),
        (".", None, " is a folder. Name one file of the folder (.parquet, .csv"),
        ("new.csv", "", "is an empty file"),
        ("new.jsonl", '{"text', "cannot be read as jsonl"),
    ],
)
def test_the_message_on_a_bad_file_to_predict_names_its_key(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if content is not None:
        put(tmp_path / name, content)
    with refuses("data.predict_path", str(tmp_path / name), message):
        open_file(str(tmp_path / name), "predict_path")
    if name == "new.txt":
        with refuses("data.path", str(tmp_path / name), "must be one of .parquet, .csv, .tsv, .jsonl"):
            open_table(str(tmp_path / name), ("train",))


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").symlink_to(tmp_path / "gone.csv")
    with refuses("data.path", "train.csv", "is a broken link"):
        open_table(str(tmp_path), ("train",))


def no_room(wrapped: bool) -> Callable[[list[Path], Reading], Any]:
    def read(files: list[Path], reading: Reading) -> Any:
        full = OSError(errno.ENOSPC, "No space left on device")
        if wrapped:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from full
        raise full

    return read


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_not_reported_as_a_damaged_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    monkeypatch.setitem(READERS, ".csv", no_room(wrapped))
    file = write(tmp_path / "train.csv", ROWS)
    with refuses("data.path", str(file), f"the cache {cache}", "No space left", "set HF_DATASETS_CACHE") as raised:
        open_table(str(file), ("train",))
    assert "damaged" not in str(raised.value)


@each_suffix
def test_an_unwritable_cache_is_one_message(tmp_path: Path, cache: Path, suffix: str) -> None:
    put(cache, "a file in its place")
    file = write(tmp_path / f"new{suffix}", ROWS)
    with refuses("data.predict_path", str(file), f"the cache {cache}", "set HF_DATASETS_CACHE"):
        open_file(str(file), "predict_path")
