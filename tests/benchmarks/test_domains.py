"""The benchmark of domains: rendered environments, and a quick run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import domains
from datamodules.sources.images import open_split
from tests.support.small_data import CLASSES, write_parquet


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("source"), {"train": 180})


def test_environments_have_different_images_and_the_same_classes(source: Path, tmp_path: Path) -> None:
    table = open_split(str(source), "train", None, None)
    assert table is not None
    domains.write_environments(table, tmp_path, 30)
    files = {name: sorted((tmp_path / name).rglob("*.png")) for name in domains.SHIFTS}
    rows = [int(file.stem) for group in files.values() for file in group]
    assert len(set(rows)) == len(rows) == 6 * 30
    for name, group in files.items():
        assert [sum(file.parent.name == c for file in group) for c in CLASSES] == [10, 10, 10]
        for file in group:
            original, shifted = table.decode(int(file.stem)), np.asarray(Image.open(file))
            same = torch.equal(original, torch.from_numpy(shifted.copy()).permute(2, 0, 1))
            assert same == (name == "plain")
    inverted = files["inverted"][0]
    assert np.array_equal(255 - np.asarray(Image.open(inverted)), table.decode(int(inverted.stem)).permute(1, 2, 0))


@pytest.mark.slow
def test_quick_run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "domains.json"
    words = ["--quick", "--seeds", "0", "--source", str(source), "--output", str(output)]
    domains.run(words)
    record = json.loads(output.read_text())
    assert list(record) == ["B, seed 0", "A, seed 0", "lora, seed 0", "full, seed 0"]
    for name, entry in record.items():
        metrics = entry["metrics"]
        assert all(metric in metrics for metric, _ in domains.COLUMNS.values()), name
        others = [metrics[f"test/{shift}/acc1"] for shift in domains.SHIFTS if shift != "plain"]
        assert metrics["test/ood/acc1"] == pytest.approx(sum(others) / 5, abs=1e-5)
    trained = {name: entry["metrics"]["params/trainable"] for name, entry in record.items()}
    assert trained["B, seed 0"] == trained["A, seed 0"] < trained["lora, seed 0"] < trained["full, seed 0"]
    assert capsys.readouterr().out.count("| full |") == 1
    before = output.read_text()
    domains.run([*words, "--resume"])  # --resume fits nothing again
    assert output.read_text() == before
