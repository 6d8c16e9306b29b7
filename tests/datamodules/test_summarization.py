"""Documents and summaries: prefixes, tokens of targets, uncut references, predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from datamodules.summarization import SummarizationData
from tests.backbones import word_tokenizer
from tests.support.data import set_up
from tests.support.refusals import refuses
from tests.support.rows import write_rows
from tests.support.trainers import text_model

Row = dict[str, Any]
SIZES = {"train": 30, "validation": 9, "test": 7}


def row_of(split: str, i: int) -> Row:
    """Return a document and a summary that name split and row. Lengths differ; `Unheard` is not in the vocabulary."""
    summary = f"  the film w{i} Unheard\n" + "is not . " * (i % 4)
    return {"document": f"w{i} {split}" + " good bad" * (i * 7 % 11), "summary": summary, "id": f"{split}-{i}"}


def rows_of(split: str) -> list[Row]:
    return [row_of(split, i) for i in range(SIZES[split])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in SIZES:
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows_of(split))
    return tmp_path / "data"


def prepared(path: Path, stage: str = "fit", *, model: Any = None, **keys: Any) -> Any:
    keys = {"batch_size": 4, "max_source_length": 64, "max_target_length": 64, **keys}
    return set_up(SummarizationData(str(path), **keys), model or text_model(word_tokenizer()), stage)


def tokens(texts: list[str], **keys: Any) -> list[list[int]]:
    ids: list[list[int]] = word_tokenizer()(texts, **keys)["input_ids"]
    return ids


def column(rows: list[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


DOCUMENTS, SUMMARIES = (column(rows_of("validation"), name) for name in ("document", "summary"))


class TwoLanguages(PreTrainedTokenizerFast):
    """A tokenizer that ends targets with another token than sources, as multilingual tokenizers do."""

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
    assert dataset.data["labels"][:] == [[*ids, 7] for ids in tokens(SUMMARIES)]
    assert dataset.data["input_ids"][:] == tokens(DOCUMENTS)


def test_long_texts_are_cut_and_references_are_not(folder: Path) -> None:
    data = prepared(folder, max_source_length=6, max_target_length=5, source_prefix="film is ")
    (dataset,) = data.splits["val"]
    prefixed = [f"film is {text}" for text in DOCUMENTS]
    assert dataset.data["input_ids"][:] == tokens(prefixed, truncation=True, max_length=6)
    assert dataset.data["labels"][:] == tokens(SUMMARIES, truncation=True, max_length=5)
    assert max(map(len, tokens(SUMMARIES))) > 5
    assert {ids[-1] for ids in dataset.data["labels"]} == {2}  # cut targets have their end token too
    assert sorted(r for batch in data.val_dataloader()[0] for r in batch["reference"]) == sorted(SUMMARIES)


@pytest.mark.parametrize("name", ["reference", "input_ids", "labels", "length", "index", "highlights"])
def test_columns_may_have_any_name_and_order(tmp_path: Path, name: str) -> None:
    for source, target in ((name, "text"), ("text", name)):
        rows = [{target: row["summary"], "more": 3, source: row["document"]} for row in rows_of("train")]
        path = write_rows(tmp_path / source / "train.jsonl", rows)
        (dataset,) = prepared(path, source_column=source, target_column=target, val_fraction=0.5).splits["train"]
        tokens_of_reference = {row["reference"]: row["input_ids"] for row in dataset.__getitems__(range(len(dataset)))}
        expected = dict(zip(column(rows, target), tokens(column(rows, source)), strict=True))
        assert len(tokens_of_reference) == 15
        assert tokens_of_reference == {reference: expected[reference] for reference in tokens_of_reference}


def test_numbers_as_targets_are_read_as_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{**row, "summary": i} for i, row in enumerate(rows_of("train"))])
    data = prepared(path, val_fraction=0.1)
    texts = data.splits["train"][0].texts["reference"][:] + data.splits["val"][0].texts["reference"][:]
    assert sorted(texts, key=int) == [str(i) for i in range(30)]


def test_the_loss_ignores_padding_but_not_a_padding_token_in_a_target(tmp_path: Path) -> None:
    rows = [{"document": "good", "summary": text} for text in ("bad", "bad <pad> bad")]
    data = prepared(write_rows(tmp_path / "data/test.jsonl", rows).parent, "test", bucket_by_length=False)
    (batch,) = data.test_dataloader()[0]
    (bad,) = tokens(["bad"])
    assert batch["labels"].tolist() == [[*bad, -100, -100], tokens(["bad <pad> bad"])[0]]
    assert 1 in batch["labels"]


# ----------------------------------------------------------------------------------------------------------- prediction


def completed(data: Any) -> list[Row]:
    rows = []
    for batch in data.predict_dataloader()[0]:
        rows += [data.complete_prediction({"index": i, "summary": f"s{i}"}, 0) for i in batch["index"].tolist()]
    return sorted(rows, key=lambda row: int(row["summary"][1:]))


def test_the_test_split_is_predicted_with_its_references(folder: Path) -> None:
    data = prepared(folder, "predict")
    expected = [{"id": r["id"], "summary": f"s{i}", "reference": r["summary"]} for i, r in enumerate(rows_of("test"))]
    assert completed(data) == expected
    assert data.prediction_files == ("predictions.csv",)


@pytest.mark.parametrize("cells", [[None, None], [1, 2], ["good", None]])
def test_targets_are_not_checked_for_prediction(folder: Path, tmp_path: Path, cells: list[Any]) -> None:
    rows = [{"document": "good", "summary": cell} for cell in cells]
    data = prepared(folder, "predict", predict_path=str(write_rows(tmp_path / "new.jsonl", rows)))
    assert column(completed(data), "reference") == cells


def test_a_prediction_has_the_id_of_a_column_or_its_row_number(folder: Path, tmp_path: Path) -> None:
    rows = [{"document": "good", "id": f"i{i}", "name": f"n{i}"} for i in range(3)]
    named = str(write_rows(tmp_path / "new.jsonl", rows))
    plain = str(write_rows(tmp_path / "plain.jsonl", [{"document": "good"}] * 3))
    for path, key, expected in (
        (named, "id", ["i0", "i1", "i2"]),
        (named, "name", ["n0", "n1", "n2"]),
        (plain, "id", [0, 1, 2]),
    ):
        data = prepared(folder, "predict", predict_path=path, id_column=key, source_prefix="a ")
        assert completed(data) == [
            {"id": name, "summary": f"s{i}", "reference": None} for i, name in enumerate(expected)
        ]
        assert data.splits["predict"][0].data["input_ids"][:] == tokens(["a good"] * 3)
    with refuses("data.id_column", "new.jsonl has no column no_such"):
        prepared(folder, "predict", predict_path=named, id_column="no_such")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_source_length": 1}, "data.max_source_length: 1 must be 2 or more."),
        ({"max_target_length": 1}, "data.max_target_length: 1 must be 2 or more."),
        ({"source_column": "a", "target_column": "a"}, "data.target_column: a is data.source_column already"),
    ],
)
def test_bad_keys_are_refused(keys: Row, said: str) -> None:
    with refuses(said):
        SummarizationData("somewhere", **keys)
