"""What every test shares: no hub, no colour, a fixed width, and a small set of images that can be learnt."""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_CACHE=tempfile.mkdtemp(prefix="onesided-tests-"),
    COLUMNS="160",
    NO_COLOR="1",
    CUDA_VISIBLE_DEVICES="",
)

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
CLASSES = ["red", "green", "blue"]
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test from the same random numbers, in the project's folder, with a cache of its own to write to."""
    torch.manual_seed(0)
    monkeypatch.chdir(ROOT)


def colour_image(label: int, rng: np.random.Generator, size: int = 16) -> np.ndarray:
    """Noise with one channel brighter: (size, size, 3) uint8."""
    pixels = rng.integers(0, 160, (size, size, 3))
    pixels[..., label] += 90
    return pixels.astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, sizes: dict[str, int], label_column: str = "label", seed: int = 0) -> Path:
    """A directory of Parquet in the hub's columns."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    features = datasets.Features({"img": datasets.Image(), label_column: datasets.ClassLabel(names=CLASSES)})
    for split, size in sizes.items():
        labels = [i % 3 for i in range(size)]
        rows = {"img": [{"bytes": png(colour_image(i, rng)), "path": None} for i in labels], label_column: labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.fixture(scope="session")
def parquet_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("colours"), {"train": 60, "test": 30})
