"""Photos as a user has them, the training loop of the timm arms, the table, and a quick run of the benchmark."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import own_photos
from tests.support.small_data import CLASSES, write_parquet

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("source"), {"train": 60, "test": 60})


@pytest.fixture(scope="module")
def photos(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    own_photos.write_photos(str(source), root, own_photos.QUICK_SHARE)
    return root


@pytest.fixture
def study(photos: Path) -> own_photos.Study:
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "weights": "none", "image_size": 16}
    return own_photos.Study(argparse.Namespace(**settings, epochs=2, batch_size=4), photos)


def test_splits_share_no_photo_and_have_equal_classes(photos: Path) -> None:
    names = {}
    for folder, (split, first, end) in own_photos.SPLITS.items():
        each = end // own_photos.QUICK_SHARE - first // own_photos.QUICK_SHARE
        files = {name: sorted((photos / folder / name).glob("*.png")) for name in CLASSES}
        assert [len(group) for group in files.values()] == [each] * 3, folder
        names[folder] = {(split, path.name) for group in files.values() for path in group}
    assert names.pop("choice/train") == names["photos/train"]
    assert len(set.union(*names.values())) == sum(map(len, names.values()))


def test_heads_over_a_frozen_backbone_learn_apart_from_each_other(study: own_photos.Study) -> None:
    rates = [0.0, 0.003, 0.3]
    together = study.timm_fit(rates, seed=1, frozen=True, scored="choice")
    apart = [study.timm_fit([rate], seed=1, frozen=True, scored="choice")[0] for rate in rates]
    assert together == apart
    assert {fit["trained_parameters"] for fit in together} == {17 * 3}
    assert len(set(together[0]["val"])) == 1


def test_full_fine_tuning_trains_every_parameter(study: own_photos.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Tensor] = {}
    monkeypatch.setattr(own_photos, "save", lambda tensors: kept.update(tensors) or b"")
    torch.manual_seed(1)
    start = own_photos.Heads(study.backbone(), 3, 1, frozen=False)
    (fit,) = study.timm_fit([0.01], seed=1, frozen=False, scored="choice")
    assert fit["trained_parameters"] == sum(p.numel() for p in start.parameters())
    assert all(not torch.equal(p, kept[name]) for name, p in start.named_parameters())


def test_table_has_mean_standard_error_and_paired_interval() -> None:
    def fits(*accuracies: float) -> list[own_photos.Record]:
        return [
            {"accuracy": a, "cpu_seconds": 2.0, "trained_parameters": 30, "file_bytes": 500_000} for a in accuracies
        ]

    ours, other = own_photos.rows({"ours": fits(0.80, 0.82, 0.84), "other": fits(0.80, 0.80, 0.83)})
    # Standard error: 2 / √3. Differences 0, 2 and 1 points: mean 1, t(0.975, 2) · 1 / √3 = 4.3027 / √3 = 2.48.
    assert ours[1:] == ["the recipe's", "82.0 ± 1.2", "", "2", "30", "0.50"]
    assert other[3] == "+1.0 (-1.5 to +3.5)"


@pytest.mark.slow
def test_quick_run(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "own_photos.json"
    words = ["--quick", "--source", str(source), "--output", str(output), "--backbone", "vit_tiny_patch16_224"]
    words += ["--image_size", "16", "--backbone_args", json.dumps(TINY), "--epochs", "1", "--batch_size", "4"]
    words += ["--seeds", "0", "--choice_seeds", "1", "--resume", "--", "--trainer.max_epochs=1", "--data.batch_size=4"]
    own_photos.run(words)
    record = json.loads(output.read_text())
    assert {name for name in record if name.endswith("seed 0")} == {
        f"{arm}, seed 0" for arm in ("ours", *own_photos.GRIDS)
    }
    for arm, grid in own_photos.GRIDS.items():
        choice = record[f"choice, {arm}, seed 1"]["fits"]
        best = max(choice, key=lambda fit: fit["accuracy"])
        assert [fit["rate"] for fit in choice] == list(grid)
        assert record[f"{arm}, seed 0"]["rates"] == [best["rate"]]
    before = output.read_text()
    own_photos.run(words)  # Nothing is fitted again.
    assert output.read_text() == before
