"""GLUE's tasks in the hub's format, and the user's data: labels, classes, batches of pairs, submissions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch

from app.callbacks.prediction_writer import write_rows
from datamodules.text_classification import TASKS, TextClassificationData
from tests.backbones import word_tokenizer
from tests.support.data import put, set_up
from tests.support.refusals import refuses
from tests.support.trainers import text_model

Files = Callable[..., Path]
ENTAILMENT = ["entailment", "not_entailment"]


class Hub(NamedTuple):
    """A task in `nyu-mll/glue`, and the files that GLUE's server expects."""

    columns: list[str]
    names: list[str]
    metrics: list[str]
    files: list[str]


HUB = {
    "cola": Hub(["sentence"], ["unacceptable", "acceptable"], ["matthews"], ["CoLA.tsv"]),
    "sst2": Hub(["sentence"], ["negative", "positive"], ["accuracy"], ["SST-2.tsv"]),
    "mrpc": Hub(["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ["accuracy", "f1"], ["MRPC.tsv"]),
    "qqp": Hub(["question1", "question2"], ["not_duplicate", "duplicate"], ["accuracy", "f1"], ["QQP.tsv"]),
    "stsb": Hub(["sentence1", "sentence2"], [], ["pearson", "spearman"], ["STS-B.tsv"]),
    "mnli": Hub(
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
        ["accuracy"],
        ["MNLI-m.tsv", "MNLI-mm.tsv"],
    ),
    "qnli": Hub(["question", "sentence"], ENTAILMENT, ["accuracy"], ["QNLI.tsv"]),
    "rte": Hub(["sentence1", "sentence2"], ENTAILMENT, ["accuracy"], ["RTE.tsv"]),
    "wnli": Hub(["sentence1", "sentence2"], ["not_entailment", "entailment"], ["accuracy"], ["WNLI.tsv"]),
}
SIZES = {"train": 30, "validation": 12, "test": 7}
MARKS = {"train": "good", "validation": "bad", "test": "film", "mismatched": "is"}  # words of the vocabulary
TEXT: dict[str, Any] = {"text_columns": ["text"]}


def texts_of(split: str, row: int) -> list[str]:
    """Return two sentences that identify split and row. Lengths differ."""
    mark = MARKS["mismatched" if split.endswith("_mismatched") else split.removesuffix("_matched")]
    return [f"{mark} w{row}" + " a" * (row % 5), "the" + " ." * (row % 3)]


def label_of(row: int, classes: int) -> int | float:
    return row % classes if classes else row / 4


def write_rows_of(file: Path, split: str, size: int, columns: list[str], label: Any, cells: list[Any]) -> None:
    rows = [texts_of(split, row) for row in range(size)]
    features = {**{c: datasets.Value("string") for c in columns}, "label": label, "idx": datasets.Value("int32")}
    content = {c: [row[i] for row in rows] for i, c in enumerate(columns)}
    content |= {"label": cells, "idx": [100 + row for row in range(size)]}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(content, features=datasets.Features(features)).to_parquet(str(file))


def write_task(folder: Path, task: str, *, hidden: bool = True, **sizes: int) -> Path:
    """Write a task in the hub's files and columns, and return the folder."""
    classes = len(HUB[task].names)
    label = datasets.ClassLabel(names=HUB[task].names) if classes else datasets.Value("float32")
    for split, size in {**SIZES, **sizes}.items():
        several = task == "mnli" and split != "train"
        for name in (f"{split}_matched", f"{split}_mismatched") if several else (split,):
            cells = [-1] * size if hidden and split == "test" else [label_of(row, classes) for row in range(size)]
            file = folder / task / f"{name}-00000-of-00001.parquet"
            if size:
                write_rows_of(file, name, size, HUB[task].columns, label, cells)
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return a function that writes the directory of a task once. Tests must not change it."""
    written: dict[str, Path] = {}

    def files(task: str, **keys: Any) -> Path:
        name = f"{task} {keys}"
        if name not in written:
            written[name] = write_task(tmp_path_factory.mktemp(task), task, **keys)
        return written[name]

    return files


def prepared(path: Path, stage: str = "fit", *, model: Any = None, rank: int = 0, world: int = 1, **keys: Any) -> Any:
    data = TextClassificationData(str(path), **{"batch_size": 4, "max_length": 32, **keys})
    return set_up(data, model or text_model(word_tokenizer()), stage, world, rank)


def found(dataset: Any) -> list[tuple[str, int]]:
    """Return the mark and the row of each sample, read from its text."""
    words = [word_tokenizer().convert_ids_to_tokens(ids) for ids in dataset.data["input_ids"]]
    return [(w[1], int(w[2].removeprefix("w"))) for w in words]


def all_of(split: str, size: int) -> list[tuple[str, int]]:
    return [(MARKS[split], row) for row in range(size)]


def labels_of(data: Any, split: str = "train") -> list[int | float]:
    values: list[int | float] = data.splits[split][0].targets["label"].tolist()
    return values


def csv(file: Path, labels: list[Any]) -> Path:
    """Write a table with one word in each row, and return its folder."""
    return put(file, "text,label\n" + "".join(f"w{i},{label}\n" for i, label in enumerate(labels))).parent


# --------------------------------------------------------------------------------------------------------------- tasks


def test_the_tasks_are_the_nine_of_glue() -> None:
    assert set(TASKS) == set(HUB)


@pytest.mark.parametrize("task", HUB)
def test_every_task_is_read_in_the_hubs_format(hub: Files, task: str) -> None:
    data = prepared(hub(task), task=task)
    known = HUB[task]
    assert (data.columns, data.class_names, data.metrics) == (known.columns, known.names, known.metrics)
    (train,) = data.splits["train"]
    texts = [texts_of("train", row)[: len(known.columns)] for row in range(30)]
    assert train.data["input_ids"][:] == word_tokenizer()(*zip(*texts, strict=True))["input_ids"]
    assert train.targets["label"].tolist() == [label_of(row, len(known.names)) for row in range(30)]
    assert train.targets["label"].dtype == (torch.int64 if known.names else torch.float32)
    assert data.set_names == {"train": [""], "val": ["matched", "mismatched"] if task == "mnli" else [""]}
    with refuses("data.label_column", "test", "hidden", "data.test_on_validation: true"):
        data.check_test_split()


@pytest.mark.parametrize("task", HUB)
def test_class_names_of_a_task_are_used_for_numbers_in_a_file(tmp_path: Path, task: str) -> None:
    label = datasets.Value("int64")  # for STS-B too, which stays a regression
    for split in ("train", "validation"):
        write_rows_of(tmp_path / f"{split}.parquet", split, 12, HUB[task].columns, label, [0, 1] * 6)
    data = prepared(tmp_path, task=task)
    assert data.class_names == HUB[task].names
    assert labels_of(data, "val") == [0, 1] * 6


@pytest.mark.parametrize("task", ["mrpc", "wnli"])
def test_names_in_a_file_keep_the_class_numbers_of_the_task(tmp_path: Path, task: str) -> None:
    """F1 depends on the class with number 1, and a submission has class numbers."""
    names = [HUB[task].names[row % 2] for row in range(20)]
    write_rows_of(tmp_path / "train.parquet", "train", 20, HUB[task].columns, datasets.Value("string"), names)
    assert prepared(tmp_path, task=task).class_names == HUB[task].names


def test_a_directory_may_have_one_task_or_several(tmp_path: Path) -> None:
    write_task(tmp_path, "rte")
    write_task(tmp_path, "cola")
    of_one_task, several = prepared(tmp_path / "rte", task="rte"), prepared(tmp_path, task="rte")
    assert found(of_one_task.splits["train"][0]) == found(several.splits["train"][0]) == all_of("train", 30)
    (tmp_path / "rte").rename(tmp_path / "mine")
    assert found(prepared(tmp_path, task="rte", config="mine").splits["train"][0]) == all_of("train", 30)
    for stage, split in (("fit", "train"), ("predict", "test")):
        with refuses("data.path", f"has rows of {split} in the folders cola, mine", "none of them is mrpc"):
            prepared(tmp_path, stage, task="mrpc")


def test_mnli_has_matched_and_mismatched_sets(hub: Files) -> None:
    data = prepared(hub("mnli", hidden=False), task="mnli", max_val_samples=5)
    data.check_test_split()
    data.setup("test")
    assert data.set_names == {"train": [""], "val": ["matched", "mismatched"], "test": ["matched", "mismatched"]}
    assert [found(part) for part in data.splits["test"]] == [all_of("test", 7), all_of("mismatched", 7)]
    assert [loader.dataset for loader in data.val_dataloader()] == data.splits["val"]
    for part, mark in zip(data.splits["val"], ("bad", "is"), strict=True):
        assert len(set(found(part))) == 5
        assert {word for word, _ in found(part)} == {mark}
        assert part.targets["label"].tolist() == [row % 3 for _, row in found(part)]
    data = prepared(hub("mnli"), task="mnli", test_on_validation=True)
    data.setup("test")
    assert [found(part) for part in data.splits["test"]] == [all_of("validation", 12), all_of("mismatched", 12)]
    assert data.set_names["val"] == [""]


# ------------------------------------------------------------------------------------------------------ the user's data


@pytest.mark.parametrize(
    ("labels", "names", "values"),
    [
        (["0", "2", "1", "2"], ["0", "1", "2"], [0, 2, 1, 2]),
        (["no", "yes", "no", "no"], ["no", "yes"], [0, 1, 0, 0]),
        (["True", "False", "True", "True"], ["False", "True"], [1, 0, 1, 1]),
        (["0.5", "1.25", "3.0", "2.0"], [], [0.5, 1.25, 3.0, 2.0]),
    ],
)
def test_labels_decide_the_kind_of_task(
    tmp_path: Path, labels: list[str], names: list[str], values: list[float]
) -> None:
    for split in ("train", "validation"):
        csv(tmp_path / f"{split}.csv", labels)
    data = prepared(tmp_path, **TEXT)
    assert (data.class_names, labels_of(data)) == (names, values)
    assert data.metrics == (["accuracy", "macro_f1"] if names else ["pearson", "spearman"])


def test_keys_name_the_columns(tmp_path: Path) -> None:
    put(tmp_path / "train.csv", "body,stars,title\n" + "".join(f"w{i},{i % 2},good\n" for i in range(20)))
    data = prepared(tmp_path, text_columns=["title", "body"], label_column="stars", val_fraction=0.5)
    ids = data.splits["train"][0].data["input_ids"][:]
    rows = [int(word_tokenizer().decode(row).split()[-2].removeprefix("w")) for row in ids]
    assert ids == [word_tokenizer()("good", f"w{row}")["input_ids"] for row in rows]
    assert labels_of(data) == [row % 2 for row in rows]


@pytest.mark.parametrize(
    ("labels", "known", "values"),
    [
        (["yes", "maybe", "no"], ["yes", "no", "maybe"], [0, 2, 1]),
        ([3, 0, 3], ["0", "1", "2", "3"], [3, 0, 3]),  # an older checkpoint, whose classes are named by numbers from 0
        ([5, 0, 3], [], [5.0, 0.0, 3.0]),
    ],
)
def test_classes_of_the_model_override_those_of_the_data(
    tmp_path: Path, labels: list[Any], known: list[str], values: list[Any]
) -> None:
    csv(tmp_path / "test.csv", labels)
    model = text_model(word_tokenizer(), class_names=known)
    data = prepared(tmp_path, "test", model=model, **TEXT)  # without training rows
    data.check_test_split()
    assert (data.class_names, labels_of(data, "test")) == (known, values)
    for split in ("train", "validation"):
        csv(tmp_path / f"{split}.csv", labels)
    assert labels_of(prepared(tmp_path, model=model, **TEXT)) == values


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([0.5, 1.5], [1, 3], [1.0, 3.0]),  # integers in a regression
        ([True, False], [1, 0, 1], [1, 0, 1]),
        ([1, 0], [True, False], [1, 0]),
        (["a", "b"], ["b", "a", "b"], [1, 0, 1]),
    ],
)
def test_labels_of_other_splits_are_read_as_those_of_training(
    tmp_path: Path, form: str, train: list[Any], test: list[Any], expected: list[Any]
) -> None:
    for split, labels in (("train", train * 10), ("validation", test)):
        rows = "".join(json.dumps({"text": "w0", "label": label}) + "\n" for label in labels)
        put(tmp_path / f"{split}.jsonl", rows) if form == "jsonl" else csv(tmp_path / f"{split}.csv", labels)
    assert labels_of(prepared(tmp_path, **TEXT), "val") == expected


def test_rows_of_a_label_are_left_out(tmp_path: Path) -> None:
    for labels, skip in (([0, -1, 1, 2], -1), (["a", "none", "b", "c"], "none")):
        for split in ("train", "validation"):
            csv(tmp_path / f"{skip}/{split}.csv", labels * 5)
        data = prepared(tmp_path / str(skip), skip_label=skip, **TEXT)
        assert labels_of(data) == [0, 1, 2] * 5
        where = tmp_path / f"{skip}/train.csv"
        line = f"left out of {where}: 5 rows with the label {skip} (data.skip_label)"
        assert line in data.findings.take_lines()
        assert data.findings.skipped == []


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("task", ["cola", "stsb", "mnli"])
def test_batches_equal_the_output_of_the_tokenizer(hub: Files, task: str) -> None:
    types = word_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    columns = len(HUB[task].columns)
    for padding, tokenizer in (("longest", word_tokenizer()), ("max_length", word_tokenizer()), ("longest", types)):
        data = prepared(hub(task), task=task, padding=padding, model=text_model(tokenizer))
        for batch in data.val_dataloader()[0]:
            rows = batch["index"].tolist()
            texts = [texts_of("validation", row)[:columns] for row in rows]
            expected = tokenizer(
                *zip(*texts, strict=True), padding=padding, max_length=32, truncation=True, return_tensors="pt"
            )
            assert set(batch) == {*expected, "label", "index"}
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
            assert batch["label"].tolist() == [label_of(row, len(HUB[task].names)) for row in rows]
            assert batch["label"].dtype == (torch.int64 if HUB[task].names else torch.float32)


def test_ranks_share_the_token_cache(hub: Files, cache: Path) -> None:
    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (cache / "onesided").iterdir()}

    prepared(hub("cola"), task="cola", world=2, rank=0)
    before = files()
    data = prepared(hub("mnli"), task="mnli", world=2, rank=1)
    assert len(files()) == len(before) + 3
    shares = [[i for batch in data.val_dataloader()[1] for i in batch["index"].tolist()]]
    other = prepared(hub("mnli"), task="mnli", world=2, rank=0)
    shares.append([i for batch in other.val_dataloader()[1] for i in batch["index"].tolist()])
    assert sorted(shares[0] + shares[1]) == list(range(12))


# ---------------------------------------------------------------------------------------------------------- prediction


def submission(data: Any, file: int, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """Write a submission, and return its lines."""
    path = folder / data.prediction_files[file]
    write_rows(path, [data.complete_prediction(row, file) for row in rows])
    return path.read_text("utf-8").splitlines()


@pytest.mark.parametrize("task", HUB)
def test_submissions_have_the_format_of_glue(tmp_path: Path, hub: Files, task: str) -> None:
    data = prepared(hub(task), "predict", task=task, prediction_format="tsv")
    known = HUB[task]
    assert data.prediction_files == known.files
    rows: list[dict[str, Any]] = [{"index": 0, "prediction": 2.5}, {"index": 6, "prediction": -0.25}]
    expected = ["2.5", "0.0"]  # clipped to the range of the scores
    if known.names:
        rows = [
            {"index": i, "label": label, "prediction": known.names[label], "probability": 0.75}
            for i, label in ((0, 1), (6, 0))
        ]
        named = task in ("mnli", "qnli", "rte")
        expected = [known.names[label] if named else str(label) for label in (1, 0)]
    for file in range(len(known.files)):
        lines = submission(data, file, rows, tmp_path)
        # numbers from the column idx
        assert lines == ["index\tprediction", f"100\t{expected[0]}", f"106\t{expected[1]}"]


@pytest.mark.parametrize(
    ("score", "clipped"), [(-0.25, 0.0), (0.0, 0.0), (0.25, 0.25), (4.75, 4.75), (5.0, 5.0), (5.25, 5.0)]
)
def test_scores_of_stsb_are_clipped_in_submissions_alone(
    tmp_path: Path, hub: Files, score: float, clipped: float
) -> None:
    row = {"index": 2, "prediction": score}
    data = prepared(hub("stsb"), "predict", task="stsb", prediction_format="tsv")
    assert data.complete_prediction(row, 0) == {"index": 102, "prediction": clipped}
    lines = prepared(hub("stsb"), "predict", task="stsb", prediction_format="jsonl")
    assert lines.complete_prediction(row, 0)["prediction"] == score
    own_data = prepared(put(tmp_path / "test.csv", "text\nw0\nw1\nw2\n").parent, "predict", **TEXT)
    assert own_data.complete_prediction(row, 0) == {"id": 2, "text": "w2", "prediction": score}


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize(("column", "expected"), [("idx", 7), ("name", "b"), (None, 1)])
def test_predictions_have_the_id_of_a_column_or_the_row_number(
    tmp_path: Path, column: str | None, expected: Any, form: str
) -> None:
    content = "sentence\nw3\nw4\n" if column is None else "sentence,idx,name\nw3,9,a\nw4,7,b\n"
    folder = put(tmp_path / "test.csv", content).parent
    keys = {} if column is None else {"id_column": column}
    data = prepared(folder, "predict", task="sst2", prediction_format=form, **keys)
    row = {"index": 1, "label": 1, "prediction": "positive", "probability": 1.0}
    assert data.complete_prediction(row, 0)["index" if form == "tsv" else "id"] == expected


def test_prediction_needs_no_labels(tmp_path: Path, hub: Files) -> None:
    data = prepared(hub("mnli"), "predict", task="mnli", prediction_format="jsonl")
    for loader, split in zip(data.predict_dataloader(), ("test", "mismatched"), strict=True):
        assert all("label" not in batch for batch in loader)
        assert found(loader.dataset) == all_of(split, 7)
    assert data.prediction_files == ["predictions_matched.jsonl", "predictions_mismatched.jsonl"]
    row = {"index": 3, "label": 1, "prediction": "neutral", "probability": 0.5}
    (line,) = submission(data, 1, [row], tmp_path)
    premise, hypothesis = texts_of("test_mismatched", 3)
    texts = {"premise": premise, "hypothesis": hypothesis}
    assert json.loads(line) == {"id": 103, **texts, "prediction": "neutral", "probability": 0.5}


@pytest.mark.parametrize("task", [None, "sst2"])
def test_predict_path_may_be_one_file(tmp_path: Path, task: Any) -> None:
    file = put(tmp_path / "new.csv", "sentence\ngood w3\nbad w4 a\n")
    data = prepared(tmp_path, "predict", task=task, text_columns=["sentence"], predict_path=str(file))
    assert data.prediction_files == ["predictions.csv"]
    assert found(data.splits["predict"][0]) == [("good", 3), ("bad", 4)]
    row = {"index": 1, "label": 0, "prediction": "negative", "probability": 0.9}
    expected = {"id": 1, "sentence": "bad w4 a", "prediction": "negative", "probability": 0.9}
    assert data.complete_prediction(row, 0) == expected


def test_a_guessed_column_for_a_prediction_is_reported(tmp_path: Path) -> None:
    file = put(tmp_path / "new.csv", "review,k\ngood w3,1\nbad w4 a,2\n")
    data = prepared(tmp_path, "predict", predict_path=str(file))
    line = "columns: text of review (guessed; data.text_columns overrides); not used: k"
    assert line in data.findings.take_lines()
    assert found(data.splits["predict"][0]) == [("good", 3), ("bad", 4)]


@pytest.mark.parametrize("stored", [["matched"], ["mismatched"], ["matched", "mismatched"], [""]])
def test_each_set_has_its_own_prediction_file(tmp_path: Path, stored: list[str]) -> None:
    for name in stored:
        columns, split = ["premise", "hypothesis"], f"test_{name}" if name else "test"
        write_rows_of(tmp_path / f"{split}.parquet", split, 3, columns, datasets.Value("int64"), [-1] * 3)
    data = prepared(tmp_path, "predict", task="mnli", prediction_format="tsv")
    assert len(data.prediction_files) == len(data.predict_dataloader())
    names = {"matched": "MNLI-m.tsv", "mismatched": "MNLI-mm.tsv"}
    if stored != [""]:
        assert data.prediction_files == [names[name] for name in stored]


# ----------------------------------------------------------------------------------------------------------- bad input

CLASSES = ("a", "b")
BAD: dict[str, tuple[dict[str, str], dict[str, Any], tuple[str, ...]]] = {  # files, keys, parts of the message
    "too short": ({}, {"max_length": 1, "task": "cola"}, ("data.max_length: 1 must be 2 or more",)),
    "no column": ({}, {"text_columns": []}, ("data.text_columns", "are 0 columns. Name one or two")),
    "three columns": ({}, {"text_columns": ["a", "b", "c"]}, ("data.text_columns", "are 3 columns")),
    "a column twice": ({}, {"text_columns": ["a", "a"]}, ("data.text_columns: a is named twice",)),
    "text is the label": (
        {},
        {"text_columns": ["a", "label"], "label_column": "label"},
        ("data.label_column: label is",),
    ),
    "no limit": ({}, {"task": "cola", "max_val_samples": 0}, ("data.max_val_samples: 0",)),
    "no batch": ({}, {"task": "cola", "batch_size": 0}, ("data.batch_size",)),
    "another task": (
        {"train.csv": "sentence1,label\n" + "w0,0\n" * 9},
        {"task": "qnli"},
        ("data.text_columns", "train.csv has no column question; it has sentence1, label"),
    ),
    "an unknown class": (
        {"train.csv": "text,label\nw0,a\nw1,b\n", "test.csv": "text,label\nw0,c\n"},
        {**TEXT, "stage": "test"},
        ("data.path", "test.csv", "not trained on (c)", "The model knows 2: a, b"),
    ),
    "classes unknown": ({"test.csv": "text,label\nw0,c\n"}, {**TEXT, "stage": "test"}, ("no file of training rows",)),
    "names for a regression": (
        {"test.csv": "text,label\nw0,yes\nw1,no\n"},
        {**TEXT, "stage": "test", "known": ()},
        ("data.label_column", "must hold numbers, and it holds"),
    ),
    "numbers for classes": (
        {"test.csv": "text,label\nw0,0.5\nw1,1.5\n"},
        {**TEXT, "stage": "test", "known": CLASSES},
        ("data.label_column", "the model is for classification into a, b"),
    ),
    "nothing to predict": (
        {},
        {"task": "rte", "stage": "predict", "predict_path": "gone.csv"},
        ("gone.csv is missing",),
    ),
    "no rows to predict": (
        {"new.csv": "sentence\n"},
        {"task": "cola", "stage": "predict", "predict_path": "new.csv"},
        ("data.predict_path", "new.csv"),
    ),
    "no name to predict": (
        {"new.csv": "sentence\nw0\n"},
        {"task": "cola", "stage": "predict", "predict_path": "new.csv", "id_column": "name"},
        ("data.id_column", "new.csv has no column name"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    files, keys, parts = BAD[case]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        put(tmp_path / name, content)
    known = keys.get("known")
    model = text_model(word_tokenizer(), class_names=None if known is None else list(known))
    with refuses(*parts):
        prepared(tmp_path, model=model, **{key: value for key, value in keys.items() if key != "known"})


def test_a_regression_model_refuses_classes(hub: Files) -> None:
    model = text_model(word_tokenizer(), class_names=[])
    for path, keys in ((hub("rte"), {"task": "rte"}), (hub("cola") / "cola", {"text_columns": ["sentence"]})):
        with refuses("data.label_column", "the model is for regression", "classification into "):
            prepared(path, model=model, **keys)


@pytest.mark.parametrize("prices", [[600.0, 700.5, 650.25], [0.5, 0.5], [-1e9, 1e9]])
def test_scaling_of_labels_is_numpys_over_the_training_rows(tmp_path: Path, prices: list[float]) -> None:
    rows = "".join(f"a flat with {i} rooms,{price}\n" for i, price in enumerate(prices * 10))
    put(tmp_path / "flats.csv", f"description,price\n{rows}")
    data = prepared(tmp_path / "flats.csv", label_column="price")
    values = np.array([row["label"] for row in data.train_dataloader().dataset], np.float64)
    assert data.label_scaling == pytest.approx([values.mean(), values.std()])
    assert f"mean {values.mean():.4g}, standard deviation {values.std():.4g}" in str(data.findings.take_lines())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_rows_is_refused(tmp_path: Path, split: str) -> None:
    path = write_task(tmp_path, "cola")
    file = path / "cola" / f"{split}-00000-of-00001.parquet"
    write_rows_of(file, split, 0, ["sentence"], datasets.Value("int64"), [])
    with refuses("data.path", str(file), "has no rows"):
        prepared(path, task="cola")
