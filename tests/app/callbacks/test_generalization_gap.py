"""The generalization gap between training rows and held-out rows, in every family of tasks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from datamodules.base import ResumableDataModule
from tests.app.conftest import CommandLine
from tests.support.small_data import write_parquet


def gaps(cli: CommandLine, version: int = 0) -> dict[str, float]:
    return {k: v for k, v in cli.metrics(version).items() if k.partition("/")[0] in ("train_eval", "gap")}


@pytest.mark.parametrize(
    ("any_cli", "names"),
    [
        ("fitted_cli", {"loss", "acc1", "macro_f1", "ece"}),
        ("fitted_text_cli", {"loss", "matthews", "score", "macro_f1", "ece"}),
        ("fitted_summary_cli", {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum"}),
        ("fitted_instruction_cli", {"loss", "perplexity", "token_acc"}),
    ],
    indirect=["any_cli"],
)
def test_every_family_logs_its_metrics_on_training_rows(any_cli: CommandLine, names: set[str]) -> None:
    metrics = any_cli.metrics()
    assert set(gaps(any_cli)) == {f"{part}/{name}" for part in ("train_eval", "gap") for name in names}
    for name in names:
        expected = metrics[f"train_eval/{name}"] - metrics[f"val/{name}"]
        assert metrics[f"gap/{name}"] == pytest.approx(expected, abs=1e-6)
    assert metrics["time/generalization_seconds"] > 0
    assert any_cli.scalars("gap/loss") == {8: pytest.approx(metrics["gap/loss"])}


def test_the_sample_is_evaluated_as_held_out_rows_are(cli: CommandLine, tmp_path: Path) -> None:
    """With the training rows as test split the gap is zero, though training uses augmentation and dropout."""
    rows = write_parquet(tmp_path / "same", {"train": 30, "validation": 60, "test": 30})
    options = [f"--data.path={rows}", "--trainer.max_epochs=3", "--test_after_fit=true"]
    assert cli("fit", *options) == 0
    metrics = cli.metrics()
    assert metrics["train_eval/loss"] != metrics["test/loss"]
    assert metrics["gap/loss"] == pytest.approx(metrics["train_eval/loss"] - metrics["test/loss"], abs=1e-6)
    (rows / "test.parquet").write_bytes((rows / "train.parquet").read_bytes())
    assert cli("fit", *options) == 0
    metrics = cli.metrics(1)
    assert metrics["gap/loss"] == pytest.approx(0, abs=1e-6)
    assert metrics["gap/acc1"] == 0
    assert metrics["train_eval/acc1"] == metrics["test/acc1"]


def test_the_sample_is_no_larger_than_the_validation_data(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches have six rows, and the last batch may have fewer."""
    sizes: list[int] = []
    sample = ResumableDataModule.training_sample
    monkeypatch.setattr(ResumableDataModule, "training_sample", lambda data, n: sizes.append(n) or sample(data, n))
    for options in ([], ["--trainer.limit_val_batches=1"], ["--generalization.rows=5"]):
        rows = ["--data.max_val_samples=11", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
        assert cli("fit", *rows, *options) == 0
    assert sizes == [11, 6, 5]


def test_the_tested_weights_are_those_of_the_best_checkpoint(cli: CommandLine) -> None:
    options = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=max"]  # the first validation has the largest loss
    options += ["--model.schedule=constant", "--model.warmup_ratio=0"]
    assert cli("fit", *options, "--trainer.max_epochs=3", "--test_after_fit=true") == 0
    assert cli("fit", *options, "--trainer.max_epochs=3") == 0
    assert cli("fit", *options, "--trainer.max_epochs=1") == 0  # ends at the step of the first fit's best checkpoint
    assert cli.checkpoint(0, "best")["global_step"] == 8
    tested, last, first = (cli.metrics(version)["train_eval/loss"] for version in range(3))
    assert tested == first > last


def test_the_fit_is_the_same_without_the_gap(fitted_cli: CommandLine) -> None:
    cli = fitted_cli
    assert cli("fit", "--trainer.max_epochs=1", "--generalization.rows=0") == 0
    assert gaps(cli, 1) == {}
    for name in ("last", "best"):
        with_gap, without = cli.checkpoint(0, name)["state_dict"], cli.checkpoint(1, name)["state_dict"]
        assert all(torch.equal(tensor, without[key]) for key, tensor in with_gap.items())
    for key in ("val/loss", "train/loss", "best/val/acc1"):
        assert cli.metrics(0)[key] == cli.metrics(1)[key]
    assert cli.scalars("val/loss", 0) == cli.scalars("val/loss", 1)
    # evaluating the training sample does not count as a test
    assert not any((cli.run(version) / "evaluations.json").exists() for version in (0, 1))


def test_a_validation_of_earlier_weights_gives_no_gap(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("fit", "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2") == 0
    assert set(gaps(cli)) == {f"train_eval/{name}" for name in ("loss", "acc1", "macro_f1", "ece")}
    assert "the last validation was of step 16, and the fit has ended at step 24" in capsys.readouterr().err


def test_without_any_evaluation_nothing_is_measured(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("fit", "--trainer.max_steps=1", "--trainer.limit_val_batches=0") == 0
    assert gaps(cli) == {}
    assert "trainer.limit_val_batches leaves no batch to evaluate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_later_test_removes_the_gap_to_the_earlier_one(cli: CommandLine) -> None:
    assert cli("fit", "--trainer.max_epochs=1", "--test_after_fit=true") == 0
    fitted = cli.metrics()
    assert cli("validate", "--ckpt_path=last") == 0
    assert cli("test", "--ckpt_path=last") == 0
    assert cli.metrics() == fitted
    assert cli("test", "--ckpt_path=last", "--data.max_test_samples=12") == 0
    assert "gap/acc1" not in cli.metrics()
    assert math.isfinite(cli.metrics()["train_eval/acc1"])
