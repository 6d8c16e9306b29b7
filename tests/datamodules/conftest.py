"""Log records of data modules are printed, as by the command line; tests that ask for it have a cache of their own."""

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
    """A cache that no other test has written to."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder
