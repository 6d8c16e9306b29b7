"""Fixtures of small data sets and backbones, and the state in which every test starts."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
import torch

from tests.backbones import save_backbone
from tests.causal_backbones import save_decoder
from tests.conftest import ROOT
from tests.support import library_caches
from tests.support.small_data import write_instructions, write_pairs, write_parquet, write_questions, write_sentences

datasets.disable_progress_bars()
# The first backward pass decides whether autograd starts threads.
# With threads, no test could fork a process that trains.
torch.ones(1, requires_grad=True).sum().backward()
library_caches.install()


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
