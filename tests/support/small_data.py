"""Small learnable sets of images and texts, in the layouts of the hub."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from tests.backbones import WORDS
from tests.support.rows import write_rows

CLASSES = ["red", "green", "blue"]


def colour_image(label: int, rng: np.random.Generator, size: int = 16) -> np.ndarray:
    """Return noise with one brighter channel, (size, size, 3) uint8."""
    pixels = rng.integers(0, 160, (size, size, 3))
    pixels[..., label] += 90
    return pixels.astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels), "PNG")


def write_parquet(folder: Path, sizes: dict[str, int], label_column: str = "label", seed: int = 0) -> Path:
    """Write Parquet files of images with the hub's columns, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    features = datasets.Features({"img": datasets.Image(), label_column: datasets.ClassLabel(names=CLASSES)})
    for split, size in sizes.items():
        labels = [i % 3 for i in range(size)]
        rows = {"img": [{"bytes": png(colour_image(i, rng)), "path": None} for i in labels], label_column: labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def sentences(size: int, seed: int = 0) -> list[str]:
    """Return sentences of 3 to 14 words. One half has the word `good`, the other half the word `bad`."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        words = list(rng.choice(WORDS[:40], rng.integers(2, 14)))
        words.insert(int(rng.integers(0, len(words))), ["bad", "good"][i % 2])
        rows.append(" ".join(words))
    return rows


def write_sentences(folder: Path, sizes: dict[str, int], hidden: tuple[str, ...] = ("test",)) -> Path:
    """Write Parquet files with CoLA's columns. Sentences with `good` are acceptable; labels of hidden splits are -1."""
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
    """Write JSONL files with XSum's columns. The summary has the word `good` or `bad` of the document."""
    for i, (split, size) in enumerate(sizes.items()):
        texts = sentences(size, seed=10 + i)
        rows = [
            {"document": text, "summary": f"the film was {'good' if 'good' in text else 'bad'} .", "id": f"{split}-{j}"}
            for j, text in enumerate(texts)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def instructions(size: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows with Alpaca's columns. The output repeats a word as often as the input says."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        word = str(rng.choice(WORDS[:40]))
        times = i % 3
        prompt = {"instruction": f"Say {word}.", "input": "" if times == 0 else f"{times + 1} times"}
        rows.append({**prompt, "output": " ".join([word] * (times + 1))})
    return rows


def write_instructions(folder: Path, sizes: dict[str, int]) -> Path:
    """Write JSONL files with Alpaca's columns."""
    for i, (split, size) in enumerate(sizes.items()):
        write_rows(folder / f"{split}.jsonl", instructions(size, seed=20 + i))
    return folder


def questions(size: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with MMLU's columns: two subjects in turn, four choices, and answers from A to D in turn."""
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
    """Write JSONL files with MMLU's columns."""
    for i, (split, size) in enumerate(sizes.items()):
        write_rows(folder / f"{split}.jsonl", questions(size, seed=30 + i))
    return folder
