"""The table of the benchmark of truncated adapters, and a quick run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import truncation
from tests.support.small_data import write_parquet

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_table_has_mean_standard_error_and_paired_interval() -> None:
    def records(*scores: float) -> list[truncation.Record]:
        return [{"mean_rank": 4, "loss": 0.25, "file_bytes": 5000, "score": score} for score in scores]

    trained, cut = truncation.rows({truncation.AS_TRAINED: records(0.80, 0.82, 0.84), "cut": records(0.79, 0.82, 0.82)})
    # Standard error: 2 / √3. Differences -1, 0 and -2 points: mean -1, t(0.975, 2) · 1 / √3 = 2.48.
    assert trained == ["as trained", "4.0", "25.0", "5", "82.0 ± 1.2", ""]
    assert cut[-1] == "-1.0 (-3.5 to +1.5)"


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    source, output = write_parquet(tmp_path / "source", {"train": 90, "test": 30}), tmp_path / "truncation.json"
    argv = ["--quick", "--task", "images", "--path", str(source), "--output", str(output), "--seeds", "0", "--resume"]
    options = ["--model.weights=none", "--model.backbone=vit_tiny_patch16_224", "--model.image_size=16"]
    truncation.run([*argv, "--", *options, f"--model.backbone_args={json.dumps(TINY)}"])
    record = json.loads(output.read_text())
    assert list(record) == ["images, rank 16, seed 0", "images, rank 4, seed 0"]
    arms = record["images, rank 16, seed 0"]["arms"]
    assert set(arms["--rank 4"]["ranks"]) == {4} and arms["--rank 4"]["mean_rank"] == 4
    assert arms["--keep 0.9"]["loss"] <= 0.1**0.5 < arms["--rank 2"]["loss"]
    sizes = [arms[name]["file_bytes"] for name in ("as trained", "--rank 8", "--rank 4", "--rank 2")]
    assert sizes == sorted(sizes, reverse=True)
    assert record["images, rank 4, seed 0"]["arms"]["as trained"]["file_bytes"] == pytest.approx(sizes[2], rel=0.02)
    assert arms["as trained"]["loss"] == 0 and set(arms["as trained"]["ranks"]) == {16}
