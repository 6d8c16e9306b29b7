"""Runs of every family through the command line: trained weights, frozen weights and files of the run."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from tests.conftest import ROOT
from tests.support.rows import write_rows
from tests.support.small_data import CLASSES, colour_image, write_sentences

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

ONE_EPOCH = "--trainer.max_epochs=1"
A = ("--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal")
BOTH = ("--model.adapter.train=both", "--model.adapter.init_a=kaiming")
HALF = ("--trainer.precision=bf16-mixed", "--model.backbone_dtype=bfloat16")
HEAD = ("head.weight", "head.bias")
CLASSIFIER = tuple(f"classifier.{name}" for name in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"))
EVERYTHING = ("",)


@pytest.mark.parametrize(
    ("any_cli", "options", "trained"),
    [
        ("cli", ("--test_after_fit=true", *HALF), ("query.B", "value.B", *HEAD)),
        pytest.param("cli", ("--model.tuning=head",), HEAD, marks=pytest.mark.slow),
        ("text_cli", A, (".A", *CLASSIFIER)),
        ("summary_cli", (*BOTH, *HALF), (".A", ".B")),
        pytest.param(
            "instruction_cli",
            (*BOTH, *HALF, "--model.gradient_checkpointing=true", "--data.packing=true", "--data.batch_size=2"),
            (".A", ".B"),
            marks=pytest.mark.slow,
        ),
        ("instruction_cli", ("--model.tuning=full", "--data.template=alpaca", "--data.max_length=400"), EVERYTHING),
    ],
    indirect=["any_cli"],
)
def test_only_trained_weights_change(
    any_cli: CommandLine, recorded: dict[str, dict[str, Tensor]], options: tuple[str, ...], trained: tuple[str, ...]
) -> None:
    assert any_cli("fit", ONE_EPOCH, *options) == 0
    before, after = recorded["on_fit_start"], recorded["on_fit_end"]
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) is not name.endswith(trained), name
    saved = any_cli.checkpoint()["state_dict"]
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    frozen = {name for name in before if not name.endswith(trained) and ".adapters." not in name}
    tied = {"backbone.lm_head.weight"}  # tied to the embeddings and saved once
    assert saved.keys() - tied == before.keys() - frozen - tied


def test_a_run_learns_and_writes_the_files_and_metrics_of_the_contract(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli("fit", "--trainer.max_epochs=8", "--test_after_fit=true", "--model.adapter.targets=all") == 0
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == f"Run directory: {cli.run()}"
    assert "blocks.*.attn.qkv.query" in out
    metrics = cli.metrics()
    assert metrics["test/acc1"] > 0.9
    assert {"val/loss", "val/acc1", "train/loss", "time/fit_seconds", "memory/peak_bytes"} <= metrics.keys()
    # two blocks of rank 4: B of q, k, v, output and mlp_out has 32 rows, B of mlp_in 128; the head has 32·3 + 3
    assert metrics["params/trainable"] == 2 * 4 * (4 * 32 + 128 + 32) + 99
    assert metrics["adapter/bytes"] == 4 * 2 * 4 * ((4 * 32 + 128 + 32) + (4 * 32 + 32 + 128))
    rows = {name: cells for name, *cells in (re.split(r" *│ *", line.strip()) for line in out.splitlines()) if cells}
    shown = [name for name in rows if "/" in name]  # of the closing table
    scores = [f"test/{name}" for name in ("loss", "acc1", "ece", "macro_f1")]
    costs = ["params/trainable", "adapter/bytes", "time/fit_seconds", "memory/peak_bytes"]
    assert shown == ["best/val/acc1", *scores, *costs]
    for name in scores:
        assert rows[name][0] == f"{metrics[name]:.4f}"
        assert re.match(r"[+-]\d", rows[name][1])
        assert float(rows[name][1]) == pytest.approx(metrics[name.replace("test", "gap")], abs=6e-5)
    assert rows["params/trainable"][0] == f"{metrics['params/trainable']:,}"
    assert f"All figures: {cli.run() / 'metrics.json'}\n" in out
    config = yaml.safe_load((cli.run() / "config.yaml").read_text())
    assert config["model"]["init_args"]["adapter"]["rank"] == 4
    assert sorted(p.name for p in (cli.run() / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    # predictions need no labelled data: the checkpoint has the class names
    rng, folder = np.random.default_rng(7), tmp_path / "unknown"
    folder.mkdir()
    for i in range(9):
        Image.fromarray(colour_image(i % 3, rng)).save(folder / f"{i}.png")
    assert cli("predict", "--ckpt_path=last", f"--data.predict_path={folder}", "--data.path=/nowhere") == 0
    with (cli.run() / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == [f"{i}.png" for i in range(9)]
    assert sum(r["prediction"] == CLASSES[i % 3] for i, r in enumerate(rows)) >= 8
    assert all(1 / 3 <= float(r["probability"]) <= 1 for r in rows)


FULL = ("--model.tuning=full", "--model.learning_rate=0.003")  # the backbones of these tests have random weights


def test_summarization_learns_and_rouge_equals_rouge_score(summary_cli: CommandLine, pairs_path: Path) -> None:
    options = ["--trainer.max_epochs=12", "--model.label_smoothing=0", "--test_after_fit=true"]
    assert summary_cli("fit", *FULL, *options, "--trainer.check_val_every_n_epoch=6") == 0
    assert summary_cli.metrics()["test/rougeL"] > 0.85  # an untrained model is near 0
    assert summary_cli("predict", "--ckpt_path", str(summary_cli.run())) == 0
    with (summary_cli.run() / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    references = [json.loads(line) for line in (pairs_path / "test.jsonl").read_text().splitlines()]
    assert [(r["id"], r["reference"]) for r in rows] == [(g["id"], g["summary"]) for g in references]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(r["reference"], r["summary"]) for r in rows]
    for kind in ("rouge1", "rouge2", "rougeL"):
        mean = sum(s[kind].fmeasure for s in scores) / len(scores)
        assert summary_cli.metrics()[f"test/{kind}"] == pytest.approx(mean, abs=1e-6)


def test_two_fits_have_two_directories_and_equal_weights(fitted_cli: CommandLine) -> None:
    assert fitted_cli("fit", ONE_EPOCH) == 0
    # the same configuration gives the same weights
    first, second = fitted_cli.checkpoint(0)["state_dict"], fitted_cli.checkpoint(1)["state_dict"]
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("any_cli", "options"),
    [
        ("fitted_cli", ("--data.max_test_samples=12",)),
        pytest.param("fitted_summary_cli", (), marks=pytest.mark.slow),
    ],
    indirect=["any_cli"],
)
def test_a_checkpoint_evaluates_to_the_metrics_of_its_fit(any_cli: CommandLine, options: tuple[str, ...]) -> None:
    assert any_cli("fit", ONE_EPOCH, "--test_after_fit=true", *options) == 0
    before = any_cli.metrics(1)
    assert any_cli("validate", "--ckpt_path", str(any_cli.run(1) / "checkpoints" / "last.ckpt")) == 0
    assert any_cli.metrics(1) == before
    (any_cli.run(1) / "metrics.json").unlink()
    assert any_cli("test", "--ckpt_path", str(any_cli.run(1)), *options) == 0
    assert any_cli.metrics(1)["test/loss"] == before["test/loss"]
    assert not any_cli.run(2).exists()


# ------------------------------------------------------------------------------------------------------------ logging


@pytest.mark.drawn
def test_tensorboard_has_spectra_learning_rates_and_confusion_matrix(cli: CommandLine) -> None:
    assert cli("fit", "--test_after_fit=true") == 0
    tags = cli.events().Tags()
    for factor in ("B", "BA"):
        assert f"spectrum/query/{factor}/effective_rank" in tags["scalars"]
        assert f"spectrum/{factor}/effective_rank" in tags["scalars"]
        assert {f"spectrum_map/{factor}", f"spectrum_ratio/{factor}"} <= set(tags["images"])
    assert set(tags["histograms"]) == {"spectrum_roles/query/BA", "spectrum_roles/value/BA"}
    assert "test/confusion_matrix" in tags["images"]
    assert "lr-AdamW/B" in tags["scalars"]
    assert set(cli.scalars("spectrum/query/B/largest")) == {0, 8, 16}
    assert cli.scalars("spectrum/query/B/largest")[0] == 0.0
    # the frozen A has orthonormal rows, so that σ(BA) = σ(B)
    assert cli.scalars("spectrum/value/BA/largest") == pytest.approx(cli.scalars("spectrum/value/B/largest"), rel=1e-5)


def test_spectrum_file_equals_a_full_decomposition(fitted_cli: CommandLine) -> None:
    rows = pq.read_table(fitted_cli.run() / "spectrum.parquet").to_pylist()
    assert len(rows) == 2 * 4 * 3  # steps, projections, factors
    last = {(r["projection"], r["factor"]): r["singular_values"] for r in rows if r["step"] == 8}
    state = {k: v.double() for k, v in fitted_cli.checkpoint()["state_dict"].items()}
    for role in ("query", "value"):
        a, b = (state[f"backbone.blocks.1.attn.qkv.adapters.{role}.{f}"] for f in "AB")
        for factor, matrix in {"A": a, "B": b, "BA": b @ a}.items():
            dense = torch.linalg.svdvals(matrix)[:4].tolist()
            assert last[f"blocks.1.attn.qkv.{role}", factor] == pytest.approx(dense, rel=1e-4, abs=1e-6)


def test_another_logger(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("fit", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={cli.root}/csv") == 0
    file = next((cli.root / "csv").rglob("metrics.csv"))
    header = file.read_text().splitlines()[0].split(",")
    assert {"spectrum/query/B/largest", "best/val/acc1", "params/trainable"} <= set(header)
    output = capsys.readouterr().out
    assert f"Look inside: {file}\n" in output
    assert "tensorboard" not in output
    pictures = {path.stem for path in cli.run().glob("*.png")}
    assert pictures == {f"spectrum_{kind}_{factor}" for kind in ("map", "ratio") for factor in ("B", "BA")}
    assert (cli.run() / "spectrum.parquet").is_file()
    assert not list(cli.run().glob("events*"))


def test_generated_texts_and_spectra_are_in_tensorboard(fitted_summary_cli: CommandLine) -> None:
    events = fitted_summary_cli.events()
    text = events.Tensors("val/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.count("**Generated**") == 4
    assert "**Reference** the film was" in text
    frozen = events.Tensors("spectrum/A/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "frozen" in frozen


# -------------------------------------------------------------------------------------------------------- text tasks


def test_layerdrop_may_skip_adapted_blocks(summary_cli: CommandLine) -> None:
    # the first step skips both encoder layers
    options = [
        "--model.backbone_args.encoder_layerdrop=0.95",
        "--trainer.max_steps=1",
    ]
    assert summary_cli("fit", *options) == 0
    assert summary_cli.checkpoint()["global_step"] == 1


def test_one_key_switches_task(text_cli: CommandLine, tmp_path: Path) -> None:
    glue = tmp_path / "glue"
    for version, (task, metric) in enumerate((("cola", "val/matthews"), ("sst2", "val/accuracy"))):
        write_sentences(glue / task, {"train": 12, "validation": 10})
        assert text_cli("fit", f"--data.path={glue}", f"--data.task={task}", ONE_EPOCH) == 0
        assert metric in text_cli.metrics(version)


def test_mnli_has_two_validation_sets(text_cli: CommandLine, tmp_path: Path) -> None:
    rows = [
        {"premise": f"w{i} w1", "hypothesis": "good" if i % 2 else "bad", "label": i % 3, "idx": i} for i in range(30)
    ]
    for name in ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"):
        hidden = {"label": -1} if name.startswith("test") else {}
        write_rows(tmp_path / "mnli" / f"{name}.jsonl", [row | hidden for row in rows])
    options = ["--data.task=mnli", f"--data.path={tmp_path / 'mnli'}", "--data.prediction_format=tsv"]
    assert text_cli("fit", *options, ONE_EPOCH) == 0
    m = text_cli.metrics()
    assert m["val/score"] == pytest.approx((m["val/accuracy_matched"] + m["val/accuracy_mismatched"]) / 2)
    assert text_cli("predict", *options, "--ckpt_path=last") == 0
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        with (text_cli.run() / name).open() as file:
            table = list(csv.DictReader(file, delimiter="\t"))
        assert [r["index"] for r in table] == [str(i) for i in range(30)]
        assert {r["prediction"] for r in table} <= {"entailment", "neutral", "contradiction"}


def test_regression_on_csv_files(text_cli: CommandLine, tmp_path: Path) -> None:
    for split, size in (("train", 40), ("validation", 12)):
        rows = [f"w{i},{'good,4.5' if i % 2 else 'bad,0.5'}\n" for i in range(size)]
        (tmp_path / f"{split}.csv").write_text("left,right,score\n" + "".join(rows))
    options = [f"--data.path={tmp_path}", "--data.task=null", "--data.text_columns=[left, right]"]
    options += ["--data.label_column=score"]
    assert text_cli("fit", *options, *FULL, "--trainer.max_epochs=12") == 0
    metrics = text_cli.metrics()
    assert metrics["val/pearson"] > 0.9
    assert metrics["val/score"] == pytest.approx((metrics["val/pearson"] + metrics["val/spearman"]) / 2)
    answers = ["--data.prediction_format=jsonl", f"--data.predict_path={tmp_path / 'validation.csv'}"]
    assert text_cli("predict", *options, *answers, "--ckpt_path=last") == 0
    rows = [json.loads(line) for line in (text_cli.run() / "predictions.jsonl").read_text().splitlines()]
    assert [r["left"] for r in rows] == [f"w{i}" for i in range(12)]
    assert all(isinstance(r["prediction"], float) for r in rows)


def test_predictions_as_a_glue_submission(fitted_text_cli: CommandLine) -> None:
    assert fitted_text_cli("predict", "--ckpt_path=last", "--data.prediction_format=tsv") == 0
    lines = (fitted_text_cli.run() / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(100, 109)]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


@pytest.mark.slow
def test_a_hub_name_and_a_directory_are_the_same_model(
    text_cli: CommandLine, roberta_path: Path, tmp_path: Path
) -> None:
    """Compare a model in the hub's cache with the same model in a directory."""
    repository = tmp_path / "hub" / "models--someone--tiny-roberta"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(roberta_path)
    words = text_cli.words("fit", "--model.backbone=someone/tiny-roberta")
    # in a new process, since huggingface_hub reads HF_HUB_CACHE at its import
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
    from_hub, from_directory = text_cli.checkpoint(0), text_cli.checkpoint(1)
    assert from_hub["frozen_digest"] == from_directory["frozen_digest"]
    for name, tensor in from_hub["state_dict"].items():
        assert torch.equal(tensor, from_directory["state_dict"][name]), name
