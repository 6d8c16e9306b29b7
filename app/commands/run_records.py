"""Records of runs: configuration and metrics of each run directory, read without its checkpoints."""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError

from app.config.precedence import dotted
from app.config.variants import variant_name
from app.config.yaml_files import read_yaml
from app.run.checkpoint_io import CHECKPOINTS
from app.run.evaluations import METRICS, SECONDS, read_metrics
from app.run.run_directory import LOCK, VERSION

CONFIG = "config.yaml"
LARGEST = 1e300  # integers of JSON have no limit, and floats do
State = Literal["finished", "running", "unfinished", "failed", "evaluated", "damaged"]
STATES: Mapping[State, str] = {
    "finished": "the fit has ended",
    "running": "a process trains in the run directory now",
    "unfinished": "the fit was stopped, and a checkpoint is there to resume",
    "failed": "the fit ended before its first checkpoint",
    "evaluated": "test, validate or predict without a fit",
    "damaged": "config.yaml or metrics.json cannot be read",
}


@dataclass(frozen=True)
class RunRecord:
    """Configuration and metrics of a run.

    Args:
        directory: The run directory.
        state: One of `STATES`.
        keys: Values of config.yaml by dotted key; empty without a readable file.
        metrics: Content of metrics.json; empty without a readable file.
        date: Time at which config.yaml was written, at the fit's start or at its last resumption with changed keys.
            Without config.yaml, the time at which a file was last added to the directory or removed.
    """

    directory: Path
    state: State
    keys: dict[str, Any]
    metrics: dict[str, Any]
    date: datetime

    @property
    def variant(self) -> str | None:
        """Name of the built-in variant, or `custom`; None without a configuration."""
        return variant_name(self.keys) if self.keys else None

    @property
    def best(self) -> tuple[str, float] | None:
        """Metric that chose the best checkpoint, and the best value; None if nothing was validated."""
        name = next((name for name in self.metrics if name.startswith("best/")), "")
        value = self.number(name)
        return None if value is None else (name.removeprefix("best/"), value)

    def number(self, name: str) -> int | float | None:
        """Return a metric; None if the value is missing, no number, or too large to show."""
        value: Any = self.metrics.get(name)
        return value if type(value) in (int, float) and abs(value) < LARGEST else None


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the run directories at and below a root, in natural order of their names.

    A run directory is named version_K, or holds config.yaml beside other files of a run.
    """
    for folder, folders, files in os.walk(root):
        is_version = VERSION.fullmatch(os.path.basename(os.path.abspath(folder)))
        if is_version or (CONFIG in files and {METRICS, LOCK, CHECKPOINTS} & {*files, *folders}):
            folders.clear()
            yield Path(folder)
        folders.sort(key=natural_order)


def natural_order(name: str) -> list[str | int]:
    """Return a key that sorts version_9 before version_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def read_record(directory: Path) -> RunRecord:
    """Read the record of a run. Missing and damaged files determine its state."""
    metrics = read_metrics(directory)
    is_damaged = (directory / METRICS).exists() and not metrics
    keys: dict[str, Any] = {}
    dated = directory
    if (directory / CONFIG).exists():
        dated = directory / CONFIG
        try:
            keys = dotted(read_yaml(str(dated)))
        except ArgumentError:
            is_damaged = True
    state = "damaged" if is_damaged else _state(directory, keys, metrics)
    return RunRecord(directory, state, keys, metrics, datetime.fromtimestamp(dated.lstat().st_mtime))


def _state(directory: Path, keys: Mapping[str, Any], metrics: Mapping[str, Any]) -> State:
    if _is_locked(directory / LOCK):
        return "running"
    if not keys:  # a fit writes config.yaml before its first step
        results = [p for p in directory.iterdir() if not p.name.startswith((".", "events."))]
        return "evaluated" if results else "failed"
    if SECONDS in metrics:
        return "finished"
    return "unfinished" if any((directory / CHECKPOINTS).glob("*.ckpt")) else "failed"


def _is_locked(path: Path) -> bool:
    """Return True if another process holds the lock of a run.

    The query takes no lock. Do not call this function in the process that holds the lock: closing the file would
    release the lock.
    """
    query = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # Linux's struct flock
    try:
        with path.open("rb") as file:
            reply = fcntl.fcntl(file, fcntl.F_GETLK, query)
    except OSError:  # no such file, no locks on this file system, or another system than Linux
        return False
    return bool(struct.unpack_from("h", reply)[0] != fcntl.F_UNLCK)
