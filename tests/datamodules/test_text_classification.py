"""GLUE's tasks as they lie on the hub, and sets of one's own: rows, tokens, labels, batches and submissions."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import pytest
import torch

from app.callbacks.prediction_writer import write_rows
from datamodules.errors import DataError
from datamodules.text_classification import TASKS, TextClassificationData
from tests.backbones import word_tokenizer
from tests.datamodules.stub import stub_trainer, text_model

Files = Callable[..., Path]
ENTAILMENT = ["entailment", "not_entailment"]


class Hub(NamedTuple):
    """A task as `nyu-mll/glue` has it, and as GLUE's server wants it."""

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


def texts_of(split: str, row: int) -> list[str]:
    """Two sentences that say which row of which split they are, of several lengths."""
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
    """A task in the hub's files and columns."""
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
    """Directories of tasks, each written once: those who use them only read."""
    written: dict[str, Path] = {}

    def files(task: str, **keys: Any) -> Path:
        name = f"{task} {keys}"
        if name not in written:
            written[name] = write_task(tmp_path_factory.mktemp(task), task, **keys)
        return written[name]

    return files


def module(path: Path, *, stage: str = "fit", world: int = 1, rank: int = 0, model: Any = None, **keys: Any) -> Any:
    data = TextClassificationData(str(path), **{"batch_size": 4, "max_length": 32, **keys})
    model = model or text_model(word_tokenizer())
    data.trainer = stub_trainer(world, rank, lightning_module=model, state=SimpleNamespace(fn=stage))
    return data


def prepared(path: Path, stage: str = "fit", **keys: Any) -> Any:
    data = module(path, stage=stage, **keys)
    data.setup(stage)
    return data


def found(dataset: Any) -> list[tuple[str, int]]:
    """Mark and row of each sample, as its text says them."""
    tokenizer = word_tokenizer()
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in dataset.data["input_ids"]]
    return [(w[1], int(w[2].removeprefix("w"))) for w in words]


def all_of(split: str, size: int) -> list[tuple[str, int]]:
    return [(MARKS[split], row) for row in range(size)]


def refuses(*parts: str) -> Any:
    """A DataError whose message has all the parts, in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def write_csv(file: Path, rows: list[str], header: str = "text,label") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([header, *rows]) + "\n", "utf-8")
    return file.parent


# --------------------------------------------------------------------------------------------------------------- tasks


def test_the_nine_tasks() -> None:
    assert set(TASKS) == set(HUB)


@pytest.mark.parametrize("task", HUB)
def test_every_task_in_the_columns_of_the_hub(hub: Files, task: str) -> None:
    data = prepared(hub(task), task=task)
    known = HUB[task]
    assert (data.columns, data.class_names, data.metrics) == (known.columns, known.names, known.metrics)
    (train,) = data.splits["train"]
    texts = [texts_of("train", row)[: len(known.columns)] for row in range(30)]
    assert train.data["input_ids"][:] == word_tokenizer()(*zip(*texts, strict=True))["input_ids"]
    assert train.targets["label"].tolist() == [label_of(row, len(known.names)) for row in range(30)]
    assert train.targets["label"].dtype == (torch.int64 if known.names else torch.float32)
    assert data.set_names == {"train": [""], "val": ["matched", "mismatched"] if task == "mnli" else [""]}


@pytest.mark.parametrize("task", HUB)
def test_names_of_the_classes_are_known_where_the_file_has_numbers_alone(tmp_path: Path, task: str) -> None:
    label = datasets.Value("int64") if HUB[task].names else datasets.Value("float64")
    for split in ("train", "validation"):
        write_rows_of(tmp_path / f"{split}.parquet", split, 12, HUB[task].columns, label, [0, 1] * 6)
    data = prepared(tmp_path, task=task)
    assert data.class_names == HUB[task].names
    assert data.splits["val"][0].targets["label"].tolist() == [0, 1] * 6


def test_whole_scores_of_stsb_are_a_regression(tmp_path: Path) -> None:
    write_rows_of(
        tmp_path / "train.parquet", "train", 20, ["sentence1", "sentence2"], datasets.Value("int64"), [5] * 20
    )
    data = prepared(tmp_path, task="stsb")
    assert data.class_names == []
    assert data.splits["train"][0].targets["label"].dtype == torch.float32


@pytest.mark.parametrize("task", ["mrpc", "wnli"])
def test_names_in_place_of_numbers_keep_the_numbers_of_the_task(tmp_path: Path, task: str) -> None:
    """F1 is of label 1, and a submission has the number."""
    names = [HUB[task].names[row % 2] for row in range(20)]
    write_rows_of(tmp_path / "train.parquet", "train", 20, HUB[task].columns, datasets.Value("string"), names)
    assert prepared(tmp_path, task=task).class_names == HUB[task].names


def test_a_directory_of_one_task_or_of_several(tmp_path: Path) -> None:
    write_task(tmp_path, "rte")
    write_task(tmp_path, "cola")
    one, several = prepared(tmp_path / "rte", task="rte"), prepared(tmp_path, task="rte")
    assert found(one.splits["train"][0]) == found(several.splits["train"][0]) == all_of("train", 30)
    with refuses("data.path", "has rows of train in the folders cola, rte", "none of them is mrpc"):
        prepared(tmp_path, task="mrpc")


def test_a_directory_that_has_another_task_alone(hub: Files) -> None:
    path = hub("rte")
    for stage, split in (("fit", "train"), ("predict", "test")):
        with refuses("data.path", f"{path} has rows of {split} in the folders rte", "none of them is mrpc"):
            prepared(path, stage, task="mrpc")


def test_a_folder_of_another_name_is_taken_as_the_configuration(tmp_path: Path) -> None:
    write_task(tmp_path, "rte")
    (tmp_path / "rte").rename(tmp_path / "mine")
    assert found(prepared(tmp_path, task="rte", config="mine").splits["train"][0]) == all_of("train", 30)


def test_two_validation_sets_of_mnli(hub: Files) -> None:
    data = prepared(hub("mnli"), task="mnli")
    assert data.set_names["val"] == ["matched", "mismatched"]
    matched, mismatched = data.splits["val"]
    assert found(matched) == all_of("validation", 12)
    assert found(mismatched) == all_of("mismatched", 12)
    loaders = data.val_dataloader()
    assert [loader.dataset for loader in loaders] == [matched, mismatched]


@pytest.mark.parametrize("revision", [None, "refs/convert/parquet"])
def test_the_hub_is_asked_for_the_configuration_of_the_task(
    monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    asked = set()

    def names(name: str, config: str | None, revision: str | None) -> list[str]:
        asked.add((name, config, revision))
        return ["train", "validation", "test"]

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.add((name, config, revision))
        rows = [texts_of(split, row) for row in range(8)]
        return datasets.Dataset.from_dict({"sentence": [a for a, _ in rows], "label": [0, 1] * 4})

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = TextClassificationData(task="cola", batch_size=2, revision=revision)
    data.trainer = stub_trainer(lightning_module=text_model(word_tokenizer()))
    data.setup("fit")
    assert asked == {("nyu-mll/glue", "cola", revision)}
    assert found(data.splits["val"][0]) == all_of("validation", 8)


def test_a_set_on_the_hub_without_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, revision: ["test"])
    with refuses("data.path", "some/data", "train"):
        prepared(Path("some/data"), text_columns=["text"])


# ------------------------------------------------------------------------------------------------------- sets of others


@pytest.mark.parametrize(
    ("labels", "names", "values", "metrics"),
    [
        (["0", "2", "1", "2"], ["0", "1", "2"], [0, 2, 1, 2], ["accuracy", "f1"]),
        (["no", "yes", "no", "no"], ["no", "yes"], [0, 1, 0, 0], ["accuracy", "f1"]),
        (["0.5", "1.25", "3.0", "2.0"], [], [0.5, 1.25, 3.0, 2.0], ["pearson", "spearman"]),
    ],
)
def test_labels_decide_the_kind_of_task(
    tmp_path: Path, labels: list[str], names: list[str], values: list[float], metrics: list[str]
) -> None:
    for split in ("train", "validation"):
        write_csv(tmp_path / f"{split}.csv", [f"w{i},{label}" for i, label in enumerate(labels)])
    data = prepared(tmp_path, text_columns=["text"])
    assert (data.class_names, data.metrics) == (names, metrics)
    assert data.splits["train"][0].targets["label"].tolist() == values


def test_columns_and_labels_by_key(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [f"w{i},{i % 2},good" for i in range(20)], header="body,stars,title")
    data = prepared(tmp_path, text_columns=["title", "body"], label_column="stars", val_fraction=0.5)
    (train,) = data.splits["train"]
    rows = [int(word_tokenizer().decode(ids).split()[-2].removeprefix("w")) for ids in train.data["input_ids"]]
    assert train.data["input_ids"][0] == word_tokenizer()("good", f"w{rows[0]}")["input_ids"]
    assert train.targets["label"].tolist() == [row % 2 for row in rows]


def test_classes_of_the_model_come_before_those_of_the_data(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ["w0,yes", "w1,no", "w2,yes"])
    write_csv(tmp_path / "test.csv", ["w0,yes", "w1,maybe", "w2,no"])
    model = text_model(word_tokenizer(), class_names=["yes", "no", "maybe"])
    data = prepared(tmp_path, "test", text_columns=["text"], model=model)
    assert data.class_names == ["yes", "no", "maybe"]
    assert data.splits["test"][0].targets["label"].tolist() == [0, 2, 1]
    with refuses("data.path", "test.csv", "not trained on (maybe)", "it knows 2: no, yes"):
        prepared(tmp_path, "test", text_columns=["text"])


def test_a_model_that_knows_its_classes_is_tested_without_training_rows(tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", ["w0,1", "w1,0"])
    model = text_model(word_tokenizer(), class_names=["0", "1"])
    data = prepared(tmp_path, "test", text_columns=["text"], model=model)
    assert data.splits["test"][0].targets["label"].tolist() == [1, 0]
    with refuses("data.path", "no file of training rows"):
        prepared(tmp_path, "test", text_columns=["text"])


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_whole_numbers_are_targets_of_a_model_of_a_regression(tmp_path: Path, stage: str) -> None:
    for split in ("train", "validation", "test"):
        write_csv(tmp_path / f"{split}.csv", ["w0,5", "w1,0", "w2,3"])
    keys = {"text_columns": ["text"], "model": text_model(word_tokenizer(), class_names=[])}
    data = prepared(tmp_path, stage, batch_size=1, **keys)
    data.check_test_split()
    assert (data.class_names, data.metrics) == ([], ["pearson", "spearman"])
    targets = data.splits["test" if stage == "test" else "train"][0].targets["label"]
    assert targets.tolist() == [5.0, 0.0, 3.0]
    assert targets.dtype == torch.float32


def test_a_model_of_a_regression_over_names_and_over_classes_of_a_task(tmp_path: Path, hub: Files) -> None:
    model = text_model(word_tokenizer(), class_names=[])
    write_csv(tmp_path / "test.csv", ["w0,yes", "w1,no"])
    with refuses("data.label_column", "must hold numbers, and it holds"):
        prepared(tmp_path, "test", text_columns=["text"], model=model)
    with refuses("data.label_column", "the model is for regression", "classification into entailment, not_entailment"):
        prepared(hub("rte"), task="rte", model=model)


def test_classes_with_names_are_no_targets_of_a_model_of_a_regression(hub: Files) -> None:
    model = text_model(word_tokenizer(), class_names=[])
    with refuses("data.label_column", "the model is for regression", "classification into unacceptable, acceptable"):
        prepared(hub("cola") / "cola", text_columns=["sentence"], model=model)


def test_the_test_split_is_read_with_the_others_if_it_is_tested_after_fit(hub: Files) -> None:
    data = module(hub("rte", hidden=False), task="rte")
    data.check_test_split()
    data.setup("fit")
    (test,) = data.splits["test"]
    assert len(test) == SIZES["test"]
    data.setup("test")
    assert data.splits["test"] == [test]


def test_booleans_are_two_classes(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [f"w{i},{i % 3 == 0}" for i in range(20)])
    data = prepared(tmp_path, text_columns=["text"])
    assert data.class_names == ["False", "True"]
    (train,) = data.splits["train"]
    rows = [int(word_tokenizer().convert_ids_to_tokens(ids)[1][1:]) for ids in train.data["input_ids"]]
    assert train.targets["label"].tolist() == [int(row % 3 == 0) for row in rows]


def test_a_model_of_classes_over_a_regression(tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", ["w0,0.5", "w1,1.5"])
    with refuses("data.label_column", "the model is for classification into a, b"):
        prepared(tmp_path, "test", text_columns=["text"], model=text_model(word_tokenizer(), class_names=["a", "b"]))


# -------------------------------------------------------------------------------------------------------------- splits


def test_without_a_validation_split_training_rows_are_held_out(hub: Files) -> None:
    path = hub("rte", validation=0)
    data = prepared(path, task="rte", val_fraction=0.2)
    (train,), (val,) = data.splits["train"], data.splits["val"]
    assert (len(train), len(val)) == (24, 6)
    assert sorted(found(train) + found(val)) == sorted(all_of("train", 30))
    for part in (train, val):
        assert part.targets["label"].tolist() == [row % 2 for _, row in found(part)]
    assert found(prepared(path, task="rte", val_fraction=0.2).splits["val"][0]) == found(val)
    assert found(prepared(path, task="rte", val_fraction=0.2, val_seed=1).splits["val"][0]) != found(val)


@pytest.mark.parametrize("task", ["rte", "mnli"])
def test_test_on_validation_holds_out_training_rows_and_tests_on_the_validation_split(hub: Files, task: str) -> None:
    data = prepared(hub(task), task=task, val_fraction=0.2, test_on_validation=True)
    data.check_test_split()
    data.setup("test")
    (train,), (val,) = data.splits["train"], data.splits["val"]
    assert sorted(found(train) + found(val)) == sorted(all_of("train", 30))
    assert len(val) == 6
    tests = [found(part) for part in data.splits["test"]]
    assert tests == [
        all_of(split, 12) for split in (["validation", "mismatched"] if task == "mnli" else ["validation"])
    ]
    assert data.set_names["test"] == (["matched", "mismatched"] if task == "mnli" else [""])
    assert data.set_names["val"] == [""]


def test_test_labels_that_are_there_are_tested_on(hub: Files) -> None:
    data = module(hub("mnli", hidden=False), task="mnli")
    data.check_test_split()
    data.setup("test")
    assert [found(part) for part in data.splits["test"]] == [all_of("test", 7), all_of("mismatched", 7)]
    assert data.splits["test"][1].targets["label"].tolist() == [row % 3 for row in range(7)]


@pytest.mark.parametrize("task", HUB)
def test_hidden_test_labels_are_told_before_training(hub: Files, task: str) -> None:
    data = module(hub(task), task=task)
    with refuses("data.label_column", "test", "hidden", "data.test_on_validation: true"):
        data.check_test_split()


@pytest.mark.parametrize("stage", ["check", "test"])
def test_no_test_split(hub: Files, stage: str) -> None:
    data = module(hub("rte", test=0), task="rte")
    with refuses("data.path", "has no test split"):
        data.check_test_split() if stage == "check" else data.setup("test")


def test_limits_take_a_seeded_sample_of_each_set(hub: Files) -> None:
    path = hub("mnli", hidden=False)
    keys = {"max_train_samples": 9, "max_val_samples": 5, "max_test_samples": 3}
    data, again = (prepared(path, task="mnli", **keys) for _ in range(2))
    for each in (data, again):
        each.setup("test")
    for split, sizes in (("train", [9]), ("val", [5, 5]), ("test", [3, 3])):
        assert [len(part) for part in data.splits[split]] == sizes
        for part, same in zip(data.splits[split], again.splits[split], strict=True):
            rows = found(part)
            assert len(set(rows)) == len(rows)
            assert part.targets["label"].tolist() == [row % 3 for _, row in rows]
            assert rows == found(same)


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_labels_stay_with_their_texts_however_few_the_rows(hub: Files, fraction: float) -> None:
    path = hub("cola", train=2, validation=0)
    for seed in range(4):
        (val,) = prepared(path, "validate", task="cola", val_fraction=fraction, val_seed=seed).splits["val"]
        assert val.targets["label"].tolist() == [row % 2 for _, row in found(val)]


def test_a_second_stage_reads_nothing_anew(hub: Files) -> None:
    data = prepared(hub("rte", hidden=False), task="rte")
    before = data.splits["val"][0]
    data.setup("validate")
    data.setup("fit")
    assert data.splits["val"][0] is before


# ------------------------------------------------------------------------------------------------------------- batches


def batches(loader: Any) -> list[dict[str, torch.Tensor]]:
    return list(loader)


@pytest.mark.parametrize("task", ["cola", "stsb", "mnli"])
@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_batches_are_what_the_tokenizer_makes_of_their_texts(hub: Files, task: str, bucket: bool, padding: str) -> None:
    data = prepared(hub(task), task=task, bucket_by_length=bucket, padding=padding)
    classes, columns = len(HUB[task].names), HUB[task].columns
    seen = []
    for batch in batches(data.train_dataloader()) + batches(data.val_dataloader()[0]):
        split = "train" if len(seen) < 28 else "validation"
        rows = batch["index"].tolist()  # both splits are taken whole
        texts = [texts_of(split, row)[: len(columns)] for row in rows]
        expected = word_tokenizer()(
            *zip(*texts, strict=True), padding=padding, max_length=32, truncation=True, return_tensors="pt"
        )
        assert set(batch) == {"input_ids", "attention_mask", "label", "index"}
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(batch[name], expected[name])
            assert batch[name].dtype == torch.int64
        assert batch["label"].tolist() == [label_of(row, classes) for row in rows]
        assert batch["label"].dtype == (torch.int64 if classes else torch.float32)
        assert batch["index"].dtype == torch.int64
        seen += rows
    assert len(seen) == 28 + 12  # whole batches of training, all of validation
    assert len(set(seen[:28])) == 28
    assert sorted(seen[28:]) == list(range(12))


def test_token_types_are_padded_too(hub: Files) -> None:
    tokenizer = word_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    data = prepared(hub("rte"), task="rte", model=text_model(tokenizer))
    for batch in batches(data.val_dataloader()[0]):
        texts = [texts_of("validation", row) for row in batch["index"].tolist()]
        expected = tokenizer(*zip(*texts, strict=True), padding=True, return_tensors="pt")
        assert torch.equal(batch["token_type_ids"], expected["token_type_ids"])
        assert batch["token_type_ids"].max() == 1


@pytest.mark.parametrize("limit", [4, 7])
def test_long_texts_are_cut_as_the_tokenizer_cuts_them(hub: Files, limit: int) -> None:
    data = prepared(hub("cola"), task="cola", max_length=limit)
    (val,) = data.splits["val"]
    texts = [texts_of("validation", row)[0] for row in range(12)]
    assert val.data["input_ids"][:] == word_tokenizer()(texts, truncation=True, max_length=limit)["input_ids"]
    assert val.lengths.max() == limit


def test_texts_that_reach_the_limit_are_counted(hub: Files, capsys: pytest.CaptureFixture[str]) -> None:
    path = hub("cola")
    lengths = [len(word_tokenizer()(texts_of("validation", row)[0])["input_ids"]) for row in range(12)]
    keys = {"task": "cola", "max_length": 6, "model": text_model(word_tokenizer(), class_names=HUB["cola"].names)}
    prepared(path, "validate", **keys)
    cut = sum(length >= 6 for length in lengths)
    assert 0 < cut < 12
    where = path / "cola/validation-00000-of-00001.parquet"
    expected = f"warning: {cut} of 12 rows of {where} reach 6 tokens and may be cut."
    assert expected in capsys.readouterr().err.splitlines()
    prepared(path, "validate", **{**keys, "max_length": max(lengths) + 1})
    assert "may be cut" not in capsys.readouterr().err


def test_buckets_of_like_length_pad_less(hub: Files) -> None:
    path = hub("cola", train=40)

    def padding(bucket: bool) -> int:
        data = prepared(path, task="cola", bucket_by_length=bucket)
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches(data.train_dataloader()))

    assert padding(True) < padding(False) / 4


def test_evaluation_has_the_longest_batch_first_or_the_order_of_the_rows(hub: Files) -> None:
    path = hub("cola")
    shown = [b["attention_mask"].sum(1).tolist() for b in batches(prepared(path, task="cola").val_dataloader()[0])]
    lengths = sorted((n for batch in shown for n in batch), reverse=True)
    assert shown[0] == lengths[:4] != lengths[8:]
    assert sorted(shown, reverse=True) == [lengths[:4], lengths[4:8], lengths[8:]]
    plain = prepared(path, task="cola", bucket_by_length=False).val_dataloader()[0]
    assert [i for b in batches(plain) for i in b["index"].tolist()] == list(range(12))


def test_processes_share_every_row_of_evaluation(hub: Files) -> None:
    path = hub("mnli")
    for which in (0, 1):
        shares = [
            [i for b in prepared(path, task="mnli", world=2, rank=rank).val_dataloader()[which] for i in b["index"]]
            for rank in range(2)
        ]
        assert sorted(int(i) for share in shares for i in share) == list(range(12))
        assert [len(share) for share in shares] == [6, 6]


def test_workers_give_the_same_batches(hub: Files) -> None:
    path = hub("cola")
    alone, helped = (batches(prepared(path, task="cola", num_workers=n).val_dataloader()[0]) for n in (0, 1))
    assert [b["input_ids"].tolist() for b in alone] == [b["input_ids"].tolist() for b in helped]


def test_workers_that_do_not_fork_can_pad(hub: Files) -> None:
    data = prepared(hub("cola"), task="cola")
    data.trainer.schedule = lambda step: 1.0  # a real trainer has such closures, which cannot be sent
    loader = data.val_dataloader()[0]
    collate, dataset = pickle.loads(pickle.dumps((loader.collate_fn, loader.dataset)))  # as they are sent
    rows = dataset.__getitems__([0, 1])
    expected = data.collate()(rows)
    assert {name: value.tolist() for name, value in collate(rows).items()} == {
        name: value.tolist() for name, value in expected.items()
    }


# ---------------------------------------------------------------------------------------------------------- prediction


def submission(data: Any, file: int, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """Lines of the file that is handed in."""
    path = folder / data.prediction_files[file]
    write_rows(path, [data.complete_prediction(row, file) for row in rows])
    return path.read_text("utf-8").splitlines()


@pytest.mark.parametrize("task", HUB)
def test_submissions_are_in_the_form_of_glue(tmp_path: Path, hub: Files, task: str) -> None:
    data = prepared(hub(task), "predict", task=task)
    known = HUB[task]
    assert data.prediction_files == known.files
    assert len(data.predict_dataloader()) == len(known.files)
    rows: list[dict[str, Any]] = [{"index": 0, "prediction": 2.5}, {"index": 6, "prediction": -0.25}]
    expected = ["2.5", "0.0"]  # in the limits of the scores
    if known.names:
        rows = [
            {"index": i, "label": label, "prediction": known.names[label], "probability": 0.75}
            for i, label in ((0, 1), (6, 0))
        ]
        named = task in ("mnli", "qnli", "rte")
        expected = [known.names[label] if named else str(label) for label in (1, 0)]
    for file in range(len(known.files)):
        lines = submission(data, file, rows, tmp_path)
        assert lines == ["index\tprediction", f"100\t{expected[0]}", f"106\t{expected[1]}"]  # by the column idx


@pytest.mark.parametrize(
    ("score", "clipped"), [(-0.25, 0.0), (0.0, 0.0), (0.25, 0.25), (4.75, 4.75), (5.0, 5.0), (5.25, 5.0)]
)
def test_scores_of_stsb_are_clipped_in_submissions_alone(
    tmp_path: Path, hub: Files, score: float, clipped: float
) -> None:
    row = {"index": 2, "prediction": score}
    data = prepared(hub("stsb"), "predict", task="stsb")
    assert data.complete_prediction(row, 0) == {"index": 102, "prediction": clipped}
    lines = prepared(hub("stsb"), "predict", task="stsb", prediction_format="jsonl")
    assert lines.complete_prediction(row, 0)["prediction"] == score
    folder = write_csv(tmp_path / "test.csv", ["w0", "w1", "w2"], header="text")
    own = prepared(folder, "predict", text_columns=["text"])
    assert own.complete_prediction(row, 0) == {"index": 2, "prediction": score}


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
@pytest.mark.parametrize(("column", "expected"), [("idx", 7), ("name", "b")])
def test_rows_are_named_by_a_column(tmp_path: Path, column: str, expected: Any, form: str) -> None:
    folder = write_csv(tmp_path / "test.csv", ["w3,9,a", "w4,7,b"], header="sentence,idx,name")
    data = prepared(folder, "predict", task="sst2", id_column=column, prediction_format=form)
    row = {"index": 1, "label": 1, "prediction": "positive", "probability": 1.0}
    assert data.complete_prediction(row, 0)["index"] == expected


def test_prediction_needs_no_labels(hub: Files) -> None:
    data = prepared(hub("mnli"), "predict", task="mnli")
    assert data.set_names["predict"] == ["matched", "mismatched"]
    for loader, split in zip(data.predict_dataloader(), ("test", "mismatched"), strict=True):
        assert all("label" not in batch for batch in loader)
        assert found(loader.dataset) == all_of(split, 7)
        assert sorted(i for batch in loader for i in batch["index"].tolist()) == list(range(7))


def test_rows_without_idx_are_counted(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "test.csv", ["w3", "w4"], header="sentence")
    data = prepared(folder, "predict", task="sst2")
    row = {"index": 1, "label": 1, "prediction": "positive", "probability": 1.0}
    assert data.complete_prediction(row, 0) == {"index": 1, "prediction": 1}


def test_jsonl_has_the_texts_and_the_probability(tmp_path: Path, hub: Files) -> None:
    data = prepared(hub("mnli"), "predict", task="mnli", prediction_format="jsonl")
    assert data.prediction_files == ["predictions_matched.jsonl", "predictions_mismatched.jsonl"]
    row = {"index": 3, "label": 1, "prediction": "neutral", "probability": 0.5}
    (line,) = submission(data, 1, [row], tmp_path)
    premise, hypothesis = texts_of("test_mismatched", 3)
    assert json.loads(line) == {
        "index": 103,
        "premise": premise,
        "hypothesis": hypothesis,
        "prediction": "neutral",
        "probability": 0.5,
    }


@pytest.mark.parametrize("task", [None, "sst2"])
def test_a_file_of_rows_to_predict(tmp_path: Path, task: Any) -> None:
    write_csv(tmp_path / "new.csv", ["good w3", "bad w4 a"], header="sentence")
    file = str(tmp_path / "new.csv")
    data = prepared(tmp_path, "predict", task=task, text_columns=["sentence"], predict_path=file)
    assert data.prediction_files == ["predictions.tsv"]
    assert found(data.splits["predict"][0]) == [("good", 3), ("bad", 4)]
    row = {"index": 1, "label": 0, "prediction": "negative", "probability": 0.9}
    assert data.complete_prediction(row, 0) == {"index": 1, "prediction": 0 if task else "negative"}


@pytest.mark.parametrize("stored", [["matched"], ["mismatched"], ["matched", "mismatched"], [""]])
def test_there_are_as_many_files_as_sets_and_each_has_its_own_name(tmp_path: Path, stored: list[str]) -> None:
    for name in stored:
        columns, split = ["premise", "hypothesis"], f"test_{name}" if name else "test"
        write_rows_of(tmp_path / f"{split}.parquet", split, 3, columns, datasets.Value("int64"), [-1] * 3)
    data = prepared(tmp_path, "predict", task="mnli")
    assert len(data.prediction_files) == len(data.predict_dataloader())
    names = {"matched": "MNLI-m.tsv", "mismatched": "MNLI-mm.tsv"}
    if stored != [""]:
        assert data.prediction_files == [names[name] for name in stored]


def test_nothing_to_predict(tmp_path: Path, hub: Files) -> None:
    with refuses("data.predict_path", "has no test split"):
        prepared(hub("rte", test=0), "predict", task="rte")
    with refuses("data.predict_path", "gone.csv is missing, or is not a file of"):
        prepared(tmp_path, "predict", task="rte", predict_path="gone.csv")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_without_rows_to_predict(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"new{suffix}"
    if suffix == ".csv":
        write_csv(file, [], header="sentence")
    else:
        features = datasets.Features({"sentence": datasets.Value("string")})
        datasets.Dataset.from_dict({"sentence": []}, features=features).to_parquet(str(file))
    with refuses("data.predict_path", str(file)):
        prepared(tmp_path, "predict", task="cola", predict_path=str(file))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"max_length": 1, "task": "cola"}, ("data.max_length: 1 must be 2 or more",)),
        ({}, ("data.text_columns", "one or two columns")),
        ({"text_columns": ["a", "b", "c"]}, ("data.text_columns", "one or two columns")),
        ({"task": "cola", "val_fraction": 1.0}, ("data.val_fraction: 1.0",)),
        ({"task": "cola", "max_val_samples": 0}, ("data.max_val_samples: 0",)),
        ({"task": "cola", "batch_size": 0}, ("data.batch_size",)),
    ],
)
def test_wrong_values(tmp_path: Path, keys: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refuses(*parts):
        module(tmp_path, **keys)


def test_more_tokens_than_the_model_has_positions_for(hub: Files) -> None:
    path = hub("cola")
    for stage in ("fit", "validate", "test", "predict"):
        with refuses("data.max_length: 33 tokens are more than the 32"):
            prepared(path, stage, task="cola", max_length=33, model=text_model(word_tokenizer(), position_limit=32))
    prepared(path, task="cola", max_length=32, model=text_model(word_tokenizer(), position_limit=32))


def test_a_model_without_a_tokenizer(hub: Files) -> None:
    with refuses("TextClassificationData needs a model that has a tokenizer"):
        prepared(hub("cola"), task="cola", model=SimpleNamespace(class_names=None))


def test_a_directory_of_another_task(hub: Files) -> None:
    with refuses("data.text_columns", "train", "has no column question; it has sentence1, sentence2, label, idx"):
        prepared(hub("rte") / "rte", task="qnli")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_rows(tmp_path: Path, split: str) -> None:
    path = write_task(tmp_path, "cola")
    file = path / "cola" / f"{split}-00000-of-00001.parquet"
    write_rows_of(file, split, 0, ["sentence"], datasets.Value("int64"), [])
    with refuses("data.path", str(file), "has no rows"):
        prepared(path, task="cola")


def test_a_row_without_text(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ["w0,0", "w1,1", ",0", "w3,1"])
    write_csv(tmp_path / "validation.csv", ["w0,0", "w1,1"])
    with refuses("data.text_columns", "row 2 of", "train.csv has no text in column text", "data.skip_bad_rows"):
        prepared(tmp_path, text_columns=["text"])


# ------------------------------------------------------------------------------------------------------------- caching


def test_the_first_process_of_a_node_tokenises_for_the_others(hub: Files) -> None:
    path = hub("cola", train=31)

    class Counting:
        """A tokenizer that counts its calls."""

        def __init__(self) -> None:
            self.tokenizer, self.calls = word_tokenizer(), 0

        def __call__(self, *args: Any, **keys: Any) -> Any:
            self.calls += 1
            return self.tokenizer(*args, **keys)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

    first, second = Counting(), Counting()
    prepared(path, task="cola", world=2, rank=0, model=text_model(first), max_length=31)
    prepared(path, task="cola", world=2, rank=1, model=text_model(second), max_length=31)
    assert first.calls > 0
    assert second.calls == 0
