"""Bad input of the text families: one message that says what, where and how to mend it, and nothing lost."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, ViTConfig

from datamodules.text import TextData
from modules.base import AdaptedModule
from modules.summarization import Summarizer
from modules.text_classification import TextClassifier
from tests.app.test_bad_input import Malicious, refused
from tests.backbones import save_backbone, save_classifier, word_tokenizer
from tests.conftest import write_pairs, write_sentences
from tests.support.disks import no_room_for

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

Rows = list[dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def write_rows(folder: Path, split: str, rows: Rows) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def labelled(labels: list[Any]) -> Rows:
    return [{"sentence": f"w{i} good", "label": label} for i, label in enumerate(labels)]


def pairs(size: int) -> Rows:
    return [{"document": f"w{i} good", "summary": "the film was good ."} for i in range(size)]


def refused_without_a_run(cli: CommandLine, capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    refused(capsys, code, *parts)
    assert not cli.run().exists()


# ----------------------------------------------------------------------------------------------------------- options

# refused once the configuration is kept: the metrics with the data's classes, the batch with its loader, the monitored
# name with the first validation
LATE = ("--model.metrics", "--data.batch_size=51", "--checkpoint.monitor")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--model.bakbone=x", ["TextClassifier", "bakbone", "did you mean backbone"]),
        ("--model.adapter.rnk=3", ["adapter.rnk", "did you mean adapter.rank"]),
        ("--data.max_lenght=3", ["TextClassificationData", "max_lenght", "did you mean max_length"]),
        ("--model.generation.num_beams=3", ["TextClassifier", "generation"]),
        ("--data.task=imdb", ["data", "task", "'cola'", "'wnli'"]),
        ("--data.text_columns=[a, b, c]", ["data.text_columns", "one or two", "data.task"]),
        ("--data.task=null", ["data.text_columns", "one or two", "data.task"]),
        (
            "--data.text_columns=[text]",
            ["data.text_columns", "no column text", "train.parquet", "sentence, label, idx"],
        ),
        (
            "--data.label_column=lable",
            ["data.label_column", "no column lable", "train.parquet", "sentence, label, idx"],
        ),
        ("--data.text_columns=[sentence,sentence]", ["data.text_columns", "sentence is named twice"]),
        ("--data.text_columns=[label]", ["data.label_column", "label is one of data.text_columns"]),
        ("--data.encoding=utf-9", ["data.encoding", "utf-9", "cp1252"]),
        ("--data.skip_bad_rows=-1", ["data.skip_bad_rows", "0 or more"]),
        ("--data.task=rte", ["data.text_columns", "no column sentence1", "train.parquet", "sentence, label, idx"]),
        ("--data.max_length=1", ["data.max_length", "2 or more"]),
        ("--data.max_length=65", ["data.max_length", "65", "64", "positions"]),
        ("--data.padding=shortest", ["data", "padding", "'longest', 'max_length'", "shortest"]),
        ("--data.batch_size=0", ["data.batch_size", "1 or more"]),
        ("--data.batch_size=51", ["data.batch_size", "50", "51", "smaller"]),
        ("--data.val_fraction=0", ["data.val_fraction", "(0, 1)"]),
        ("--data.max_val_samples=0", ["data.max_val_samples", "1 or more"]),
        ("--data.path=/nowhere/at/all", ["data.path", "/nowhere/at/all", "directory"]),
        (
            "--data.path=some/hub-name",
            ["data.path", "some/hub-name", "--data.path DIRECTORY", "--model.backbone DIREC"],
        ),
        ("--model.backbone=some/hub-name", ["model.backbone", "some/hub-name", "local directory"]),
        ("--model.backbone=/nowhere/at/all", ["model.backbone", "/nowhere/at/all", "local directory"]),
        ("--model.backbone=tests", ["model.backbone", "tests", "config.json"]),
        ("--model.weights=nothing.safetensors", ["model.weights", "nothing.safetensors", "`pretrained`", "`none`"]),
        ("--model.backbone_args={hiden_dropout: 0.1}", ["model.backbone_args", "hiden_dropout", "hidden_dropout_prob"]),
        ("--model.backbone_args={hidden_dropout_prob: much}", ["model.backbone_args", "hidden_dropout_prob", "much"]),
        ("--model.metrics=[pearson]", ["model.metrics", "pearson", "2 classes", "accuracy, f1, matthews"]),
        ("--model.metrics=[]", ["model.metrics", "[]", "accuracy, f1, matthews"]),
        ("--model.class_names=[only]", ["model.class_names", "only", "two or more"]),
        ("--model.class_names=[bad, good]", ["train.parquet", "unacceptable", "acceptable", "bad, good"]),
        ("--model.class_names=[yes, no]", ["class_names", "str", "True"]),  # YAML's booleans
        ("--model.class_names=[]", ["data.label_column", "regression", "train.parquet", "unacceptable, acceptable"]),
        ("--model.tuning=everything", ["model", "tuning", "'adapter', 'head', 'full'", "everything"]),
        ("--model.adapter.rank=33", ["adapter.rank", "33", "query", "32 × 32"]),
        ("--model.adapter.targets=[quary]", ["adapter.targets", "quary", "query", "mlp_in"]),
        ("--model.adapter.targets=[mlp_gate]", ["mlp_gate", "attention.self.query (query)", "(mlp_out)"]),
        ("--model.adapter.targets=regex:decoder.*", ["regex:decoder.*", "attention.self.query (query)"]),
        ("--checkpoint.monitor=val/acc1", ["val/acc1", "val/score", "val/matthews"]),
        ("--test_after_fit=true", ["data.label_column", "test.parquet", "-1", "hidden"]),
    ],
)
def test_wrong_value_for_classification(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], option: str, parts: list[str]
) -> None:
    refused(capsys, text_cli("fit", option), *parts)
    assert text_cli.run().exists() is option.startswith(LATE)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--model.bakbone=x", ["Summarizer", "bakbone", "did you mean backbone"]),
        ("--model.generation.num_bems=3", ["generation.num_bems", "did you mean generation.num_beams"]),
        ("--data.max_source_lenght=3", ["SummarizationData", "did you mean max_source_length"]),
        ("--data.task=cola", ["SummarizationData", "task"]),
        ("--model.tuning=head", ["model", "tuning", "'adapter', 'full'", "head"]),
        ("--model.label_smoothing=1", ["model.label_smoothing", "[0, 1)"]),
        ("--model.generation.num_beams=0", ["model.generation.num_beams", "0", "1 or more"]),
        ("--model.generation.num_beams=many", ["model", "generation.num_beams", "int", "many"]),
        ("--model.generation.min_length=13", ["model.generation", "min_length 13", "max_length 12"]),
        ("--model.generation.max_length=1", ["model.generation", "max_length 1", "2 or more"]),
        ("--model.generation.max_length=65", ["model.generation.max_length", "65", "64", "positions"]),
        ("--model.generation.no_repeat_ngram_size=-1", ["model.generation.no_repeat_ngram_size", "-1"]),
        ("--data.max_source_length=65", ["data.max_source_length", "65", "64", "positions"]),
        ("--data.max_target_length=65", ["data.max_target_length", "65", "64", "positions"]),
        ("--data.max_source_length=1", ["data.max_source_length", "2 or more"]),
        ("--data.source_column=article", ["data.source_column", "train.jsonl", "article", "document, summary, id"]),
        ("--data.target_column=text", ["data.target_column", "train.jsonl", "text", "document, summary, id"]),
        ("--data.batch_size=51", ["data.batch_size", "50", "51", "smaller"]),
        (
            "--data.path=some/hub-name",
            ["data.path", "some/hub-name", "--data.path DIRECTORY", "--model.backbone DIREC"],
        ),
        ("--model.backbone=some/hub-name", ["model.backbone", "some/hub-name", "local directory"]),
        ("--model.backbone_args={dropuot: 0.1}", ["model.backbone_args", "dropuot", "dropout"]),
        ("--model.adapter.targets=[quary]", ["adapter.targets", "quary", "query"]),
        ("--model.adapter.targets=[mlp_gate]", ["mlp_gate", "encoder_attn.q_proj (query)", "fc1 (mlp_in)"]),
        ("--checkpoint.monitor=val/score", ["val/score", "val/rougeL"]),
    ],
)
def test_wrong_value_for_summarization(
    summary_cli: CommandLine, capsys: pytest.CaptureFixture[str], option: str, parts: list[str]
) -> None:
    refused(capsys, summary_cli("fit", option), *parts)
    assert summary_cli.run().exists() is option.startswith(LATE)


@pytest.mark.parametrize("option", ["generation.num_beam=3", "generation.length=2", "adapter.ran=2"])
def test_a_key_that_is_cut_short_is_not_guessed(
    summary_cli: CommandLine, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    code = summary_cli("fit", f"--model.{option}", "--trainer.fast_dev_run=true")
    refused(capsys, code, option.partition("=")[0], "did you mean")


def test_the_model_is_checked_before_any_data_is_read(
    language_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(TextData, "setup", read)
    refused(capsys, language_cli("fit", "--model.adapter.targets=[mlp_gate]"), "mlp_gate")


# -------------------------------------------------------------------------------------------------------------- data

OWN = ["--data.task=null", "--data.text_columns=[sentence]"]


def unseen_class(folder: Path) -> list[str]:
    write_rows(folder, "train", labelled(["good", "bad"] * 10))
    write_rows(folder, "validation", labelled(["good", "ugly"]))
    return ["data.", "validation.jsonl", "ugly", "bad, good"]


def unseen_number(folder: Path) -> list[str]:
    write_rows(folder, "train", labelled([0, 1] * 10))
    write_rows(folder, "validation", labelled([0, 2]))
    return ["data.", "validation.jsonl", "not trained on (2)", "0, 1"]


def empty_label(folder: Path) -> list[str]:
    write_rows(folder, "train", labelled([0, 1] * 10 + [None]))
    return ["data.label_column", "train.jsonl", "row 20 of", "label that is empty", "data.skip_bad_rows"]


def regression_for_validation_alone(folder: Path) -> list[str]:
    write_rows(folder, "train", labelled([0, 1] * 10))
    write_rows(folder, "validation", labelled([0.5, 1.5]))
    return ["data.label_column", "validation.jsonl", "regression", "classification into 0, 1"]


def infinite_target(folder: Path) -> list[str]:
    lines = [f"w{i},{i / 2}\n" for i in range(20)]
    lines[7] = "w7,inf\n"
    (folder / "train.csv").write_text("sentence,label\n" + "".join(lines))
    return ["data.label_column", "train.csv", "row 7 of", "label that is inf"]


def nan_target(folder: Path) -> list[str]:
    scores = [i / 2 for i in range(20)]
    scores[7] = float("nan")
    rows = {"sentence": [f"w{i}" for i in range(20)], "label": scores}
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "train.parquet"))
    return ["data.label_column", "train.parquet", "row 7 of", "label that is nan"]


def lists_as_text(folder: Path) -> list[str]:
    write_rows(folder, "train", [{"sentence": ["w1", "w2"], "label": i % 2} for i in range(20)])
    return ["data.text_columns", "sentence", "train.jsonl", "must hold text"]


def empty_cell(folder: Path) -> list[str]:
    (folder / "train.csv").write_text("sentence,label\n" + "w1,0\nw2,1\n" * 8 + ",1\n")
    return ["data.text_columns", "row 16 of", "train.csv", "no text in column sentence", "data.skip_bad_rows"]


def empty_cell_in_validation(folder: Path) -> list[str]:
    write_rows(folder, "train", labelled([0, 1] * 10))
    write_rows(folder, "validation", [{"sentence": "w1", "label": 0}, {"sentence": None, "label": 1}])
    return ["data.text_columns", "row 1 of", "validation.jsonl", "no text in column sentence"]


def no_rows(folder: Path) -> list[str]:
    (folder / "train.csv").write_text("sentence,label\n")
    return ["data.path", "train.csv", "no rows"]


def no_rows_in_parquet(folder: Path) -> list[str]:
    write_sentences(folder, {"train": 0})
    return ["data.path", "train.parquet", "no rows"]


def no_rows_in_validation(folder: Path) -> list[str]:
    write_sentences(folder, {"train": 20, "validation": 0})
    return ["data.path", "validation.parquet", "no rows"]


def empty_file(folder: Path) -> list[str]:
    (folder / "train.jsonl").touch()
    return ["data.path", "train.jsonl", "empty file"]


def truncated_parquet(folder: Path) -> list[str]:
    write_sentences(folder, {"train": 20})
    file = folder / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return ["data.path", "train.parquet", "cannot be read", "damaged"]


def truncated_jsonl(folder: Path) -> list[str]:
    write_rows(folder, "train", labelled([0, 1] * 10))
    file = folder / "train.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    return ["data.path", "train.jsonl", "cannot be read", "damaged"]


def no_training_file(folder: Path) -> list[str]:
    write_sentences(folder, {"validation": 20})
    return ["data.path", str(folder), "train.parquet", "train.csv", "train.jsonl"]


@pytest.mark.parametrize(
    "damage",
    [
        unseen_class,
        unseen_number,
        empty_label,
        regression_for_validation_alone,
        infinite_target,
        nan_target,
        lists_as_text,
        empty_cell,
        empty_cell_in_validation,
        no_rows,
        no_rows_in_parquet,
        no_rows_in_validation,
        empty_file,
        truncated_parquet,
        truncated_jsonl,
        no_training_file,
    ],
)
def test_damaged_data_for_classification(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, damage: Callable[[Path], list[str]]
) -> None:
    parts = damage(folder)
    refused_without_a_run(text_cli, capsys, text_cli("fit", f"--data.path={folder}", *OWN), *parts)


def empty_document(folder: Path) -> list[str]:
    write_rows(folder, "train", [*pairs(20), {"document": None, "summary": "w1"}])
    return ["data.source_column", "row 20 of", "train.jsonl", "no text in column document"]


def empty_summary(folder: Path) -> list[str]:
    (folder / "train.csv").write_text("document,summary\n" + "w1,w2\n" * 16 + "w3,\n")
    return ["data.target_column", "row 16 of", "train.csv", "no text in column summary"]


def no_pairs(folder: Path) -> list[str]:
    (folder / "train.csv").write_text("document,summary\n")
    return ["data.path", "train.csv", "no rows"]


def truncated_pairs(folder: Path) -> list[str]:
    datasets.Dataset.from_list(pairs(20)).to_parquet(str(folder / "train.parquet"))
    file = folder / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return ["data.path", "train.parquet", "cannot be read", "damaged"]


def no_training_pairs(folder: Path) -> list[str]:
    write_pairs(folder, {"validation": 10})
    return ["data.path", str(folder), "train.parquet", "train.csv", "train.jsonl"]


@pytest.mark.parametrize(
    "damage",
    [
        empty_document,
        empty_summary,
        no_pairs,
        empty_file,
        truncated_pairs,
        no_training_pairs,
    ],
)
def test_damaged_data_for_summarization(
    summary_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, damage: Callable[[Path], list[str]]
) -> None:
    parts = damage(folder)
    refused_without_a_run(summary_cli, capsys, summary_cli("fit", f"--data.path={folder}"), *parts)


def test_a_single_class_leaves_nothing_to_tell_apart(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    write_rows(folder, "train", labelled(["good"] * 20))
    refused(capsys, text_cli("fit", f"--data.path={folder}", *OWN), "class_names", "good", "two or more")


def test_a_missing_test_split_is_told_before_training(
    language_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (write_sentences if language_cli.config == "text" else write_pairs)(folder, {"train": 30, "validation": 10})
    code = language_cli("fit", f"--data.path={folder}", "--test_after_fit=true")
    refused_without_a_run(language_cli, capsys, code, "data.path", str(folder), "no test split", "test_after_fit")


def test_testing_on_a_validation_split_that_is_missing(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    write_sentences(folder, {"train": 30})
    options = [f"--data.path={folder}", "--data.test_on_validation=true", "--test_after_fit=true"]
    refused_without_a_run(text_cli, capsys, text_cli("fit", *options), "data.path", str(folder), "no validation split")


def test_predict_needs_rows(language_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (write_sentences if language_cli.config == "text" else write_pairs)(folder, {"train": 12})
    assert language_cli("fit", f"--data.path={folder}", "--trainer.max_epochs=1") == 0
    capsys.readouterr()
    ask = ["predict", "--ckpt_path=last", f"--data.path={folder}"]
    refused(capsys, language_cli(*ask), "data.predict_path", str(folder), "no test split", "name a file")
    for name in ("nothing.csv", "rows.txt"):
        (folder / "rows.txt").write_text("w1")
        refused(capsys, language_cli(*ask, f"--data.predict_path={folder / name}"), "data.predict_path", name, ".jsonl")
    (folder / "rows.csv").write_text("words\nw1\n")
    refused(capsys, language_cli(*ask, f"--data.predict_path={folder / 'rows.csv'}"), "rows.csv", "no column", "words")
    (folder / "hole.csv").write_text("sentence,document\n,\n,\n")
    refused(capsys, language_cli(*ask, f"--data.predict_path={folder / 'hole.csv'}"), "hole.csv", "empty in every row")


def test_hidden_labels_cannot_be_tested_on(fitted_text_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys, fitted_text_cli("test", "--ckpt_path=last"), "data.label_column", "test.parquet", "hidden", "predict"
    )


# ---------------------------------------------------------------------------------------------------------- backbone


def truncated_weights(path: Path, trace: Path) -> list[str]:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    return ["model.weights", str(path), "could not be loaded", "model.safetensors"]


def broken_config(path: Path, trace: Path) -> list[str]:
    (path / "config.json").write_text('{"model_type": "roberta", ')
    return ["model.backbone", str(path), "damaged", "hub's layout"]


def config_of_no_kind(path: Path, trace: Path) -> list[str]:
    (path / "config.json").write_text("{}")
    return ["model.backbone", str(path), "model_type"]


def missing_weights(path: Path, trace: Path) -> list[str]:
    (path / "model.safetensors").unlink()
    return ["model.weights", str(path), "model.safetensors"]


def missing_config(path: Path, trace: Path) -> list[str]:
    (path / "config.json").unlink()
    return ["model.backbone", str(path), "config.json"]


def pickled_code(path: Path, trace: Path) -> list[str]:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(trace)))
    return ["model.weights", str(path), "could not be loaded"]


def pickled_code_in_a_zip(path: Path, trace: Path) -> list[str]:
    (path / "model.safetensors").unlink()
    torch.save({"embeddings": Malicious(trace)}, path / "pytorch_model.bin")
    return ["model.weights", str(path), "could not be loaded"]


def code_of_the_repository(path: Path, trace: Path) -> list[str]:
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Config: ...\n")
    return ["model.backbone", str(path)]


def tokenizer_without_padding(path: Path, trace: Path) -> list[str]:
    word_tokenizer(pad_token=None).save_pretrained(path)
    return ["model.backbone", str(path), "no padding token", "tokenizer_config.json"]


def no_tokenizer(path: Path, trace: Path) -> list[str]:
    for file in path.glob("tokenizer*"):
        file.unlink()
    return ["model.backbone", str(path), "tokenizer", "beside config.json"]


def broken_tokenizer(path: Path, trace: Path) -> list[str]:
    (path / "tokenizer.json").write_text('{"version": ')
    return ["model.backbone", str(path), "tokenizer"]


def tokenizer_of_a_larger_model(path: Path, trace: Path) -> list[str]:
    tokenizer: PreTrainedTokenizerFast = word_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(5)])
    tokenizer.save_pretrained(path)
    return ["model.backbone", str(path), "59 tokens", "54 embeddings"]


def peft_adapter(path: Path, trace: Path) -> list[str]:
    (path / "adapter_config.json").write_text("{}")
    return ["model.backbone", str(path), "PEFT"]


@pytest.mark.parametrize(
    "damage",
    [
        truncated_weights,
        broken_config,
        config_of_no_kind,
        missing_weights,
        missing_config,
        pickled_code,
        pickled_code_in_a_zip,
        code_of_the_repository,
        tokenizer_without_padding,
        no_tokenizer,
        broken_tokenizer,
        tokenizer_of_a_larger_model,
        peft_adapter,
    ],
)
def test_damaged_backbone(
    language_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    damage: Callable[[Path, Path], list[str]],
) -> None:
    trace, path = tmp_path / "code-ran", tmp_path / "backbone"
    shutil.copytree(language_cli.backbone[1], path)
    parts = damage(path, trace)
    refused_without_a_run(language_cli, capsys, language_cli("fit", f"--model.backbone={path}"), *parts)
    assert not trace.exists()


def test_backbone_of_another_kind(
    language_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, roberta_path: Path
) -> None:
    ViTConfig().save_pretrained(tmp_path / "vit")
    word_tokenizer().save_pretrained(tmp_path / "vit")
    paths = {"vit": tmp_path / "vit"} | ({"roberta": roberta_path} if language_cli.config == "summary" else {})
    for kind, path in paths.items():
        code = language_cli("fit", f"--model.backbone={path}")
        refused_without_a_run(language_cli, capsys, code, "model.backbone", str(path), kind, "Choose another")


def test_weights_of_another_shape(
    language_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kind, width = ("roberta", "hidden_size") if language_cli.config == "text" else ("bart", "d_model")
    other = save_backbone(tmp_path / "other", kind, **{width: 64})
    code = language_cli("fit", f"--model.weights={other / 'model.safetensors'}")
    refused_without_a_run(language_cli, capsys, code, "model.weights", "does not fit", "of another shape")


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_of_another_model(
    fitted_language_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = save_backbone(tmp_path / "other", "roberta" if fitted_language_cli.config == "text" else "bart", seed=1)
    before = (fitted_language_cli.run() / "checkpoints" / "last.ckpt").read_bytes()
    for command, option, *parts in (
        ("fit", "adapter.rank=2", "of another shape", "is (4, 32), not (2, 32)", "config.yaml"),
        ("validate", "adapter.rank=2", "of another shape", "is (4, 32), not (2, 32)", "config.yaml"),
        ("fit", "adapter.targets=[query, value, key]", "missing", "adapters.key.A", "config.yaml"),
        ("validate", "adapter.targets=[query]", "unexpected", "adapters.value.B", "config.yaml"),
        ("validate", f"backbone={other}", "other frozen weights", "model.backbone"),
        ("predict", "backbone_dtype=bfloat16", "other frozen weights", "model.backbone_dtype"),
    ):
        refused(capsys, fitted_language_cli(command, "--ckpt_path=last", f"--model.{option}"), *parts)
    assert (fitted_language_cli.run() / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not fitted_language_cli.run(1).exists()


def test_checkpoint_of_another_tuning(fitted_language_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, fitted_language_cli("validate", "--ckpt_path=last", "--model.tuning=full"), "tuning")
    if fitted_language_cli.config == "text":
        code = fitted_language_cli("validate", "--ckpt_path=last", "--model.tuning=head")
        refused(capsys, code, "model.tuning", "with tuning adapter", "has tuning head")


def test_checkpoint_for_another_task(
    fitted_text_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rte = tmp_path / "rte"
    rte.mkdir()
    for split in ("train", "validation"):
        write_rows(rte, split, [{"sentence1": f"w{i}", "sentence2": "good", "label": i % 2} for i in range(12)])
    for command in ("fit", "validate"):
        code = fitted_text_cli(command, "--ckpt_path=last", "--data.task=rte", f"--data.path={rte}")
        refused(capsys, code, ".jsonl", "not trained on (entailment, not_entailment)", "unacceptable, acceptable")


def write_scores(folder: Path) -> Path:
    for split in ("train", "validation"):
        write_rows(folder, split, [{"sentence": f"w{i}", "label": i / 2} for i in range(12)])
    return folder


def test_scores_for_a_checkpoint_of_classes(
    fitted_text_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    part = "the model is for classification into unacceptable, acceptable"
    for command in ("fit", "validate"):
        code = fitted_text_cli(command, "--ckpt_path=last", f"--data.path={write_scores(folder)}", *OWN)
        refused(capsys, code, "data.label_column", part, ".jsonl", "regression")


def test_classes_for_a_checkpoint_of_scores(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, cola_path: Path
) -> None:
    assert text_cli("fit", f"--data.path={write_scores(folder)}", *OWN, "--trainer.max_epochs=1") == 0
    capsys.readouterr()
    part = "classification into unacceptable, acceptable"
    for command in ("fit", "validate"):
        code = text_cli(command, "--ckpt_path=last", f"--data.path={cola_path}")
        refused(capsys, code, "data.label_column", "the model is for regression", ".parquet", part)


def test_head_of_a_classifier_does_not_hide_a_wrong_label(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    classifier = save_classifier(tmp_path / "classifier", "roberta", ["unacceptable", "acceptable"])
    write_rows(folder, "train", labelled(["acceptable", "doubtful"] * 10))
    code = text_cli("fit", f"--data.path={folder}", f"--model.backbone={classifier}")
    refused_without_a_run(text_cli, capsys, code, "data.label_column", "train.jsonl", "doubtful", "acceptable")


def test_checkpoint_of_another_family(
    fitted_cli: CommandLine, language_cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    last = fitted_cli.run() / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    capsys.readouterr()
    for command in ("fit", "test"):
        refused(capsys, language_cli(command, f"--ckpt_path={last}"), "ckpt_path", "ImageClassifier", "config.yaml")
    assert last.read_bytes() == before


# -------------------------------------------------------------------------------------------------------- in the run


def test_loss_that_is_not_finite(
    language_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = TextClassifier if language_cli.config == "text" else Summarizer
    original = module.forward

    def forward(self: AdaptedModule, batch: dict[str, Any]) -> Tensor:
        return original(self, batch) * (float("nan") if self.training and self.global_step == 7 else 1.0)

    monkeypatch.setattr(module, "forward", forward)
    code = language_cli("fit", "--trainer.max_epochs=1", "--checkpoint.last_every_n_steps=2")
    refused(capsys, code, "nan at step 7", "--ckpt_path last", "learning_rate")
    kept = language_cli.checkpoint()
    assert kept["global_step"] == 7
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())
    monkeypatch.setattr(module, "forward", original)
    assert language_cli("fit", "--trainer.max_epochs=1", "--ckpt_path=last") == 0
    assert language_cli.checkpoint()["global_step"] == 8


def test_full_disk(text_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    with no_room_for(".last.ckpt.", after=4):  # twice each: steps 2 and 4
        code = text_cli("fit", "--trainer.max_epochs=1", "--checkpoint.last_every_n_steps=2")
    refused(capsys, code, "last.ckpt", "could not be written", "No space left on device", "--ckpt_path last")
    assert {p.name for p in (text_cli.run() / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert text_cli.checkpoint()["global_step"] == 4


def test_cache_that_cannot_be_written(
    language_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"  # below a file nothing can be made, not even by root
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    refused_without_a_run(language_cli, capsys, language_cli("fit"), str(cache), "HF_DATASETS_CACHE")
