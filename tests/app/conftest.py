"""The command line as a function, for each family of tasks."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from app.cli import main
from app.reports.heat_map import HeatMap
from modules.base import AdaptedModule


class CommandLine:
    """Run commands with one file of tests/conf/. Everything is written below one folder."""

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
        """Return the directory of a run. Its name may end with --name and --variant."""
        named = self.root.glob(f"version_{version}-*")
        return next(named, self.root / f"version_{version}")

    def checkpoint(self, version: int = 0, name: str = "last") -> dict[str, Any]:
        return torch.load(self.run(version) / "checkpoints" / f"{name}.ckpt", weights_only=True)

    def metrics(self, version: int = 0) -> dict[str, float]:
        return json.loads((self.run(version) / "metrics.json").read_text())

    def events(self, version: int = 0) -> EventAccumulator:
        return EventAccumulator(str(self.run(version)), size_guidance={"scalars": 0, "images": 0}).Reload()

    def scalars(self, tag: str, version: int = 0) -> dict[int, float]:
        return {e.step: e.value for e in self.events(version).Scalars(tag)}


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable drawing, which takes a third of so small a fit, except in tests marked `drawn`."""
    if request.node.get_closest_marker("drawn") is None:
        blank = np.zeros((1, 1, 3), np.uint8)
        monkeypatch.setattr(HeatMap, "__init__", lambda *_: None)
        monkeypatch.setattr(HeatMap, "render", lambda *_: blank)
        monkeypatch.setattr("app.reports.confusion.draw_confusion", lambda *_: blank)


@pytest.fixture
def cli(tmp_path: Path, parquet_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", parquet_path)


@pytest.fixture
def text_cli(tmp_path: Path, cola_path: Path, roberta_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", cola_path, "text", roberta_path)


@pytest.fixture
def summary_cli(tmp_path: Path, pairs_path: Path, bart_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", pairs_path, "summary", bart_path)


@pytest.fixture
def instruction_cli(tmp_path: Path, instructions_path: Path, llama_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", instructions_path, "instructions", llama_path)


@pytest.fixture
def question_cli(tmp_path: Path, questions_path: Path, llama_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", questions_path, "questions", llama_path)


@pytest.fixture
def any_cli(request: pytest.FixtureRequest) -> CommandLine:
    """Return the fixture that the test's parameter names. A fixture `fitted_…` has a finished run."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def finished_fit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Return a function that copies a finished fit below a command line's root. A session runs equal fits once.

    A test must call the function before its other commands, and must not patch the fit.
    """
    kept: dict[tuple[str, ...], Path] = {}

    def put(cli: CommandLine, *options: str) -> None:
        key = (cli.config, *options)
        if key not in kept:
            first = copy.copy(cli)
            first.root = tmp_path_factory.mktemp("finished_fit") / "runs"
            assert first("fit", *options) == 0
            kept[key] = first.root
        shutil.copytree(kept[key], cli.root)

    return put


def _fitted(name: str) -> Callable[..., CommandLine]:
    @pytest.fixture(name=f"fitted_{name}")
    def fitted(
        request: pytest.FixtureRequest, finished_fit: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> CommandLine:
        cli: CommandLine = request.getfixturevalue(name)
        finished_fit(cli, "--trainer.max_epochs=1")
        capsys.readouterr()  # drop the output of the fit
        return cli

    return fitted


# each of these command lines starts with a finished run of one epoch, version_0
fitted_cli = _fitted("cli")
fitted_text_cli = _fitted("text_cli")
fitted_summary_cli = _fitted("summary_cli")
fitted_instruction_cli = _fitted("instruction_cli")


States = dict[str, dict[str, Tensor]]


@contextmanager
def recording(*hooks: str) -> Iterator[States]:
    """Record the model's state, frozen backbone included, when one of these hooks runs. Keys are hook names."""
    states: States = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in hooks:

            def hook(module: AdaptedModule, name: str = name) -> None:
                states[name] = {k: v.clone() for k, v in module.state_dict().items()}

            patch.setattr(AdaptedModule, name, hook)
        yield states


@pytest.fixture
def recorded() -> Iterator[States]:
    """Record the model's states at the start and at the end of a fit."""
    with recording("on_fit_start", "on_fit_end") as states:
        yield states
