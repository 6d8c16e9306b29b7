"""Settings of every test (no hub, no color, fixed width, one thread), and fixtures of small data sets and backbones."""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    OMP_NUM_THREADS="1",  # a second thread would slow down such small models, and every core runs other tests
    HF_HUB_OFFLINE="1",
    HF_DATASETS_CACHE=tempfile.mkdtemp(prefix="onesided-tests-"),
    COLUMNS="160",
    NO_COLOR="1",
    CUDA_VISIBLE_DEVICES="",
)

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from jsonargparse import _signatures

from tests.backbones import save_backbone
from tests.causal_backbones import save_decoder
from tests.support.small_data import (
    CLASSES,
    colour_image,
    instructions,
    png,
    questions,
    sentences,
    write_instructions,
    write_pairs,
    write_parquet,
    write_questions,
    write_sentences,
)

__all__ = [  # other tests import these names from here
    "CLASSES",
    "colour_image",
    "instructions",
    "png",
    "questions",
    "sentences",
    "write_instructions",
    "write_pairs",
    "write_parquet",
    "write_questions",
    "write_sentences",
]
ROOT = Path(__file__).parents[1]
datasets.disable_progress_bars()
# The first backward pass decides whether autograd starts threads.
# With threads, no test could fork a process that trains.
torch.ones(1, requires_grad=True).sum().backward()


_inspect = _signatures.get_signature_parameters
_inspected: dict[Any, list[Any]] = {}


def _inspect_once(kind: Any, method: Any = None, **keys: Any) -> list[Any]:
    """Return the parameters of a class. jsonargparse would parse the source of `Trainer` again in each command."""
    if (kind, method) not in _inspected:
        _inspected[kind, method] = _inspect(kind, method, **keys)
    return [copy.copy(parameter) for parameter in _inspected[kind, method]]


_signatures.get_signature_parameters = _inspect_once


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use every core for folders, and this process alone for files or keywords: each worker imports everything."""
    chosen = config.option.keyword or any(not Path(arg).is_dir() for arg in config.args)
    if chosen:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test with the same random state, in the project's folder, and without syncs to the disk.

    A fit syncs 27 times, half of the time of so small a fit. Only a power failure would show the difference.
    """
    torch.manual_seed(0)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def parquet_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("colours"), {"train": 60, "test": 30})


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
