"""Runs through the real command line: what is trained, what is written, what stays as it was."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from tests.conftest import CLASSES, colour_image

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ((), ("adapters.query.B", "adapters.value.B", "head.weight", "head.bias")),
        (
            ("--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal"),
            ("adapters.query.A", "adapters.value.A", "head.weight", "head.bias"),
        ),
        (
            ("--model.adapter.train=both", "--model.adapter.init_a=kaiming"),
            (".A", ".B", "head.weight", "head.bias"),
        ),
        (("--model.tuning=head",), ("head.weight", "head.bias")),
    ],
)
def test_only_what_is_trained_changes(
    cli: CommandLine, recorded: dict[str, dict[str, Tensor]], options: tuple[str, ...], trained: tuple[str, ...]
) -> None:
    assert cli("fit", *options, "--test_after_fit=true") == 0
    before, after = recorded["on_fit_start"], recorded["on_fit_end"]
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) is not name.endswith(trained), name


def test_full_tuning_changes_everything_and_has_no_adapter(
    cli: CommandLine, recorded: dict[str, dict[str, Tensor]]
) -> None:
    assert cli("fit", "--model.tuning=full") == 0
    assert not any("adapters" in name for name in recorded["on_fit_start"])
    unchanged = [n for n, t in recorded["on_fit_start"].items() if torch.equal(t, recorded["on_fit_end"][n])]
    assert unchanged == []


def test_a_run_learns_and_leaves_what_the_contract_names(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("fit", "--trainer.max_epochs=8", "--test_after_fit=true", "--model.adapter.targets=all") == 0
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == f"Run directory: {cli.run()}"
    assert "blocks.*.attn.qkv.query" in out
    metrics = cli.metrics()
    assert metrics["test/acc1"] > 0.9
    assert {"val/loss", "val/acc1", "train/loss", "time/fit_seconds", "memory/peak_bytes"} <= metrics.keys()
    # per block and rank 4: B of q, k, v, output (32 each), mlp_in (128), mlp_out (32); the head has 32·3 + 3
    assert metrics["params/trainable"] == 2 * 4 * (4 * 32 + 128 + 32) + 99
    assert metrics["adapter/bytes"] == 4 * 2 * 4 * ((4 * 32 + 128 + 32) + (4 * 32 + 32 + 128))
    config = yaml.safe_load((cli.run() / "config.yaml").read_text())
    assert config["model"]["init_args"]["adapter"]["rank"] == 4
    assert sorted(p.name for p in (cli.run() / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_a_checkpoint_holds_no_frozen_backbone(fitted_cli: CommandLine) -> None:
    state = fitted_cli.checkpoint()["state_dict"]
    factors = {
        f"backbone.blocks.{i}.attn.qkv.adapters.{r}.{f}" for i in (0, 1) for r in ("query", "value") for f in "AB"
    }
    assert set(state) == factors | {"head.weight", "head.bias"}


def test_each_run_has_a_directory_of_its_own(fitted_cli: CommandLine) -> None:
    assert fitted_cli("fit", "--trainer.max_epochs=1") == 0
    assert fitted_cli.run(0).is_dir()
    assert fitted_cli.run(1).is_dir()
    # two runs of one configuration are one run
    first, second = fitted_cli.checkpoint(0)["state_dict"], fitted_cli.checkpoint(1)["state_dict"]
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_checkpoint_evaluates_to_what_fit_said(cli: CommandLine) -> None:
    assert cli("fit", "--test_after_fit=true") == 0
    before = cli.metrics()
    # after training, last.ckpt is the validated model and best.ckpt the tested one
    for command, name, loss in (("validate", "last", "val/loss"), ("test", "best", "test/loss")):
        (cli.run() / "metrics.json").unlink()
        assert cli(command, "--ckpt_path", str(cli.run() / "checkpoints" / f"{name}.ckpt")) == 0
        assert cli.metrics()[loss] == before[loss]
    assert not cli.run(1).exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precisions_train(cli: CommandLine, precision: str, dtype: str) -> None:
    assert cli("fit", f"--trainer.precision={precision}", f"--model.backbone_dtype={dtype}") == 0
    state = cli.checkpoint()["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert cli.metrics()["train/loss"] < 1.5


@pytest.mark.drawn
def test_tensorboard_has_spectra_rates_and_confusion_matrix(cli: CommandLine) -> None:
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
    # orthonormal rows in the frozen A: σ(BA) = σ(B)
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


def test_another_logger_by_config(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("fit", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={cli.root}/csv") == 0
    file = next((cli.root / "csv").rglob("metrics.csv"))
    header = file.read_text().splitlines()[0].split(",")
    assert {"spectrum/query/B/largest", "best/val/acc1", "params/trainable"} <= set(header)
    closing = capsys.readouterr().out
    assert f"Look inside: {file}\n" in closing
    assert "tensorboard" not in closing
    pictures = {path.stem for path in cli.run().glob("*.png")}
    assert pictures == {f"spectrum_{kind}_{factor}" for kind in ("map", "ratio") for factor in ("B", "BA")}
    assert (cli.run() / "spectrum.parquet").is_file()
    assert not list(cli.run().glob("events*"))


def test_predict_writes_a_table(cli: CommandLine, tmp_path: Path) -> None:
    assert cli("fit", "--trainer.max_epochs=8", "--model.adapter.targets=all") == 0
    folder = tmp_path / "unknown"
    rng = np.random.default_rng(7)
    for i in range(9):
        target = folder / f"{i}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(colour_image(i % 3, rng)).save(target)
    # no labelled data is needed: the checkpoint knows its classes
    assert cli("predict", "--ckpt_path=last", f"--data.predict_path={folder}", "--data.path=/nowhere") == 0
    with (cli.run() / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == [f"{i}.png" for i in range(9)]
    assert sum(r["prediction"] == CLASSES[i % 3] for i, r in enumerate(rows)) >= 8
    assert all(1 / 3 <= float(r["probability"]) <= 1 for r in rows)
