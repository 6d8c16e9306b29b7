"""Files, tables and data modules that are set up as by a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from datamodules.sources.tables import Table, open_table
from tests.support.trainers import stub_trainer


def put(file: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    """Write a file and its missing folders. Return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return file


def opened(path: Path, splits: Sequence[str] = ("train",), config: str | None = None, **keys: Any) -> Table:
    """Return the table of a split that must exist."""
    table = open_table(str(path), splits, config, **keys)
    assert table is not None
    return table


def set_up(data: Any, model: Any, stage: str = "fit", world: int = 1, rank: int = 0) -> Any:
    """Give a data module a trainer with a model, set it up for a stage, and return it."""
    data.trainer = stub_trainer(world, rank, stage=stage, lightning_module=model)
    data.setup(stage)
    return data


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, rows: Callable[[str], list[dict[str, Any]]], *splits: str
) -> list[tuple[str, str | None, str | None]]:
    """Replace the hub by a data set. Return a list that records name, configuration and revision of each request."""
    requests: list[tuple[str, str | None, str | None]] = []

    def names(name: str, config: str | None, revision: str | None) -> list[str]:
        requests.append((name, config, revision))
        return [*splits]

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        requests.append((name, config, revision))
        return datasets.Dataset.from_list(rows(split))

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return requests
