"""Run a command in two distributed processes. Both are forked from the test, so that nothing is imported twice."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.utilities import rank_zero_only

from app.cli import main

DDP = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]


def run_on_two(words: list[str], logs: Path, code: int = 0) -> None:
    """Run a command in two ranks that find each other by environment variables, as on a cluster.

    Args:
        words: The command line. `DDP` is appended.
        logs: Folder for the output of each rank, `rank0.log` and `rank1.log`.
        code: Expected exit code of both ranks.
    """
    port = str(find_free_network_port())
    context = multiprocessing.get_context("fork")
    files = [logs / f"rank{rank}.log" for rank in (0, 1)]
    processes = [
        context.Process(target=_work, args=([*words, *DDP], rank, port, file)) for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()  # a rank whose peer is dead may wait forever
        process.join()
    output = "\n".join(file.read_text()[-3000:] for file in files if file.is_file())
    assert [process.exitcode for process in processes] == [code, code], output


def _work(words: list[str], rank: int, port: str, log: Path) -> None:
    place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    rank_zero_only.rank = rank  # Lightning has read the rank from the environment of the test, at its import
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            sys.exit(main(words))
        except Exception:
            traceback.print_exc()
            raise
