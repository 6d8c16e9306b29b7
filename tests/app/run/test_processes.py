"""Distributed failures: one rank reports the error, and all ranks end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import lightning as L
import pytest
from jsonargparse import ArgumentError, Namespace

from app.callbacks import Termination
from app.config.validation import check_strategy
from datamodules.errors import ModelError
from modules.training.checks import DivergenceCheck
from tests.app.processes import run_on_two
from tests.conftest import ROOT

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

DDP_STRATEGY = "lightning.pytorch.strategies.DDPStrategy"


def errors(logs: Path) -> list[str]:
    """Return the error lines of both ranks. Neither output may have a traceback."""
    output = "".join((logs / f"rank{rank}.log").read_text() for rank in (0, 1))
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.adapter.rank=500", "adapter.rank: 500 is larger"),  # fails before the ranks connect
        ("--data.label_column=none", "data.label_column: "),  # fails after the ranks have connected
    ],
)
def test_an_error_on_all_ranks_is_reported_once(cli: CommandLine, tmp_path: Path, option: str, message: str) -> None:
    run_on_two(cli.words("fit", option), tmp_path, code=2)
    (error,) = errors(tmp_path)
    assert message in error
    assert not list(cli.root.glob("version_*"))


@pytest.mark.parametrize("failing_rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_an_error_on_one_rank_ends_both(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_rank: int
) -> None:
    def check(self: DivergenceCheck, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_rank == failing_rank and trainer.global_step == 2:
            raise ModelError("This one alone.")

    monkeypatch.setattr(DivergenceCheck, "on_before_backward", check)
    run_on_two(cli.words("fit"), tmp_path, code=2)
    assert errors(tmp_path) == ["error: This one alone."]


def test_when_rank_0_is_lost_rank_1_reports_it(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: DivergenceCheck, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_rank == 0 and trainer.global_step == 2:
            os._exit(2)  # ends at once like a killed process, with the exit code expected of both ranks

    monkeypatch.setattr(DivergenceCheck, "on_before_backward", check)
    run_on_two(cli.words("fit"), tmp_path, code=2)
    assert errors(tmp_path) == []
    assert "Process 0 of the run ended before the others" in (tmp_path / "rank1.log").read_text()


@pytest.mark.slow
def test_a_lost_connection_prints_no_stack_of_cpp_frames() -> None:
    script = """
import app
from torch.distributed import TCPStore

server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
client = TCPStore("127.0.0.1", server.port, None, False)
del server
try:
    client.add("key", 1)
except RuntimeError:
    print("lost")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("lost\n", "")


@pytest.mark.parametrize(("codes", "lost"), [((0, 2, 143), False), ((0, 1), True), ((2, -9), True)])
def test_a_launched_process_is_lost_after_a_defect_or_a_kill(
    codes: tuple[int, ...], lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    termination = Termination()
    assert not termination.has_lost_process()
    processes = [SimpleNamespace(poll=lambda code=code: code) for code in (*codes, None)]
    monkeypatch.setattr("app.callbacks.termination.launched_processes", lambda _: processes)
    assert termination.has_lost_process() == lost


@pytest.mark.parametrize(
    ("strategy", "start"),
    [("ddp_fork", None), ("ddp_notebook_find_unused_parameters_true", None), (DDP_STRATEGY, "spawn")],
)
def test_strategies_that_fork_or_spawn_are_refused(strategy: str, start: str | None) -> None:
    values = Namespace(class_path=strategy, init_args=Namespace(start_method=start)) if start else strategy
    with pytest.raises(ArgumentError, match=r"Use ddp\."):
        check_strategy(values)


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        "ddp",
        "ddp_find_unused_parameters_true",
        DDP_STRATEGY,
        "lightning.pytorch.strategies.SingleDeviceStrategy",
    ],
)
def test_other_strategies_are_accepted(strategy: str) -> None:
    check_strategy(Namespace(class_path=strategy) if "." in strategy else strategy)
    check_strategy("somebody.elses.Strategy")
