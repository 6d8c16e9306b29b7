"""Provenance of metrics: which checkpoint, data and settings each evaluation of a run belongs to.

metrics.json holds only the newest value of each metric. RUN/evaluations.json lists the evaluations by `validate` and
`test`: the checkpoint's step, the keys whose values differ from the checkpoint's, and the metrics. A repeated
evaluation replaces the earlier entry. A checkpoint holds the metrics of the validation at its step, in the state of
`RunSummary`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from datamodules.atomic import atomic_write

FILE, METRICS = "evaluations.json", "metrics.json"
SECONDS = "time/fit_seconds"  # metrics.json has this key once training has ended, until training is resumed
SPLITS = ("val", "test")
STATE = "RunSummary"  # Lightning's key of the callback's state in a checkpoint


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one split, and the checkpoint and keys with which they were computed.

    Args:
        split: `val` or `test`.
        step: Optimizer steps of the checkpoint that was evaluated.
        differences: Keys whose values differ from the checkpoint's data and settings.
        metrics: Finite values by full name, `test/acc1`.
    """

    split: str
    step: int
    differences: tuple[str, ...]
    metrics: dict[str, float]


def metrics_of_split(metrics: Mapping[str, Any], split: str) -> dict[str, float]:
    """Return the finite metrics of a split.

    After the split, a name has 1 to 100 printable characters, such as `subjects/high school physics`. Other names are
    left out.
    """
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(key, str) and key.isprintable() and re.fullmatch(rf"{split}/.{{1,100}}", key)
        if type(value) in (int, float) and math.isfinite(value)
    }


def read_metrics(run: Path) -> dict[str, Any]:
    """Return the content of a run's metrics.json; empty if the file is missing or damaged."""
    content = _read_json(run / METRICS)
    return content if isinstance(content, dict) else {}


def is_complete(metrics: Mapping[str, Any], tests: bool) -> bool:
    """Return True if metrics.json has the figures of a fit, and of its test if the fit tests."""
    return SECONDS in metrics and (not tests or any(name.startswith("test/") for name in metrics))


def write_metrics(run: Path, metrics: Mapping[str, Any]) -> None:
    """Write a run's metrics.json."""
    with atomic_write(run / METRICS) as file:
        file.write(f"{json.dumps(metrics, indent=2)}\n".encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_evaluations(run: Path) -> list[Evaluation]:
    """Return the evaluations of a run, oldest first. Malformed entries are skipped."""
    content = _read_json(run / FILE)
    return [_parse(entry) for entry in content if _is_valid(entry)] if isinstance(content, list) else []


def _is_valid(entry: Any) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(entry, dict)
        and entry.get("split") in SPLITS
        and type(entry.get("step")) is int
        and isinstance(entry.get("metrics"), dict)
        and isinstance(entry.get("differences"), list | tuple)
    )


def _parse(entry: dict[str, Any]) -> Evaluation:
    differences = tuple(str(key) for key in entry["differences"])
    return Evaluation(entry["split"], entry["step"], differences, metrics_of_split(entry["metrics"], entry["split"]))


def write_evaluations(run: Path, evaluations: list[Evaluation]) -> None:
    """Write the evaluations of a run."""
    with atomic_write(run / FILE) as file:
        content = json.dumps([asdict(evaluation) for evaluation in evaluations], indent=2)
        file.write(f"{content}\n".encode())


def add_evaluation(run: Path, new: Evaluation) -> None:
    """Add an evaluation to a run, and drop an earlier evaluation of the same split, checkpoint and settings."""
    others = [
        old
        for old in read_evaluations(run)
        if (old.split, old.step, old.differences) != (new.split, new.step, new.differences)
    ]
    write_evaluations(run, [*others, new])


def drop_evaluations_after(run: Path, step: int) -> None:
    """Remove the evaluations of checkpoints after a step, when training resumes from this step."""
    evaluations = read_evaluations(run)
    kept = [evaluation for evaluation in evaluations if evaluation.step <= step]
    if len(kept) < len(evaluations):
        write_evaluations(run, kept)


def evaluations_of_checkpoint(checkpoint: Mapping[str, Any], run: Path | None) -> list[Evaluation]:
    """Return every evaluation of a checkpoint's weights, oldest first. `run` is the checkpoint's run directory."""
    callbacks = checkpoint.get("callbacks")
    state = callbacks.get(STATE) if isinstance(callbacks, Mapping) else None
    evaluations = [_parse(state)] if _is_valid(state) else []
    evaluations += read_evaluations(run) if run is not None else []
    return [evaluation for evaluation in evaluations if evaluation.step == checkpoint.get("global_step")]
