"""Regression through the command line, on labels in any units."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.app.conftest import CommandLine
from tests.support.refusals import refused

WORDS = ["bad", "good"]
MEAN, UNIT = 683.0, 241.0
# A schedule that does not depend on the number of epochs, so that a short fit is the beginning of a long one.
CONSTANT = ("--model.schedule=constant", "--model.warmup_ratio=0")


@pytest.fixture
def fit(text_cli: CommandLine, tmp_path: Path) -> Callable[..., list[str]]:
    """Fit the values of words, in a unit, and return the options of the data."""

    def run(*options: str, mean: float = 0.0, unit: float = 1.0) -> list[str]:
        data = tmp_path / f"data{mean:g}_{unit:g}"
        data.mkdir(exist_ok=True)
        for split, size in (("train", 40), ("validation", 15)):
            rows = [[f"w{i} {WORDS[i % 2]}", mean + unit * ((i % 2) - 0.25)] for i in range(size)]
            with (data / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["text", "score"], *rows])
        keys = [f"--data.path={data}", "--data.task=null", "--data.text_columns=[text]", "--data.label_column=score"]
        assert text_cli("fit", *keys, "--trainer.max_epochs=6", *options) == 0
        return keys

    return run


def predictions(cli: CommandLine, keys: list[str], version: int) -> np.ndarray[Any, Any]:
    path = Path(keys[0].partition("=")[2]) / "validation.csv"
    last = cli.run(version) / "checkpoints" / "last.ckpt"  # rounding may change which checkpoint is the best
    assert cli("predict", *keys, f"--data.predict_path={path}", f"--ckpt_path={last}") == 0
    with (cli.run(version) / "predictions.csv").open() as file:
        return np.array([float(row["prediction"]) for row in csv.DictReader(file)])


@pytest.mark.parametrize(("optimizer", "mean", "unit"), [("AdamW", MEAN, UNIT), ("Adafactor", 2e-7, 1e-7)])
def test_a_fit_does_not_depend_on_the_unit_of_the_labels(
    text_cli: CommandLine,
    fit: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
    mean: float,
    unit: float,
) -> None:
    options = ["--model.tuning=full", "--model.learning_rate=0.003", "--trainer.max_epochs=12"]
    options += ["--trainer.gradient_clip_val=0.5", f"--model.optimizer.class_path=torch.optim.{optimizer}"]
    if optimizer == "Adafactor":
        options += ["--model.learning_rate=0.2"]
    keys = [fit(*options), fit(*options, mean=mean, unit=unit)]
    line = f"labels: numbers, read as a regression; mean {mean + unit / 4:.4g}, standard deviation {unit / 2:.4g}"
    assert line in capsys.readouterr().err
    natural, scaled = (predictions(text_cli, k, version) for version, k in enumerate(keys))
    assert natural.std() > 0.3
    assert scaled == pytest.approx(mean + unit * natural, abs=0.01 * unit)
    first, second = text_cli.metrics(0), text_cli.metrics(1)
    assert second["val/mae"] == pytest.approx(unit * first["val/mae"], rel=1e-2)
    for name in ("val/loss", "val/pearson", "train/loss"):
        assert second[name] == pytest.approx(first[name], rel=1e-2)
    assert first["val/pearson"] > 0.9


def test_resume_start_and_export_keep_the_units(
    text_cli: CommandLine, fit: Callable[..., list[str]], tmp_path: Path, roberta_path: Path
) -> None:
    keys = fit(*CONSTANT, mean=MEAN, unit=UNIT)
    fit(*CONSTANT, "--trainer.max_epochs=3", mean=MEAN, unit=UNIT)
    assert text_cli("fit", *keys, "--trainer.max_epochs=6", f"--ckpt_path={text_cli.run(1)}") == 0
    whole, resumed = text_cli.checkpoint(0), text_cli.checkpoint(1)
    mean, deviation = whole["hyper_parameters"]["label_scaling"]
    assert (mean, deviation) == (pytest.approx(MEAN + 0.25 * UNIT), pytest.approx(UNIT / 2))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    expected = predictions(text_cli, keys, 0)

    adapter = text_cli.run(0) / "adapter"
    fit(f"--model.adapter_path={adapter}", "--model.learning_rate=1e-12", mean=MEAN, unit=UNIT)
    assert predictions(text_cli, keys, 2) == pytest.approx(expected, rel=1e-5)

    tokenizer: Any = AutoTokenizer.from_pretrained(roberta_path)
    base = AutoModelForSequenceClassification.from_pretrained(roberta_path, num_labels=1)
    model = PeftModel.from_pretrained(base, adapter).eval()
    texts = [f"w{i} {WORDS[i % 2]}" for i in range(15)]
    with torch.no_grad():
        scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.squeeze(-1)
    assert scores.numpy() == pytest.approx(expected, rel=1e-4)


def test_weights_far_from_the_labels_are_a_warning(
    text_cli: CommandLine, fit: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--trainer.max_epochs=1", mean=MEAN, unit=UNIT)
    assert "hardly learned" not in capsys.readouterr().err
    fit("--trainer.max_epochs=1", f"--model.adapter_path={text_cli.run(0) / 'adapter'}", mean=5, unit=0.1)
    warning = capsys.readouterr().err
    assert "have the mean 5.025 and the standard deviation 0.05, and the output layer has the bias 742" in warning
    assert "use labels in the units that the head was trained on" in warning


def test_an_output_layer_without_bias_needs_labels_near_zero(
    llama_path: Path, text_cli: CommandLine, fit: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for mean in (MEAN, 2000.0):
        fit("--trainer.max_epochs=1", f"--model.backbone={llama_path}", mean=mean, unit=UNIT if mean == MEAN else 10)
        assert ("has no bias. Such labels are hardly learned" in capsys.readouterr().err) is (mean == 2000)


def test_runs_from_before_the_key_resume_on_the_labels_as_they_are(
    text_cli: CommandLine, fit: Callable[..., list[str]]
) -> None:
    keys = fit(*CONSTANT, "--model.label_scaling=[0, 1]")
    fit(*CONSTANT, "--model.label_scaling=[0, 1]", "--trainer.max_epochs=3")
    path = text_cli.run(1) / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["hyper_parameters"]["label_scaling"]
    torch.save(checkpoint, path)
    copy = path.read_bytes()
    assert text_cli("fit", *keys, "--trainer.max_epochs=6", f"--ckpt_path={path}") == 0
    for name, tensor in text_cli.checkpoint(0)["state_dict"].items():
        assert torch.equal(tensor, text_cli.checkpoint(1)["state_dict"][name]), name
    path.write_bytes(copy)
    options = ["--trainer.max_epochs=6", f"--ckpt_path={path}", "--model.label_scaling=[0.5, 2]"]
    assert text_cli("fit", *keys, *options) == 0
    assert text_cli.checkpoint(1)["hyper_parameters"]["label_scaling"] == [0.5, 2.0]


def test_labels_that_are_all_equal_are_refused(
    text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flats.csv").write_text("text,price\n" + "".join(f"w{i},700.0\n" for i in range(40)))
    keys = [f"--data.path={tmp_path / 'flats.csv'}", "--data.task=null", "--data.label_column=price"]
    refused(capsys, text_cli("fit", *keys), "data.label_column: all training labels are 700, so there is nothing to")


def test_small_numbers_keep_their_digits(text_cli: CommandLine, fit: Callable[..., list[str]]) -> None:
    keys = fit(mean=1.6e-4, unit=1e-5)
    scores = predictions(text_cli, keys, 0)
    assert len(set(scores)) > 10
    assert 1e-4 < min(scores) < max(scores) < 2.5e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.label_scaling=[1, -1]"], "model.label_scaling: [1.0, -1.0] must be two finite numbers"),
        (["--model.label_scaling=[1, 2]"], "model.label_scaling: a classification has no numbers to scale."),
    ],
)
def test_a_wrong_scaling_is_refused(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    refused(capsys, text_cli("fit", *options), message)
