"""Two processes on the CPU compute for texts what one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.app.processes import run_on_two

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# with dropout off, two processes with half the batch compute what one does with the whole batch
NO_DROPOUT = ["--model.adapter.dropout=0", "--trainer.max_epochs=1", "--test_after_fit=true"]
TEXT = ["--model.backbone_args={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"]
SUMMARY = ["--model.backbone_args={dropout: 0.0}"]


def assert_same_weights(cli: CommandLine, steps: int) -> None:
    one, two = cli.checkpoint(0), cli.checkpoint(1)
    assert one["global_step"] == two["global_step"] == steps
    assert len(two["random_states"]) == 2
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]


def test_two_processes_match_one_in_classification(text_cli: CommandLine, tmp_path: Path) -> None:
    options = [*NO_DROPOUT, *TEXT, "--data.test_on_validation=true"]
    assert text_cli("fit", *options, "--data.batch_size=12") == 0
    run_on_two(text_cli.words("fit", *options, "--data.batch_size=6"), tmp_path)
    assert not text_cli.run(2).exists()
    assert_same_weights(text_cli, steps=3)  # 45 rows are left to train on
    one, two = text_cli.metrics(0), text_cli.metrics(1)
    for name in ("val/loss", "val/matthews", "val/score", "test/loss", "test/matthews", "test/score"):
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
    # 9 rows: one process has 5 and the other 4, each the longest first
    ask = ["--data.prediction_format=jsonl", f"--ckpt_path={text_cli.run()}"]
    assert text_cli("predict", *ask) == 0
    rows = predictions(text_cli.run())
    (text_cli.run() / "predictions.jsonl").unlink()
    run_on_two(text_cli.words("predict", *ask), tmp_path)
    again = predictions(text_cli.run())
    assert [row["id"] for row in rows] == list(range(100, 109))
    for one_row, other in zip(rows, again, strict=True):
        assert other.pop("probability") == pytest.approx(one_row.pop("probability"), abs=2e-6)
        assert other.pop("probabilities") == pytest.approx(one_row.pop("probabilities"), abs=2e-6)
    assert again == rows


def test_two_processes_match_one_in_summarization(summary_cli: CommandLine, tmp_path: Path) -> None:
    options = [*NO_DROPOUT, *SUMMARY, "--model.adapter.targets=all", "--data.max_val_samples=7"]
    assert summary_cli("fit", *options, "--data.batch_size=12") == 0
    run_on_two(summary_cli.words("fit", *options, "--data.batch_size=6"), tmp_path)
    assert_same_weights(summary_cli, steps=4)
    one, two = summary_cli.metrics(0), summary_cli.metrics(1)
    for name in (f"{s}/{m}" for s in ("val", "test") for m in ("loss", "rouge1", "rouge2", "rougeL", "rougeLsum")):
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
    assert one["val/rouge1"] > 0
