"""Tables that users have somewhere: each is read as meant, or one message says what is wrong where."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.cli import main
from datamodules.errors import DataError
from datamodules.language_modeling import LanguageModelingData
from datamodules.multiple_choice import MultipleChoiceData
from datamodules.sources.labels import parse_labels
from datamodules.sources.splits import SPLITS
from datamodules.sources.tables import Reading, open_table
from datamodules.summarization import SummarizationData
from datamodules.text_classification import TextClassificationData
from tests.backbones import WORDS, word_tokenizer
from tests.causal_backbones import CHAT, byte_tokenizer, save_decoder
from tests.conftest import questions
from tests.datamodules.stub import stub_trainer, text_model

Row = dict[str, Any]
STRICT = (
    "{% for m in messages %}{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}" + CHAT
)


def put(file: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return file


def lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def labelled(labels: list[Any], start: int = 0) -> list[Row]:
    return [{"text": WORDS[start + i % 30], "label": label} for i, label in enumerate(labels)]


def csv_of(rows: list[Row], mark: str = ",") -> str:
    return "\n".join([mark.join(rows[0]), *(mark.join(str(v) for v in row.values()) for row in rows)]) + "\n"


def prepared(path: Path, stage: str = "fit", model: Any = None, kind: Any = TextClassificationData, **keys: Any) -> Any:
    """A data module that is set up for a stage."""
    own: Row = {"text_columns": ["text"]} if kind is TextClassificationData else {}
    data = kind(str(path), **own | {"batch_size": 2, "max_length": 32} | keys)
    if kind is MultipleChoiceData:
        data.max_length = None
    data.trainer = stub_trainer(lightning_module=model or text_model(word_tokenizer()), state=SimpleNamespace(fn=stage))
    data.setup(stage)
    return data


def labels_of(data: Any, split: str = "train") -> list[str]:
    """The names of the classes of a split, in the order of its rows."""
    return [data.class_names[i] for i in data.splits[split][0].targets["label"].tolist()]


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train.csv", "Dev.csv", "TEST.csv"),
        ("train.CSV", "val.CSV", "Testing.Csv"),
        ("training.csv", "dev.csv", "test_data.csv"),
        ("wrapped/Training/0.csv", "wrapped/Validation/0.csv", "wrapped/Testing/0.csv"),
        ("train-00000-of-00001.csv", "validation-00000-of-00001.csv", "test-00000-of-00001.csv"),
        ("train_set.csv", "evaluation.csv", "test-set.csv"),
    ],
)
def test_case_02_names_that_mean_a_split(tmp_path: Path, train: str, val: str, test: str) -> None:
    for name, label in ((train, "a"), (val, "b"), (test, "c")):
        put(tmp_path / name, csv_of(labelled([label, label])))
    put(tmp_path / "__MACOSX/train.csv", "no")
    for split, label in (("train", "a"), ("val", "b"), ("test", "c")):
        table = open_table(str(tmp_path), SPLITS[split])
        assert table is not None
        assert table.data["label"][:] == [label, label]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Train.TSV", csv_of(labelled([0, 1]), "\t").encode()),
        ("train.csv.gz", gzip.compress(csv_of(labelled([0, 1])).encode(), mtime=0)),
        ("train.jsonl.gz", gzip.compress(lines(labelled([0, 1])).encode(), mtime=0)),
        ("train.ndjson", lines(labelled([0, 1])).encode()),
        ("train.json", json.dumps(labelled([0, 1])).encode()),
        ("train.json", json.dumps({"data": labelled([0, 1]), "version": 2}).encode()),
        ("train.csv", csv_of(labelled([0, 1])).replace("\n", "\r\n").encode()),
        ("train.csv", b"\xef\xbb\xbf" + csv_of(labelled([0, 1])).encode()),
    ],
)
def test_case_02_kinds_of_files(tmp_path: Path, name: str, content: bytes) -> None:
    put(tmp_path / name, content)
    table = open_table(str(tmp_path), SPLITS["train"])
    assert table is not None
    assert table.data[:] == {"text": WORDS[:2], "label": [0, 1]}


def test_case_02_names_that_mean_no_split_are_listed(tmp_path: Path) -> None:
    put(tmp_path / "reviews.csv", csv_of(labelled([0, 1])))
    with pytest.raises(DataError, match=r"data\.path: .* It holds reviews\.csv\. Rename the files, or give one"):
        open_table(str(tmp_path), SPLITS["train"])
    put(tmp_path / "train.csv", csv_of(labelled([0, 1] * 10)))
    found = prepared(tmp_path).findings.take_lines()
    assert "not read, since these names mean no split: reviews.csv" in found
    put(tmp_path / "dev.csv", csv_of(labelled([0, 1])))
    put(tmp_path / "validation.csv", csv_of(labelled([0, 1])))
    with pytest.raises(DataError, match="validation under 2 names, dev and validation"):
        prepared(tmp_path)


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1001, 2000], ["1001", "2000"]),
        ([997 * i for i in range(40)], [str(997 * i) for i in range(40)]),
        ([10**15, -5, 2], ["-5", "2", str(10**15)]),
        ([1, -1], ["-1", "1"]),
        ([3, 1, 0], ["0", "1", "3"]),
        (["1", "9" * 24], ["1", "9" * 24]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_case_04_the_classes_that_occur(tmp_path: Path, suffix: str, labels: list[int], names: list[str]) -> None:
    rows = labelled(labels * 4)
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    else:
        put(tmp_path / f"train.{suffix}", csv_of(rows) if suffix == "csv" else lines(rows))
    put(tmp_path / "validation.csv", csv_of(labelled(labels[:1])))
    data = prepared(tmp_path)
    assert data.class_names == names
    assert labels_of(data) == [str(label) for label in labels * 4]
    assert labels_of(data, "val") == [str(labels[0])]


def test_case_04_a_line_if_it_looks_like_a_regression(tmp_path: Path) -> None:
    put(tmp_path / "train.csv", csv_of(labelled([7 * i for i in range(40)])))
    said = prepared(tmp_path).findings.take_lines()
    assert any("40 different whole numbers in 40 rows are read as classes; for a regression" in line for line in said)
    put(tmp_path / "other/train.csv", csv_of(labelled([i % 5 for i in range(40)])))
    assert not any("regression" in line for line in prepared(tmp_path / "other").findings.take_lines())


def test_case_04_a_checkpoint_of_before_keeps_its_classes(tmp_path: Path) -> None:
    put(tmp_path / "test.csv", csv_of(labelled([3, 0, 3])))
    model = text_model(word_tokenizer(), class_names=["0", "1", "2", "3"])
    assert labels_of(prepared(tmp_path, "test", model), "test") == ["3", "0", "3"]


@pytest.mark.parametrize(
    "written",
    [
        lines(labelled([True, False, True])).encode(),
        lines(labelled(["true", "false", "true"])).encode(),
        lines(labelled(["TRUE", "False", "true"])).encode(),
        csv_of(labelled(["True", "False", "True"])).encode(),
        csv_of(labelled(["TRUE", "FALSE", "TRUE"])).encode(),
        csv_of(labelled(["true", " false", "true"])).encode(),
    ],
)
def test_case_15_booleans_have_one_naming(tmp_path: Path, written: bytes) -> None:
    file = put(tmp_path / ("test.jsonl" if written.startswith(b"{") else "test.csv"), written)
    put(tmp_path / "train.jsonl", lines(labelled([False, True] * 10)))
    data = prepared(tmp_path)
    assert data.class_names == ["False", "True"]
    for known in (["False", "True"], ["0", "1"], ["false", "true"]):  # the last two are of earlier checkpoints
        test = prepared(file.parent, "test", text_model(word_tokenizer(), class_names=known))
        assert test.splits["test"][0].targets["label"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([0.5, 1.5], [1, 3], [1.0, 3.0]),  # whole numbers alone, of a regression
        ([True, False], [1, 0, 1], [1, 0, 1]),
        ([1, 0], [True, False], [1, 0]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_case_15_other_splits_are_read_as_the_training_rows(
    tmp_path: Path, suffix: str, train: list[Any], test: list[Any], expected: list[Any]
) -> None:
    write = csv_of if suffix == "csv" else lines
    put(tmp_path / f"train.{suffix}", write(labelled(train * 10)))
    put(tmp_path / f"validation.{suffix}", write(labelled(test)))
    data = prepared(tmp_path)
    assert data.splits["val"][0].targets["label"].tolist() == expected


def test_case_15_labels_that_leave_a_doubt_are_told(tmp_path: Path) -> None:
    def read(rows: list[Row]) -> Any:
        table = open_table(str(put(tmp_path / "train.jsonl", lines(rows))), ["train"])
        assert table is not None
        return parse_labels(table, "label")

    assert "'Yes' and 'yes '" in read(labelled(["Yes", "yes ", "no"])).notes[0]
    assert "all whole, read as a regression" in read(labelled([1.0, 2.0])).notes[0]
    mixed = read(labelled([1, "yes", 1]))
    assert (mixed.class_names, mixed.values.tolist()) == (["1", "yes"], [0, 1, 0])
    with pytest.raises(DataError, match="lists of labels are not supported"):
        read(labelled([["a"], ["a", "b"]]))


# -------------------------------------------------------------------------------------------------------- before a fit


def test_case_21_classes_of_test_are_checked_before_training(
    tmp_path: Path, roberta_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "data/train.csv", csv_of(labelled(["a", "b"] * 10)))
    put(tmp_path / "data/test.csv", csv_of(labelled(["a", "c"])))
    assert main(words("fit", tmp_path, roberta_path, "--test_after_fit", "true")) == 2
    told = capsys.readouterr().err
    assert "test.csv has classes that the model was not trained on (c)" in told
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def words(command: str, folder: Path, backbone: Path, *more: str) -> list[str]:
    """A command on folder/data that writes to folder/runs."""
    task = ["--data.task=null", "--data.text_columns=[text]", "--model.tuning=head"]
    paths = [f"--data.path={folder / 'data'}", f"--model.backbone={backbone}"]
    where = ["--config=tests/conf/text.yaml", f"--trainer.default_root_dir={folder / 'runs'}", "--trainer.max_epochs=1"]
    return [command, *where, *task, *paths, *more]


def test_case_22_bad_rows_of_classification_are_skipped_counted_and_named(
    tmp_path: Path, roberta_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = labelled(["a", "b"] * 10)
    rows[3]["text"], rows[7]["label"], rows[11]["text"] = "  ", None, None
    put(tmp_path / "data/train.jsonl", lines(rows))
    put(tmp_path / "data/validation.csv", csv_of(labelled(["a", "b"])))
    assert main(words("fit", tmp_path, roberta_path, "--data.skip_bad_rows=2")) == 2
    assert "row 11 of" in capsys.readouterr().err
    with caplog.at_level(logging.INFO):
        assert main(words("fit", tmp_path, roberta_path, "--data.skip_bad_rows=3")) == 0
    (file,) = (tmp_path / "runs").rglob("skipped.csv")
    with file.open() as stream:
        assert [row["row"] for row in csv.DictReader(stream)] == ["row 3", "row 7", "row 11"]
    assert "train: 17 rows of" in caplog.text
    assert "labels: 2 classes: a 10, b 7" in caplog.text
    put(tmp_path / "new.csv", 'text\ngood\n""\nbad\n')
    asked = words("predict", tmp_path, roberta_path, "--ckpt_path=last", f"--data.predict_path={tmp_path / 'new.csv'}")
    assert main(asked) == 0
    with next((tmp_path / "runs").rglob("predictions.tsv")).open() as stream:
        written = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["index"] for row in written] == ["0", "1", "2"]
    assert [bool(row["prediction"]) for row in written] == [True, False, True]
    assert [row["error"] for row in written] == ["", "has no text in column text", ""]


def test_case_22_the_order_of_good_rows_does_not_depend_on_the_key(tmp_path: Path) -> None:
    rows = labelled([0, 1] * 15)
    rows[4]["text"] = None
    put(tmp_path / "train.jsonl", lines(rows))
    made = [prepared(tmp_path, skip_bad_rows=n, max_train_samples=20) for n in (1, 7)]
    texts = [[m.splits[s][0].data["input_ids"][:] for s in ("train", "val")] for m in made]
    assert texts[0] == texts[1]
    assert len(texts[0][0]) + len(made[0].findings.skipped) in (20, 21)


BAD_CHATS = {
    "begins with the assistant": [("assistant", "a"), ("user", "b"), ("assistant", "c")],
    "two users": [("user", "a"), ("user", "b"), ("assistant", "c")],
    "system in the middle": [("user", "a"), ("system", "b"), ("assistant", "c")],
    "empty content": [("user", " "), ("assistant", "c")],
    "unknown role": [("customer", "a"), ("assistant", "c")],
    "tool": [("user", "a"), ("tool", "b"), ("assistant", "c")],
}


def chat(*turns: tuple[str, str], names: tuple[str, str] = ("role", "content")) -> list[Row]:
    return [dict(zip(names, turn, strict=True)) for turn in turns]


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_case_22_conversations_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    good = {"messages": chat(("user", "Hi"), ("assistant", "Yo"))}
    rows = [good, {"messages": chat(*BAD_CHATS[kind])}, good, good]
    for split in ("train", "validation"):
        put(tmp_path / f"{split}.jsonl", lines(rows))
    keys = {
        "kind": LanguageModelingData,
        "model": text_model(byte_tokenizer(STRICT)),
        "template": "chat",
        "max_length": 64,
    }
    with pytest.raises(DataError, match=r"row 1 of .*train\.jsonl"):
        prepared(tmp_path, **keys)
    data = prepared(tmp_path, skip_bad_rows=1, **keys)
    assert "empty conversation" not in data.findings.skipped[0].reason
    assert [(row.split, row.row) for row in data.findings.skipped] == [("train", "row 1"), ("val", "row 1")]
    assert len(data.splits["train"][0]) == 3
    again = prepared(tmp_path, skip_bad_rows=1, **keys)  # from the cache of tokens
    assert again.findings.skipped == data.findings.skipped
    asked = [{"messages": messages["messages"][:-1]} for messages in rows]
    if kind == "begins with the assistant":
        asked[1] = {"messages": chat(("assistant", "a"), ("user", "b"))}
    asked_of = prepared(tmp_path, "predict", predict_path=str(put(tmp_path / "new.jsonl", lines(asked))), **keys)
    assert [i for batch in asked_of.predict_dataloader()[0] for i in batch["index"].tolist()] == [0, 2, 3]
    (failed,) = asked_of.failed_rows(0)
    assert asked_of.complete_prediction(failed, 0)["error"]


def test_case_22_summaries_and_questions(tmp_path: Path) -> None:
    pairs = [
        {"document": "good", "summary": "a"},
        {"document": "", "summary": "a"},
        {"document": "bad", "summary": None},
    ]
    put(tmp_path / "s/train.jsonl", lines(pairs * 2))
    put(tmp_path / "s/validation.jsonl", lines(pairs[:1]))
    data = SummarizationData(str(tmp_path / "s"), max_source_length=32, max_target_length=32, skip_bad_rows=4)
    data.trainer = stub_trainer(lightning_module=text_model(word_tokenizer()))
    data.setup("fit")
    assert [row.row for row in data.findings.skipped] == ["row 1", "row 2", "row 4", "row 5"]
    asked = questions(6)
    asked[2]["choices"], asked[4]["answer"] = ["one"], 9
    put(tmp_path / "q/dev.jsonl", lines(questions(10)))
    put(tmp_path / "q/test.jsonl", lines(asked))
    model = text_model(byte_tokenizer())
    with pytest.raises(DataError, match=r"row 2 of .*test\.jsonl has \['one'\]"):
        prepared(tmp_path / "q", "test", model, MultipleChoiceData, shots=1)
    data = prepared(tmp_path / "q", "test", model, MultipleChoiceData, shots=1, skip_bad_rows=2)
    assert sorted(i for batch in data.test_dataloader()[0] for i in batch["index"].tolist()) == [0, 1, 3, 5]
    data = prepared(tmp_path / "q", "predict", model, MultipleChoiceData, shots=1)
    assert [row["index"] for row in data.failed_rows(0)] == [2, 4]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_case_28_encodings(tmp_path: Path, encoding: str, suffix: str) -> None:
    rows = [{"text": "café", "label": 0}, {"text": "Straße", "label": 1}]
    written = csv_of(rows) if suffix == "csv" else "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    put(tmp_path / f"train.{suffix}", written, encoding)
    likely = "cp1252" if encoding == "latin-1" else encoding
    with pytest.raises(DataError, match=rf"data\.encoding: .*train\.{suffix} is not utf-8.*likely {likely}"):
        open_table(str(tmp_path), ["train"])
    table = open_table(str(tmp_path), ["train"], reading=Reading(encoding))
    assert table is not None
    assert table.data["text"][:] == ["café", "Straße"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_case_28_digits_are_text_where_text_is_asked_for(tmp_path: Path, suffix: str) -> None:
    cells = ["007", "1.50", "12"] if suffix == "csv" else [7, 12, 3]
    rows = [{"text": cell, "label": i % 2} for i, cell in enumerate(cells * 5)]
    put(tmp_path / f"train.{suffix}", csv_of(rows) if suffix == "csv" else lines(rows))
    put(tmp_path / f"validation.{suffix}", csv_of(rows) if suffix == "csv" else lines(rows))
    data = prepared(tmp_path)
    expected = word_tokenizer()([str(row["text"]) for row in rows])["input_ids"]
    assert data.splits["train"][0].data["input_ids"][:] == expected
    assert data.class_names == ["0", "1"]


@pytest.mark.parametrize(("labels", "skip"), [([0, -1, 1, 2], -1), (["a", "none", "b", "c"], "none")])
def test_case_28_rows_of_a_label_are_left_out(tmp_path: Path, labels: list[Any], skip: Any) -> None:
    for split in ("train", "validation"):
        put(tmp_path / f"{split}.csv", csv_of(labelled(labels * 5)))
    data = prepared(tmp_path, skip_label=skip)
    assert labels_of(data) == [str(label) for label in labels if label != skip] * 5
    where = tmp_path / "train.csv"
    said = f"5 rows of {where} have the label {skip} (data.skip_label) and are left out"
    assert said in data.findings.take_lines()
    assert data.findings.skipped == []


def test_case_28_sharegpt(tmp_path: Path) -> None:
    turns = [("system", "S"), ("human", "Hi"), ("gpt", "Yo"), ("human", "More"), ("gpt", "No")]
    put(tmp_path / "a/train.jsonl", lines([{"conversations": chat(*turns, names=("from", "value"))}] * 4))
    usual = [({"human": "user", "gpt": "assistant"}.get(role, role), text) for role, text in turns]
    put(tmp_path / "b/train.jsonl", lines([{"messages": chat(*usual)}] * 4))
    put(tmp_path / "c/train.jsonl", lines([{"conversations": chat(*usual)}] * 4))
    others = [({"gpt": "chatgpt"}.get(role, role), text) for role, text in turns]
    put(tmp_path / "d/train.jsonl", lines([{"conversations": chat(*others, names=("from", "value"))}] * 4))
    keys = {"kind": LanguageModelingData, "model": text_model(byte_tokenizer()), "template": "chat", "max_length": 256}
    made = [prepared(tmp_path / name, val_fraction=0.3, **keys) for name in "abcd"]
    first, *others = (data.splits["train"][0].data[:] for data in made)
    assert others == [first] * 3
    assert any("the column conversations of" in line for line in made[0].findings.take_lines())


def test_case_28_a_pad_token_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = save_decoder(tmp_path / "llama", pad_token_id=None)
    byte_tokenizer(pad_token=None).save_pretrained(backbone)
    put(tmp_path / "data/train.csv", csv_of(labelled(["a", "b"] * 10)))
    asked = words("fit", tmp_path, backbone)
    assert main(asked) == 2
    assert "Set model.pad_token to" in capsys.readouterr().err
    assert main([*asked, "--model.pad_token=<|nowhere|>"]) == 2
    assert "model.pad_token: '<|nowhere|>' is no token" in capsys.readouterr().err
    assert main([*asked, "--model.pad_token=<|im_end|>"]) == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.csv", b"text;label\na;1\n", "separated by semicolons"),
        ("train.csv", b"good film,1\nbad film,0\n", "The first line of the file must name its columns"),
        ("train.csv", b"text,label\na,1,x\nb,2,y\n", "more cells than its first line has names"),
        ("train.csv", b"text,label\na,1\nb,2,3\n", "Line 3 has 3 cells, and the first line names 2"),
        ("train.csv", b'text,label\na,1\n"b,2\nc,1\n', "near line 3, is never closed"),
        ("train.csv", b"text, label\na, 1\n", "Remove the spaces around ' label'"),
        (
            "train.json",
            json.dumps({"text": {i: "a" for i in range(99)}, "label": {i: 1 for i in range(99)}}).encode(),
            "must hold numbers or names, and it holds struct<.{,80}$",
        ),
        ("train.csv", b"text,text,label\na,b,1\n", "has 2 columns text"),
        ("train.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", lab\n', "line 2 of"),
        ("train.jsonl", b'{"text": "a", "label": 1}\n\xff\n', "line 2 of"),
    ],
)
def test_case_28_files_that_are_broken_name_the_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    put(tmp_path / name, content)
    with pytest.raises(DataError, match=said):
        prepared(tmp_path)


def test_case_28_rows_of_a_tsv_that_a_stray_quotation_mark_joins_are_told(tmp_path: Path) -> None:
    put(tmp_path / "train.tsv", 'text\tlabel\na\t0\n"b\t1\nc\t0\n"d\t1\ne\t0\n')
    found = prepared(tmp_path).findings.take_lines()
    assert any("text of" in line and "1 cells hold tabs and line breaks" in line for line in found)


@pytest.mark.parametrize("encoding", ["rot13", "base64", "hex", "nonsense"])
def test_case_28_encodings_that_are_not_of_text(encoding: str) -> None:
    with pytest.raises(DataError, match=rf"data\.encoding: '{encoding}' is no encoding"):
        Reading(encoding)


def test_case_28_files_of_the_datasets_library_are_no_tables(tmp_path: Path) -> None:
    put(tmp_path / "data/train-00000-of-00001.csv", csv_of(labelled([0, 1] * 10)))
    put(tmp_path / "dataset_infos.json", "{}")
    assert not any("not read" in line for line in prepared(tmp_path).findings.take_lines())


# ------------------------------------------------------------------------------------------------------------- columns


def test_case_36_columns_that_are_named_twice(tmp_path: Path) -> None:
    put(tmp_path / "new.csv", "text\na\n")
    for made in (
        lambda: TextClassificationData(str(tmp_path), text_columns=["a", "a"]),
        lambda: TextClassificationData(str(tmp_path), text_columns=["a", "label"]),
        lambda: SummarizationData(str(tmp_path), source_column="a", target_column="a"),
        lambda: MultipleChoiceData(str(tmp_path), question_column="a", choices_column="a"),
        lambda: prepared(tmp_path, "predict", id_column="name", predict_path=str(tmp_path / "new.csv")),
    ):
        with pytest.raises(DataError, match=r"data\.\w+_columns?: "):
            made()


def test_case_36_the_command_line_refuses_them_in_one_message(
    tmp_path: Path, roberta_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "data/train.csv", csv_of(labelled(["a", "b"] * 10)))
    assert main([*words("fit", tmp_path, roberta_path), "--data.text_columns=[text,text]"]) == 2
    told = capsys.readouterr().err
    assert "data.text_columns: text is named twice" in told
    assert "Traceback" not in told


def test_findings_take_ten_lines_at_most_and_name_each_split(tmp_path: Path) -> None:
    put(tmp_path / "train.csv", csv_of(labelled(["a", "b"] * 10)))
    said = prepared(tmp_path).findings.take_lines()
    assert len(said) <= 10
    where = tmp_path / "train.csv"
    assert f"train: 18 rows of {where}, without the share of 0.1 held out with val_seed 0" in said
    assert f"val: 2 rows of {where}, the share of 0.1 held out with val_seed 0" in said
    assert "columns: text of text; labels of label" in said
