"""What every test shares: no hub, no colour, a fixed width, and small sets of images and texts that can be learnt."""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    OMP_NUM_THREADS="1",  # models are so small that a second thread only gets in the way, and each core has its tests
    HF_HUB_OFFLINE="1",
    HF_DATASETS_CACHE=tempfile.mkdtemp(prefix="onesided-tests-"),
    COLUMNS="160",
    NO_COLOR="1",
    CUDA_VISIBLE_DEVICES="",
)

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.backbones import WORDS, save_backbone
from tests.causal_backbones import save_decoder

ROOT = Path(__file__).parents[1]
CLASSES = ["red", "green", "blue"]
datasets.disable_progress_bars()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Every core for folders; none but this process for files, tests and keywords, since each worker imports all."""
    chosen = config.option.keyword or any(not Path(arg).is_dir() for arg in config.args)
    if chosen:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def sentences(size: int, seed: int = 0) -> list[str]:
    """Three to fourteen words each, half of them with `good` among them and half with `bad`."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        words = list(rng.choice(WORDS[:40], rng.integers(2, 14)))
        words.insert(int(rng.integers(0, len(words))), ["bad", "good"][i % 2])
        rows.append(" ".join(words))
    return rows


def write_sentences(folder: Path, sizes: dict[str, int], hidden: tuple[str, ...] = ("test",)) -> Path:
    """CoLA's columns in Parquet: a sentence is acceptable if it has the word `good`; labels of hidden splits are -1."""
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["unacceptable", "acceptable"]),
            "idx": datasets.Value("int32"),
        }
    )
    for i, (split, size) in enumerate(sizes.items()):
        texts = sentences(size, seed=i)
        labels = [-1 if split in hidden else int("good" in text) for text in texts]
        rows = {"sentence": texts, "label": labels, "idx": list(range(100, 100 + size))}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def write_pairs(folder: Path, sizes: dict[str, int]) -> Path:
    """XSum's columns in JSONL: the summary says whether the document is good or bad."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (split, size) in enumerate(sizes.items()):
        texts = sentences(size, seed=10 + i)
        rows = [
            {"document": text, "summary": f"the film was {'good' if 'good' in text else 'bad'} .", "id": f"{split}-{j}"}
            for j, text in enumerate(texts)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def instructions(size: int, seed: int = 0) -> list[dict[str, str]]:
    """Alpaca's columns: a word to be said once, or as often as the input says, so that lengths differ."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        word = str(rng.choice(WORDS[:40]))
        times = i % 3
        asked = {"instruction": f"Say {word}.", "input": "" if times == 0 else f"{times + 1} times"}
        rows.append({**asked, "output": " ".join([word] * (times + 1))})
    return rows


def write_instructions(folder: Path, sizes: dict[str, int]) -> Path:
    """Alpaca's columns in JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (split, size) in enumerate(sizes.items()):
        rows = instructions(size, seed=20 + i)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def questions(size: int, seed: int = 0) -> list[dict[str, Any]]:
    """MMLU's columns: questions of two subjects in turn, with four choices and an answer of each letter."""
    rng = np.random.default_rng(seed)
    return [
        {
            "question": f"Which is {word}?",
            "subject": ("astronomy", "philosophy")[i % 2],
            "choices": [str(w) if c != i % 4 else word for c, w in enumerate(rng.choice(WORDS[40:45], 4))],
            "answer": i % 4,
        }
        for i, word in enumerate(map(str, rng.choice(WORDS[:40], size)))
    ]


def write_questions(folder: Path, sizes: dict[str, int]) -> Path:
    """MMLU's columns in JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (split, size) in enumerate(sizes.items()):
        rows = questions(size, seed=30 + i)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def cola_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("cola"), {"train": 50, "validation": 20, "test": 9})


@pytest.fixture(scope="session")
def pairs_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), {"train": 50, "validation": 10, "test": 9})


@pytest.fixture(scope="session")
def roberta_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("roberta"), "roberta")


@pytest.fixture(scope="session")
def bart_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("bart"), "bart")


@pytest.fixture(scope="session")
def instructions_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("instructions"), {"train": 50, "validation": 10, "test": 9})


@pytest.fixture(scope="session")
def questions_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"), {"dev": 10, "validation": 6, "test": 14})


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"))
