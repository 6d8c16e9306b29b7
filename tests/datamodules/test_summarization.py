"""Documents and summaries as tokens: what the tokenizer makes of them, in batches that keep the references."""

from __future__ import annotations

import csv
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from datamodules.errors import DataError
from datamodules.summarization import PadPairs, SummarizationData
from tests.backbones import word_tokenizer
from tests.datamodules.stub import stub_trainer, text_model

Row = dict[str, Any]
SIZES = {"train": 30, "validation": 9, "test": 7}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that no other test has written to."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def row_of(split: str, i: int) -> Row:
    """A document and a summary that say where they come from, of several lengths; `Unheard` is no known word."""
    summary = f"  the film w{i} Unheard\n" + "is not . " * (i % 4)
    return {"document": f"w{i} {split}" + " good bad" * (i * 7 % 11), "summary": summary, "id": f"{split}-{i}"}


def rows_of(split: str, size: int | None = None) -> list[Row]:
    return [row_of(split, i) for i in range(SIZES[split] if size is None else size)]


def write(file: Path, rows: list[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in SIZES:
        write(tmp_path / "data" / f"{split}.jsonl", rows_of(split))
    return tmp_path / "data"


def module(path: Path, *, stage: str = "fit", model: Any = None, **keys: Any) -> Any:
    data = SummarizationData(str(path), **{"batch_size": 4, "max_source_length": 64, "max_target_length": 64, **keys})
    model = model or text_model(word_tokenizer())
    data.trainer = stub_trainer(lightning_module=model, state=SimpleNamespace(fn=stage))
    return data


def prepared(path: Path, stage: str = "fit", **keys: Any) -> Any:
    data = module(path, stage=stage, **keys)
    data.setup(stage)
    return data


def tokens(texts: list[str], **keys: Any) -> list[list[int]]:
    return word_tokenizer()(texts, **keys)["input_ids"]


def column(rows: list[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


def refuses(*parts: str) -> Any:
    """A DataError whose message has all the parts, in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("prefix", ["", "film : "])
def test_tokens_are_those_of_the_tokenizer(folder: Path, prefix: str) -> None:
    data = prepared(folder, source_prefix=prefix)
    for name, split in (("train", "train"), ("val", "validation")):
        (dataset,) = data.splits[name]
        rows = rows_of(split)
        assert dataset.data["input_ids"][:] == tokens([prefix + text for text in column(rows, "document")])
        assert dataset.data["labels"][:] == word_tokenizer()(text_target=column(rows, "summary"))["input_ids"]
        assert dataset.lengths.tolist() == [len(ids) for ids in dataset.data["input_ids"]]


class TwoLanguages(PreTrainedTokenizerFast):
    """Ends targets otherwise than sources, as multilingual models do."""

    def _switch_to_target_mode(self) -> None:
        self._side = 1

    def _switch_to_input_mode(self) -> None:
        self._side = 0

    def _encode_plus(self, *args: Any, **keys: Any) -> Any:
        encoded = super()._encode_plus(*args, **keys)
        if getattr(self, "_side", 0):
            encoded["input_ids"] = [[*ids, 7] for ids in encoded["input_ids"]]
        return encoded


def test_targets_are_tokenised_as_targets(folder: Path) -> None:
    tokenizer = TwoLanguages(tokenizer_object=word_tokenizer().backend_tokenizer, pad_token="<pad>")
    (dataset,) = prepared(folder, model=text_model(tokenizer)).splits["val"]
    assert dataset.data["labels"][:] == [[*ids, 7] for ids in tokens(column(rows_of("validation"), "summary"))]
    assert dataset.data["input_ids"][:] == tokens(column(rows_of("validation"), "document"))


def test_long_texts_are_cut_and_references_are_not(folder: Path) -> None:
    (dataset,) = prepared(folder, max_source_length=6, max_target_length=5).splits["val"]
    rows = rows_of("validation")
    assert dataset.data["input_ids"][:] == tokens(column(rows, "document"), truncation=True, max_length=6)
    assert dataset.data["labels"][:] == tokens(column(rows, "summary"), truncation=True, max_length=5)
    assert max(map(len, tokens(column(rows, "summary")))) > 5
    assert {ids[-1] for ids in dataset.data["labels"]} == {2}  # the end is there, cut or not
    batches = [row for batch in prepared(folder, stage="validate").val_dataloader()[0] for row in batch["reference"]]
    assert sorted(batches) == sorted(column(rows, "summary"))


def test_documents_that_reach_the_limit_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(folder, stage="validate", max_source_length=6)
    cut = sum(len(ids) >= 6 for ids in tokens(column(rows_of("validation"), "document")))
    assert 0 < cut < 9
    expected = f"warning: {cut} of 9 rows of {folder / 'validation.jsonl'} reach 6 tokens and may be cut."
    assert expected in capsys.readouterr().err.splitlines()
    prepared(folder, stage="validate")
    assert "may be cut" not in capsys.readouterr().err


def test_a_folder_of_the_configuration(tmp_path: Path) -> None:
    for i, config in enumerate(("1.0.0", "3.0.0")):
        for split in SIZES:
            write(tmp_path / config / f"{split}.jsonl", rows_of(split, 5 + i))
    assert len(prepared(tmp_path, config="3.0.0").splits["train"][0]) == 6
    with refuses("data.path", "in the folders 1.0.0, 3.0.0"):
        prepared(tmp_path)
    with refuses("data.path", "in the folders 1.0.0, 3.0.0", "none of them is 2.0.0"):
        prepared(tmp_path, config="2.0.0")


def test_the_hub_is_asked_for_the_configuration_and_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def names(name: str, config: str | None, revision: str | None) -> list[str]:
        asked.add((name, config, revision))
        return ["train", "validation"]

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.add((name, config, revision))
        return datasets.Dataset.from_list(rows_of(split))

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    prepared(Path("some/data"), config="3.0.0", revision="refs/convert/parquet")
    assert asked == {("some/data", "3.0.0", "refs/convert/parquet")}


def test_a_prefix_counts_among_the_tokens_of_the_source(folder: Path) -> None:
    (dataset,) = prepared(folder, source_prefix="film is ", max_source_length=6).splits["val"]
    assert dataset.lengths.max() == 6
    assert all(ids[1:3] == tokens(["film is"])[0][1:3] for ids in dataset.data["input_ids"])


def test_the_order_of_the_files_columns_does_not_matter(tmp_path: Path) -> None:
    turned = [{"summary": r["summary"], "more": 3, "document": r["document"]} for r in rows_of("train")]
    (dataset, *_) = prepared(write(tmp_path / "turned.jsonl", turned), val_fraction=0.5).splits["train"]
    found = {batch_row["reference"]: batch_row["input_ids"] for batch_row in dataset.__getitems__(range(len(dataset)))}
    expected = dict(zip(column(turned, "summary"), tokens(column(turned, "document")), strict=True))
    assert len(found) == 15
    assert found == {reference: expected[reference] for reference in found}


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"article": r["document"], "highlights": r["summary"]} for r in rows_of("train")]
    keys = {"source_column": "article", "target_column": "highlights"}
    data = prepared(write(tmp_path / "train.jsonl", rows), **keys)
    assert len(data.splits["train"][0]) + len(data.splits["val"][0]) == 30


@pytest.mark.parametrize("name", ["reference", "input_ids", "labels", "length", "index"])
def test_a_target_column_of_any_name(tmp_path: Path, name: str) -> None:
    rows = [{"document": r["document"], name: r["summary"]} for r in rows_of("train")]
    data = prepared(write(tmp_path / "train.jsonl", rows), target_column=name)
    references = [text for batch in data.val_dataloader()[0] for text in batch["reference"]]
    assert len(references) == 3
    assert set(references) <= set(column(rows_of("train"), "summary"))


@pytest.mark.parametrize("name", ["reference", "input_ids", "labels", "length", "text"])
def test_a_source_column_of_any_name(tmp_path: Path, name: str) -> None:
    rows = [{name: r["document"], "summary": r["summary"]} for r in rows_of("train")]
    data = prepared(write(tmp_path / "train.jsonl", rows), source_column=name)
    known = tokens(column(rows_of("train"), "document"))
    assert all(ids in known for ids in data.splits["train"][0].data["input_ids"])


# -------------------------------------------------------------------------------------------------------------- batches


def known(split: str) -> dict[str, Row]:
    """Rows of a split by their reference, which no two share."""
    return {row["summary"]: row for row in rows_of(split)}


def check(batch: dict[str, Any], split: str) -> None:
    """Whether all that a batch says of each of its rows is true."""
    lengths = []
    for i, reference in enumerate(batch["reference"]):
        row = known(split)[reference]
        (source,), (target,) = tokens([row["document"]]), tokens([row["summary"]])
        lengths.append((len(source), len(target)))
        assert batch["input_ids"][i].tolist() == source + [1] * (batch["input_ids"].shape[1] - len(source))
        assert batch["attention_mask"][i].tolist() == [int(j < len(source)) for j in range(len(batch["input_ids"][i]))]
        assert batch["labels"][i].tolist() == target + [-100] * (batch["labels"].shape[1] - len(target))
        assert row["id"] == f"{split}-{batch['index'][i]}"
    assert batch["input_ids"].shape[1] == max(source for source, _ in lengths)
    assert batch["labels"].shape[1] == max(target for _, target in lengths)


def test_batches_for_evaluation_are_padded_and_whole(folder: Path) -> None:
    (loader,) = prepared(folder).val_dataloader()
    batches = list(loader)
    for batch in batches:
        check(batch, "validation")
        assert set(batch) == {"input_ids", "attention_mask", "labels", "reference", "index"}
        assert batch["input_ids"].dtype == batch["labels"].dtype == batch["index"].dtype == torch.int64
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(9))
    assert any((batch["labels"] == -100).any() for batch in batches)


def test_batches_for_training_are_padded_and_true(folder: Path) -> None:
    batches = list(prepared(folder).train_dataloader())
    for batch in batches:
        check(batch, "train")
    assert [len(batch["reference"]) for batch in batches] == [4] * 7
    assert any((batch["labels"] == -100).any() for batch in batches)


def test_the_padding_token_of_a_target_is_not_learnt_and_a_real_one_is(tmp_path: Path) -> None:
    rows = [{"document": "good", "summary": text} for text in ("bad", "bad <pad> bad")]
    data = prepared(write(tmp_path / "data/test.jsonl", rows).parent, stage="test", bucket_by_length=False)
    (batch,) = data.test_dataloader()[0]
    (bad,) = tokens(["bad"])
    assert batch["labels"].tolist() == [[*bad, -100, -100], tokens(["bad <pad> bad"])[0]]
    assert 1 in batch["labels"]


def test_batches_go_by_the_length_of_the_source(folder: Path) -> None:
    (loader,) = prepared(folder).val_dataloader()
    shown = [batch["attention_mask"].sum(1).tolist() for batch in loader]
    lengths = sorted((n for batch in shown for n in batch), reverse=True)
    assert shown[0] == lengths[:4]
    assert sorted(shown, reverse=True) == [lengths[:4], lengths[4:8], lengths[8:]]
    assert len(set(lengths)) > 4
    (loader,) = prepared(folder, bucket_by_length=False).val_dataloader()
    assert [i for batch in loader for i in batch["index"].tolist()] == list(range(9))


def test_training_batches_are_of_like_length(folder: Path) -> None:
    def padding(bucket_by_length: bool) -> int:
        loader = prepared(folder, bucket_by_length=bucket_by_length).train_dataloader()
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in loader)

    assert padding(True) < 0.5 * padding(False)


@pytest.mark.parametrize("num_workers", [1])
def test_workers_make_the_same_batches(folder: Path, num_workers: int) -> None:
    def batches(workers: int) -> list[dict[str, Any]]:
        return list(prepared(folder, num_workers=workers).val_dataloader()[0])

    for here, there in zip(batches(0), batches(num_workers), strict=True):
        assert here["reference"] == there["reference"]
        assert all(torch.equal(here[key], there[key]) for key in ("input_ids", "attention_mask", "labels", "index"))


def test_collate_goes_to_another_process(folder: Path) -> None:
    data = prepared(folder)
    rows = data.splits["val"][0].__getitems__([3, 0])
    collate = pickle.loads(pickle.dumps(data.collate()))
    assert isinstance(collate, PadPairs)
    check(collate(rows), "validation")
    assert collate(rows)["index"].tolist() == [3, 0]


# --------------------------------------------------------------------------------------------------------------- splits


def references(dataset: Any) -> list[str]:
    return [row["reference"] for row in dataset.__getitems__(range(len(dataset)))]


def test_each_split_is_its_own_file(folder: Path) -> None:
    data = prepared(folder)
    data.setup("test")
    for name, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        assert references(data.splits[name][0]) == column(rows_of(split), "summary")


def test_without_a_validation_split_some_of_training_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", rows_of("train"))
    data = prepared(path, val_fraction=0.2)
    train, val = references(data.splits["train"][0]), references(data.splits["val"][0])
    assert (len(train), len(val)) == (24, 6)
    assert sorted(train + val) == sorted(column(rows_of("train"), "summary"))
    for dataset in (data.splits["train"][0], data.splits["val"][0]):
        rows = [known("train")[reference] for reference in references(dataset)]
        assert dataset.data["input_ids"][:] == tokens(column(rows, "document"))
    again, other = (prepared(path, val_fraction=0.2, val_seed=seed) for seed in (0, 1))
    assert references(again.splits["val"][0]) == val
    assert set(references(other.splits["val"][0])) != set(val)


def test_limits_keep_texts_and_tokens_together(folder: Path) -> None:
    data = prepared(folder, max_train_samples=5, max_val_samples=3)
    data.limits["test"] = 2
    data.setup("test")
    sizes = {"train": ("train", 5), "val": ("validation", 3), "test": ("test", 2)}
    for name, (split, size) in sizes.items():
        (dataset,) = data.splits[name]
        rows = [known(split)[reference] for reference in references(dataset)]
        assert len(rows) == size
        assert dataset.data["input_ids"][:] == tokens(column(rows, "document"))
        assert dataset.data["labels"][:] == tokens(column(rows, "summary"))


def test_what_is_missing_for_a_test_is_said_before_training(tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "train.jsonl", rows_of("train")))
    with refuses("data.path:", "has no test split"):
        data.check_test_split()


# ----------------------------------------------------------------------------------------------------------- prediction


def completed(data: Any) -> list[Row]:
    rows = []
    for batch in data.predict_dataloader()[0]:
        rows += [data.complete_prediction({"index": i, "summary": f"s{i}"}, 0) for i in batch["index"].tolist()]
    return sorted(rows, key=lambda row: int(row["summary"][1:]))


def test_the_test_split_is_predicted_with_its_references(folder: Path) -> None:
    data = prepared(folder, stage="predict")
    expected = [{"id": r["id"], "summary": f"s{i}", "reference": r["summary"]} for i, r in enumerate(rows_of("test"))]
    assert completed(data) == expected
    assert data.prediction_files == ("predictions.jsonl",)


def test_a_file_without_targets_and_ids_is_predicted(folder: Path, tmp_path: Path) -> None:
    rows = [{"document": row["document"]} for row in rows_of("test")]
    data = prepared(folder, stage="predict", predict_path=str(write(tmp_path / "new.jsonl", rows)), source_prefix="a ")
    assert completed(data) == [{"id": i, "summary": f"s{i}", "reference": None} for i in range(7)]
    (dataset,) = data.splits["predict"]
    assert dataset.data["input_ids"][:] == tokens([f"a {text}" for text in column(rows, "document")])
    for batch in data.predict_dataloader()[0]:
        assert set(batch) == {"input_ids", "attention_mask", "index"}


def test_a_prediction_has_the_id_of_the_chosen_column(folder: Path, tmp_path: Path) -> None:
    rows = [{"document": "good", "id": i, "name": f"n{i}"} for i in range(3)]
    path = str(write(tmp_path / "new.jsonl", rows))
    for key, expected in (("id", [0, 1, 2]), ("name", ["n0", "n1", "n2"])):
        data = prepared(folder, stage="predict", predict_path=path, id_column=key)
        assert column(completed(data), "id") == expected
    with refuses("data.id_column", "new.jsonl has no column no_such"):
        prepared(folder, stage="predict", predict_path=path, id_column="no_such")


@pytest.mark.parametrize("cells", [[None, None], [1, 2], ["good", None]])
def test_targets_are_not_looked_at_for_prediction(folder: Path, tmp_path: Path, cells: list[Any]) -> None:
    rows = [{"document": "good", "summary": cell} for cell in cells]
    data = prepared(folder, stage="predict", predict_path=str(write(tmp_path / "new.jsonl", rows)))
    assert column(completed(data), "reference") == cells


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("key", ["source_column", "target_column"])
def test_a_column_that_is_not_there(folder: Path, key: str) -> None:
    with refuses(f"data.{key}:", "train.jsonl has no column body; it has document, summary, id."):
        prepared(folder, **{key: "body"})


def test_numbers_are_targets_as_text(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{**row, "summary": i} for i, row in enumerate(rows_of("train"))])
    data = prepared(path, val_fraction=0.1)
    texts = data.splits["train"][0].texts["reference"][:] + data.splits["val"][0].texts["reference"][:]
    assert sorted(texts, key=int) == [str(i) for i in range(len(texts))]


@pytest.mark.parametrize(("key", "name"), [("source_column", "document"), ("target_column", "summary")])
def test_an_empty_cell(tmp_path: Path, key: str, name: str) -> None:
    path = tmp_path / "train.csv"
    with path.open("w") as file:
        table = csv.DictWriter(file, ["document", "summary", "id"])
        table.writeheader()
        table.writerows([{**row, name: "" if i == 4 else row[name]} for i, row in enumerate(rows_of("train"))])
    with refuses(f"data.{key}: row 4 of", f"train.csv has no text in column {name}"):
        prepared(path)


def test_an_empty_source_to_predict_is_a_row_with_an_error(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "new.jsonl", [{"document": None}, {"document": "good"}, {"document": " "}])
    data = prepared(folder, stage="predict", predict_path=str(path))
    assert [batch["index"].tolist() for batch in data.predict_dataloader()[0]] == [[1]]
    assert data.failed_rows(0) == [{"index": i, "error": "has no text in column document"} for i in (0, 2)]
    row = data.complete_prediction(data.failed_rows(0)[0], 0)
    assert row == {"id": 0, "summary": None, "reference": None, "error": "has no text in column document"}


@pytest.mark.parametrize("key", ["max_source_length", "max_target_length"])
def test_more_tokens_than_positions(folder: Path, key: str) -> None:
    model = text_model(word_tokenizer(), position_limit=64)
    assert prepared(folder, model=model).splits  # as many are fine
    with refuses(f"data.{key}: 65 tokens are more than the 64 that the backbone has positions for."):
        prepared(folder, model=model, **{key: 65})


@pytest.mark.parametrize("key", ["max_source_length", "max_target_length"])
def test_no_room_for_a_text(folder: Path, key: str) -> None:
    with refuses(f"data.{key}: 1 must be 2 or more."):
        module(folder, **{key: 1})


def test_a_model_without_a_tokenizer(folder: Path) -> None:
    with refuses("SummarizationData needs a model that has a tokenizer"):
        prepared(folder, model=SimpleNamespace())


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of a tokenizer."""
    found: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, *args: Any, **keys: Any) -> Any:
        found.append(1)
        return call(self, *args, **keys)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    return found


def test_a_second_setup_does_not_tokenise_again(folder: Path, calls: list[int]) -> None:
    first = prepared(folder, source_prefix="film ")
    assert len(calls) == 4  # sources and targets of two splits
    second = prepared(folder, source_prefix="film ")
    first.setup("fit")
    first.setup("validate")
    assert len(calls) == 4
    for split in ("train", "val"):
        assert second.splits[split][0].data[:] == first.splits[split][0].data[:]


@pytest.mark.parametrize(
    "keys",
    [{"source_prefix": "bad "}, {"max_source_length": 6}, {"max_target_length": 6}, {"source_column": "id"}],
    ids=str,
)
def test_another_prefix_length_or_column_is_tokenised_anew(folder: Path, calls: list[int], keys: Row) -> None:
    prepared(folder)
    before = len(calls)
    (dataset,) = prepared(folder, **keys).splits["val"]
    assert len(calls) == 2 * before
    texts = [
        keys.get("source_prefix", "") + row[keys.get("source_column", "document")] for row in rows_of("validation")
    ]
    most_source, most_target = keys.get("max_source_length", 64), keys.get("max_target_length", 64)
    assert dataset.data["input_ids"][:] == tokens(texts, truncation=True, max_length=most_source)
    targets = column(rows_of("validation"), "summary")
    assert dataset.data["labels"][:] == tokens(targets, truncation=True, max_length=most_target)


def test_source_and_target_are_not_taken_for_each_other(folder: Path) -> None:
    prepared(folder)
    turned = prepared(folder, source_column="summary", target_column="document")
    (dataset,) = turned.splits["val"]
    assert dataset.data["input_ids"][:] == tokens(column(rows_of("validation"), "summary"))
    assert dataset.data["labels"][:] == tokens(column(rows_of("validation"), "document"))
    assert references(dataset) == column(rows_of("validation"), "document")


def test_new_texts_are_tokenised_anew(folder: Path, calls: list[int]) -> None:
    prepared(folder)
    before = len(calls)
    rows = rows_of("train")
    write(folder / "train.jsonl", [*rows[:-1], {**rows[-1], "summary": "not the same"}])
    data = prepared(folder)
    assert len(calls) == before + 2  # the validation split is as it was
    assert data.splits["train"][0].data["labels"][29] == tokens(["not the same"])[0]
    assert references(data.splits["train"][0])[29] == "not the same"
