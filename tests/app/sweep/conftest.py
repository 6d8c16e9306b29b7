from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from app.cli import main
from app.reports.report import Report
from app.sweep import check, run, trial

FAKE = Path(__file__).with_name("fake_fit.py")
CONTENT: dict[str, Any] = {
    "base": ["tests/conf/image.yaml"],
    "set": {"trainer.max_epochs": 1},
    "variants": {"B": {}, "B16": {"variant": "B", "model.adapter.rank": 16}},
    "search": {"model.learning_rate": [0.001, 0.002, 0.004]},
    "select": {"metric": "val/acc1", "mode": "max", "seeds": [0, 1]},
    "confirm": {"seeds": [2, 3], "report": ["test/acc1", "test/loss"]},
}


class SweepCommand:
    """Run `sweep` on a file in one folder. Everything is written to that folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.output = root, root / "output"
        self.file = root / "tiny.yaml"
        self.content: dict[str, Any] = json.loads(json.dumps(CONTENT))
        self.content["select"]["seeds"], self.content["confirm"]["seeds"] = [0], [2]

    def words(self, *options: str) -> list[str]:
        self.file.write_text(yaml.safe_dump(self.content, sort_keys=False))
        return ["sweep", "--config", str(self.file), "--output", str(self.output), *options]

    def __call__(self, *options: str) -> int:
        return main(self.words(*options))

    def start(self, *options: str) -> BaseProcess:
        """Run the command in a new process group. The process is forked, so that nothing is imported twice."""
        process = multiprocessing.get_context("fork").Process(target=self._work, args=(self.words(*options),))
        process.start()
        return process

    def _work(self, words: list[str]) -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores SIGINT for tests in the background
        with (self.root / "log").open("a") as file, redirect_stdout(file), redirect_stderr(file):
            faulthandler.dump_traceback_later(120, exit=True, file=file)  # end a process that hangs
            sys.exit(main(words))

    def log(self) -> str:
        return (self.root / "log").read_text()

    def results(self) -> pd.DataFrame:
        return pd.read_parquet(self.output / "results.parquet")

    def history(self) -> Counter[tuple[str, str]]:
        """Return how often each trial has started and ended."""
        file = self.output / "trials" / "history"
        lines = file.read_text().splitlines() if file.exists() else []
        return Counter((e["trial"], e["event"].partition(" ")[0]) for e in map(json.loads, lines))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepCommand:
    """Return a sweep that runs `fake_fit` in its trials, skips the check of configurations, and draws nothing."""
    monkeypatch.setattr(check, "check_plan", lambda *_: None)
    monkeypatch.setattr(Report, "add_figure", lambda *_: None)  # test_report.py tests the figures
    monkeypatch.setattr(trial, "MAIN", FAKE)
    monkeypatch.setattr(run, "POLL", 0.02)
    monkeypatch.setattr(run, "LOOK", 0.1)
    return SweepCommand(tmp_path)


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the seconds per step of `fake_fit`."""
    return lambda seconds: monkeypatch.setenv("FAKE_FIT_PAUSE", str(seconds))
