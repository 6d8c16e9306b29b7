"""Text classification and summarization through the real command line: the frame holds for them as for images."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from tests.conftest import ROOT, write_sentences

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine


@pytest.mark.parametrize("train", ["B", "A", "both"])
def test_only_what_is_trained_changes(
    language_cli: CommandLine, recorded: dict[str, dict[str, Tensor]], train: str
) -> None:
    inits = {"A": ("zero", "orthogonal"), "B": ("orthogonal", "zero"), "both": ("kaiming", "zero")}[train]
    options = [f"--model.adapter.init_{factor}={init}" for factor, init in zip("ab", inits, strict=True)]
    options.append(f"--model.adapter.train={train}")
    assert language_cli("fit", *options) == 0
    factors = tuple(f".{f}" for f in "AB" if train in (f, "both"))
    before, after = recorded["on_fit_start"], recorded["on_fit_end"]
    for name, tensor in before.items():
        trained = name.endswith(factors) or ".classifier." in name
        assert torch.equal(tensor, after[name]) is not trained, name


def test_a_checkpoint_holds_no_frozen_backbone(fitted_language_cli: CommandLine) -> None:
    names = set(fitted_language_cli.checkpoint()["state_dict"])
    heads = {n for n in names if n.startswith("backbone.classifier.")}
    assert all(".adapters." in n for n in names - heads)
    assert len(heads) == (4 if fitted_language_cli.config == "text" else 0)


FULL = ("--model.tuning=full", "--model.learning_rate=0.003")  # these backbones were never pretrained


def test_classification_learns(text_cli: CommandLine, tmp_path: Path) -> None:
    data = write_sentences(tmp_path / "more", {"train": 150, "validation": 30})
    assert text_cli("fit", *FULL, f"--data.path={data}", "--trainer.max_epochs=6") == 0
    metrics = text_cli.metrics()
    assert metrics["val/matthews"] == metrics["val/score"] > 0.9


def test_summarization_learns_and_rouge_is_that_of_rouge_score(summary_cli: CommandLine, pairs_path: Path) -> None:
    options = ["--trainer.max_epochs=12", "--model.label_smoothing=0", "--test_after_fit=true"]
    assert summary_cli("fit", *FULL, *options, "--trainer.check_val_every_n_epoch=6") == 0
    assert summary_cli.metrics()["test/rougeL"] > 0.85  # untrained it is near 0
    assert summary_cli("predict", "--ckpt_path", str(summary_cli.run())) == 0
    with (summary_cli.run() / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    given = [json.loads(line) for line in (pairs_path / "test.jsonl").read_text().splitlines()]
    assert [(r["id"], r["reference"]) for r in rows] == [(g["id"], g["summary"]) for g in given]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(r["reference"], r["summary"]) for r in rows]
    for kind in ("rouge1", "rouge2", "rougeL"):
        mean = sum(s[kind].fmeasure for s in scores) / len(scores)
        assert summary_cli.metrics()[f"test/{kind}"] == pytest.approx(mean, abs=1e-6)


def test_blocks_that_are_left_out_at_random_are_no_mistake(summary_cli: CommandLine) -> None:
    options = ["--model.backbone_args.encoder_layerdrop=0.95", "--trainer.max_steps=1"]  # the first step has neither
    assert summary_cli("fit", *options) == 0
    assert summary_cli.checkpoint()["global_step"] == 1


def test_generated_texts_are_in_tensorboard(fitted_summary_cli: CommandLine) -> None:
    events = fitted_summary_cli.events()
    assert "val/samples/text_summary" in events.Tags()["tensors"]
    text = events.Tensors("val/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.count("**Generated**") == 4
    assert "**Reference** the film was" in text


def test_spectra_are_logged(fitted_language_cli: CommandLine) -> None:
    assert fitted_language_cli.scalars("spectrum/query/B/largest")[0] == 0.0
    scalars = (fitted_language_cli.scalars(f"spectrum/query/{factor}/largest") for factor in ("B", "BA"))
    assert next(scalars) == pytest.approx(next(scalars), rel=1e-5)  # orthonormal rows in the frozen A: σ(BA) = σ(B)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precisions_train(language_cli: CommandLine, precision: str, dtype: str) -> None:
    options = [f"--trainer.precision={precision}", f"--model.backbone_dtype={dtype}", "--trainer.max_epochs=1"]
    assert language_cli("fit", *options) == 0
    assert {tensor.dtype for tensor in language_cli.checkpoint()["state_dict"].values()} == {torch.float32}


def test_a_checkpoint_evaluates_to_what_fit_said(summary_cli: CommandLine) -> None:
    assert summary_cli("fit", "--test_after_fit=true", "--trainer.max_epochs=1") == 0
    before = summary_cli.metrics()
    for command in ("validate", "test"):
        assert summary_cli(command, "--ckpt_path", str(summary_cli.run())) == 0
        assert summary_cli.metrics() == before


def test_one_key_switches_task(text_cli: CommandLine, tmp_path: Path, cola_path: Path) -> None:
    glue = tmp_path / "glue"
    for task in ("cola", "sst2"):
        write_sentences(glue / task, {"train": 30, "validation": 10})
    assert text_cli("fit", f"--data.path={glue}", "--data.task=cola", "--trainer.max_epochs=1") == 0
    assert text_cli("fit", f"--data.path={glue}", "--data.task=sst2", "--trainer.max_epochs=1") == 0
    assert "val/matthews" in text_cli.metrics(0)
    assert "val/accuracy" in text_cli.metrics(1)


def test_mnli_has_two_validation_sets(text_cli: CommandLine, tmp_path: Path) -> None:
    rows = [
        {"premise": f"w{i} w1", "hypothesis": "good" if i % 2 else "bad", "label": i % 3, "idx": i} for i in range(30)
    ]
    folder = tmp_path / "mnli"
    folder.mkdir()
    for name in ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"):
        lines = [row | ({"label": -1} if name.startswith("test") else {}) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    options = ["--data.task=mnli", f"--data.path={folder}", "--data.prediction_format=tsv"]
    assert text_cli("fit", *options, "--trainer.max_epochs=1") == 0
    m = text_cli.metrics()
    assert m["val/score"] == pytest.approx((m["val/accuracy_matched"] + m["val/accuracy_mismatched"]) / 2)
    assert text_cli("predict", *options, "--ckpt_path=last") == 0
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        with (text_cli.run() / name).open() as file:
            table = list(csv.DictReader(file, delimiter="\t"))
        assert [r["index"] for r in table] == [str(i) for i in range(30)]
        assert {r["prediction"] for r in table} <= {"entailment", "neutral", "contradiction"}


def test_regression_on_any_csv(text_cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    folder.mkdir()
    for split, size in (("train", 40), ("validation", 12)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["left", "right", "score"])
            writer.writerows([f"w{i}", "good" if i % 2 else "bad", 4.5 if i % 2 else 0.5] for i in range(size))
    options = [f"--data.path={folder}", "--data.task=null", "--data.text_columns=[left, right]"]
    options += ["--data.label_column=score"]
    assert text_cli("fit", *options, *FULL, "--trainer.max_epochs=12") == 0
    metrics = text_cli.metrics()
    assert metrics["val/pearson"] > 0.9
    assert metrics["val/score"] == pytest.approx((metrics["val/pearson"] + metrics["val/spearman"]) / 2)
    answers = ["--data.prediction_format=jsonl", f"--data.predict_path={folder / 'validation.csv'}"]
    assert text_cli("predict", *options, *answers, "--ckpt_path=last") == 0
    rows = [json.loads(line) for line in (text_cli.run() / "predictions.jsonl").read_text().splitlines()]
    assert [r["left"] for r in rows] == [f"w{i}" for i in range(12)]
    assert all(isinstance(r["prediction"], float) for r in rows)


def test_submission_of_cola(fitted_text_cli: CommandLine) -> None:
    assert fitted_text_cli("predict", "--ckpt_path=last", "--data.prediction_format=tsv") == 0
    lines = (fitted_text_cli.run() / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(100, 109)]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


@pytest.mark.slow
def test_a_hub_name_and_a_directory_are_the_same_model(
    text_cli: CommandLine, roberta_path: Path, tmp_path: Path
) -> None:
    """The hub's cache, as it is after a download, against a directory in the hub's layout."""
    repository = tmp_path / "hub" / "models--someone--tiny-roberta"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(roberta_path)
    words = text_cli.words("fit", "--model.backbone=someone/tiny-roberta")
    # in a process of its own, since the place of the cache is read once
    script = "import sys\nfrom app.cli import main\nassert main(sys.argv[1:]) == 0\nassert 'timm' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert text_cli("fit") == 0
    one, other = text_cli.checkpoint(0), text_cli.checkpoint(1)
    assert one["frozen_digest"] == other["frozen_digest"]
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
