"""Fixtures of data modules: log records go to stderr as on the command line, and `cache` is a new cache folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from app.console import console_logging


@pytest.fixture(autouse=True)
def printed_logs() -> Iterator[None]:
    with console_logging():
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a new cache of `datasets`."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder
