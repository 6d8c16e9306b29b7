"""The command line as a function, for each family of tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from app.cli import main
from modules.base import AdaptedModule

Run = Callable[..., int]


class CommandLine:
    """Runs commands of one of tests/conf/*.yaml with everything written below one folder."""

    def __init__(self, root: Path, data: Path, config: str = "image", backbone: Path | None = None) -> None:
        self.root, self.data, self.config = root, data, config
        self.backbone = [] if backbone is None else ["--model.backbone", str(backbone)]

    def words(self, command: str, *options: str) -> list[str]:
        base = ["--config", f"tests/conf/{self.config}.yaml", "--trainer.default_root_dir", str(self.root)]
        path = [] if any(o.startswith("--data.path") for o in options) else ["--data.path", str(self.data)]
        backbone = [] if any(o.startswith("--model.backbone=") for o in options) else self.backbone
        return [command, *base, *path, *backbone, *options]

    def __call__(self, command: str, *options: str) -> int:
        return main(self.words(command, *options))

    def run(self, version: int = 0) -> Path:
        return self.root / f"version_{version}"

    def checkpoint(self, version: int = 0, name: str = "last") -> dict[str, Any]:
        return torch.load(self.run(version) / "checkpoints" / f"{name}.ckpt", weights_only=True)

    def metrics(self, version: int = 0) -> dict[str, float]:
        return json.loads((self.run(version) / "metrics.json").read_text())

    def events(self, version: int = 0) -> EventAccumulator:
        return EventAccumulator(str(self.run(version)), size_guidance={"scalars": 0, "images": 0}).Reload()

    def scalars(self, tag: str, version: int = 0) -> dict[int, float]:
        return {e.step: e.value for e in self.events(version).Scalars(tag)}


@pytest.fixture
def cli(tmp_path: Path, parquet_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", parquet_path)


@pytest.fixture
def text_cli(tmp_path: Path, cola_path: Path, roberta_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", cola_path, "text", roberta_path)


@pytest.fixture
def summary_cli(tmp_path: Path, pairs_path: Path, bart_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", pairs_path, "summary", bart_path)


@pytest.fixture(params=["text", "summary"])
def language_cli(request: pytest.FixtureRequest) -> CommandLine:
    return request.getfixturevalue(f"{request.param}_cli")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """The whole state of the model, frozen backbone too, at the start and at the end of each fit."""
    states: dict[str, dict[str, Tensor]] = {}

    def record(name: str) -> None:
        def hook(module: AdaptedModule) -> None:
            states[name] = {k: v.clone() for k, v in module.state_dict().items()}

        monkeypatch.setattr(AdaptedModule, f"on_fit_{name}", hook)

    record("start")
    record("end")
    return states
