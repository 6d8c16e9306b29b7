"""The table, and a quick run of the benchmark on small data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import federated
from tests.support.small_data import write_parquet

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def test_the_table_pairs_each_arm_with_one_client_that_has_all_rows() -> None:
    def fits(arm: str, *scores: float) -> list[tuple[federated.Fit, federated.Record]]:
        shared = {"average_errors": ["1e-08", "3e-08"], "bytes": 2500.0, "cpu_seconds": 7.0}
        fit = federated.Fit("cola", 4, "iid", arm, 0.003, 0)
        return [(fit, {"score": score, **shared}) for score in scores]

    ffa, centralised = federated.rows({"ffa": fits("ffa", 0.10, 0.12, 0.14), "centralised": fits("", 0.20, 0.20, 0.23)})
    # Standard error: 2 / √3. Differences -10, -8 and -9 points: mean -9, t(0.975, 2) · 1 / √3 = 2.48.
    assert ffa == ["ffa", "0.003", "12.0 ± 1.2", "-9.0 (-11.5 to -6.5)", "2.0e-08", "2.5", "7"]
    assert centralised[3] == ""


@pytest.mark.slow
def test_quick_run(cola_path: Path, roberta_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "federated.json"
    images = write_parquet(tmp_path / "images", {"train": 80, "test": 30})
    argv = ["--quick", "--output", str(output), "--resume", "--seeds", "0", "--arms", "lora", "centralised"]
    argv += ["--texts", str(cola_path), "--text_backbone", str(roberta_path), "--images", str(images)]
    argv += ["--backbone", "vit_tiny_patch16_224", "--backbone_args", json.dumps(TINY), "--image_size", "16"]
    argv += ["--layers", "1", "--clients", "2", "--choice_seeds", "1"]
    federated.run(argv)
    sections = {name.partition(", ")[0::2] for name in json.loads(output.read_text()) if name.endswith("seed 0")}
    assert sections == {
        (data, f"{setting}, {lr}, seed 0")
        for data, lr in (("cola", 0.002), ("cifar10", 0.001))
        for setting in ("2 clients, iid, lora", "2 clients, dirichlet:0.3, lora", "one client, centralised")
    }
    before = output.read_text()
    federated.run(argv)  # Nothing is fitted again.
    assert output.read_text() == before
