"""Cases of tables: the command line reads the table, or one message names the fault, the file and the row."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from datamodules.text_classification import TextClassificationData
from tests.backbones import WORDS, word_tokenizer
from tests.causal_backbones import byte_tokenizer, save_decoder
from tests.support.data import put, set_up
from tests.support.refusals import refuses
from tests.support.rows import write_rows
from tests.support.trainers import text_model

Row = dict[str, Any]


def labelled(labels: list[Any]) -> list[Row]:
    return [{"text": WORDS[i % 30], "label": label} for i, label in enumerate(labels)]


def csv_of(rows: list[Row]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]) + "\n"


def findings_of(path: Path) -> list[str]:
    """Return the lines about the data that a fit logs."""
    data = TextClassificationData(str(path), text_columns=["text"], batch_size=2)
    lines: list[str] = set_up(data, text_model(word_tokenizer())).findings.take_lines()
    return lines


def test_case_02_rows_columns_and_unread_files_are_reported(tmp_path: Path) -> None:
    train = put(tmp_path / "train.csv", csv_of(labelled(["a", "b"] * 10)))
    put(tmp_path / "reviews.csv", csv_of(labelled([0, 1])))
    put(tmp_path / "dataset_infos.json", "{}")  # metadata of the `datasets` library
    assert findings_of(tmp_path) == [
        "labels: 2 classes: a 9, b 9",
        "columns: text of text; labels of label",
        f"train: 18 rows of {train}, left after holding out 0.1 for val (val_seed 0)",
        f"val: 2 rows of {train}, the share of 0.1 held out with val_seed 0",
        "not read, since these names mean no split: reviews.csv",
    ]
    (tmp_path / "reviews.csv").unlink()
    assert not any("not read" in line for line in findings_of(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text;label\na;1\n", "separated by semicolons"),
        ("text;label\ngood, but long;1\nbad, and long;0\n", "separated by semicolons"),
        ("text;label\ngood, but long;1\nbad, long, dull;0\n", "separated by semicolons"),
        ("good film,1\nbad film,0\n", "The first line of the file must name its columns"),
    ],
)
def test_case_28_a_first_line_without_column_names_is_refused(tmp_path: Path, content: str, message: str) -> None:
    put(tmp_path / "train.csv", content)
    with refuses("data.", message):
        findings_of(tmp_path)


def words(command: str, folder: Path, backbone: Path, *options: str) -> list[str]:
    """Return the arguments of a command that reads `folder`/data and writes to `folder`/runs."""
    task = ["--data.task=null", "--data.text_columns=[text]", "--model.tuning=head"]
    paths = [f"--data.path={folder / 'data'}", f"--model.backbone={backbone}"]
    run_options = [
        "--config=tests/conf/text.yaml",
        f"--trainer.default_root_dir={folder / 'runs'}",
        "--trainer.max_epochs=1",
    ]
    return [command, *run_options, *task, *paths, *options]


def test_case_21_classes_of_test_are_checked_before_training(
    tmp_path: Path, roberta_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "data/train.csv", csv_of(labelled(["a", "b"] * 10)))
    put(tmp_path / "data/test.csv", csv_of(labelled(["a", "c"])))
    assert main(words("fit", tmp_path, roberta_path, "--test_after_fit", "true")) == 2
    log = capsys.readouterr().err
    assert "test.csv has classes that the model was not trained on (c)" in log
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_case_22_bad_rows_of_classification_are_skipped_counted_and_named(
    tmp_path: Path, roberta_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = labelled(["a", "b"] * 10)
    rows[3]["text"], rows[7]["label"], rows[11]["text"] = "  ", None, None
    write_rows(tmp_path / "data/train.jsonl", rows)
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
    command = words(
        "predict", tmp_path, roberta_path, "--ckpt_path=last", f"--data.predict_path={tmp_path / 'new.csv'}"
    )
    assert main(command) == 0
    with next((tmp_path / "runs").rglob("predictions.csv")).open() as stream:
        written = list(csv.DictReader(stream))
    assert [row["id"] for row in written] == ["0", "1", "2"]
    assert [bool(row["prediction"]) for row in written] == [True, False, True]
    assert [row["error"] for row in written] == ["", "has no text in column text", ""]


def test_case_28_model_pad_token_names_the_padding_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = save_decoder(tmp_path / "llama", pad_token_id=None)
    byte_tokenizer(pad_token=None).save_pretrained(backbone)
    put(tmp_path / "data/train.csv", csv_of(labelled(["a", "b"] * 10)))
    command = words("fit", tmp_path, backbone)
    assert main(command) == 2
    assert "Set model.pad_token to" in capsys.readouterr().err
    assert main([*command, "--model.pad_token=<|nowhere|>"]) == 2
    assert "model.pad_token: '<|nowhere|>' is no token" in capsys.readouterr().err
    assert main([*command, "--model.pad_token=<|im_end|>"]) == 0


def test_case_36_a_column_named_twice_is_refused_in_one_message(
    tmp_path: Path, roberta_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "data/train.csv", csv_of(labelled(["a", "b"] * 10)))
    assert main([*words("fit", tmp_path, roberta_path), "--data.text_columns=[text,text]"]) == 2
    log = capsys.readouterr().err
    assert "data.text_columns: text is named twice" in log
    assert "Traceback" not in log
