"""Provenance of metrics: which checkpoint, data and settings each evaluation of a run belongs to.

metrics.json has the newest figures by name and nothing else. RUN/evaluations.json lists every `validate` and `test` of
the run with the checkpoint's step, the keys that differ from the checkpoint's, and the metrics. A checkpoint holds the
metrics of the validation at its step, in the state of `RunSummary`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeGuard

from jsonargparse import Namespace

from app.constructors import constructor_parameters
from app.imports import same_class
from datamodules.atomic import atomic_write

FILE, METRICS = "evaluations.json", "metrics.json"
SPLITS = ("val", "test")
STATE = "RunSummary"  # Lightning's key of the callback's state in a checkpoint
# Keys of `model` and `data` that change no metric of an evaluation. A fingerprint in the checkpoint checks the weights.
_WITHOUT_EFFECT = {
    "model": {
        *("backbone", "weights", "adapter_path", "learning_rate", "weight_decay", "schedule", "warmup_ratio"),
        *("optimizer", "lr_ratio_b", "lr_ratio_head", "lr_ratio_role", "label_smoothing"),
        *("shard_frozen", "compile", "gradient_checkpointing"),
    },
    "data": {
        *("batch_size", "num_workers", "predict_path", "prediction_format", "memory_limit_gb", "cache_prefix"),
        *("crop_scale", "horizontal_flip", "packing"),
    },
}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one split, and what they were computed with.

    Args:
        split: `val` or `test`.
        step: Optimizer steps of the checkpoint that was evaluated.
        differences: Keys by which the evaluation differs from the checkpoint's own data and settings; () if none.
        metrics: Finite values by full name, `test/acc1`.
    """

    split: str
    step: int
    differences: tuple[str, ...]
    metrics: dict[str, float]


def compare_configurations(saved: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """Return the keys of `model` and `data` that can change a metric and differ between a checkpoint and an evaluation.

    Args:
        saved: The sections that a checkpoint was trained with, as `saved_configuration` gives them.
        used: The sections of the evaluation, whose classes are imported.
    """
    different: list[str] = []
    for section in [section for section in _WITHOUT_EFFECT if section in saved and section in used]:
        before, now = saved[section], used[section]
        if not same_class(before["class_path"], now["class_path"]):
            different.append(section)
            continue
        # an earlier version's checkpoint lacks the keys that came later
        first, second = (_with_defaults(now["class_path"], values["init_args"]) for values in (before, now))
        keys = sorted({*first, *second} - _WITHOUT_EFFECT[section])
        different += [f"{section}.{key}" for key in keys if _canonical(first.get(key)) != _canonical(second.get(key))]
    return different


def _with_defaults(class_path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a class, with the defaults of those that are missing, in groups of keys too."""
    complete: dict[str, Any] = dict(values)
    for name, parameter in constructor_parameters(resolve_name(class_path)).items():
        default = None if parameter.default is parameter.empty else parameter.default
        given = complete.setdefault(name, default)
        if isinstance(given, Mapping) and is_dataclass(default) and not isinstance(default, type):
            complete[name] = asdict(default) | dict(given)
    return complete


def _canonical(value: Any) -> str:
    """Return one text for a value of a parser, a dataclass or a checkpoint."""

    def plain(other: Any) -> Any:
        if isinstance(other, Namespace):
            return other.as_dict()
        return asdict(other) if is_dataclass(other) and not isinstance(other, type) else str(other)

    return json.dumps(value, sort_keys=True, default=plain)


def metrics_of_split(metrics: Mapping[str, Any], split: str) -> dict[str, float]:
    """Return the finite metrics of a split; names of another form than this program's are left out."""
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(key, str) and re.fullmatch(rf"{split}/[\w/.@-]{{1,100}}", key)
        if type(value) in (int, float) and math.isfinite(value)
    }


def read_metrics(run: Path) -> dict[str, Any]:
    """Return the content of a run's metrics.json; nothing if the file is not there or damaged."""
    content = _read_json(run / METRICS)
    return content if isinstance(content, dict) else {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_evaluations(run: Path) -> list[Evaluation]:
    """Return the evaluations of a run, oldest first; entries of another form are left out."""
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
    """Add an evaluation to those of a run; it replaces an earlier one of the same split, checkpoint and settings."""
    others = [
        old
        for old in read_evaluations(run)
        if (old.split, old.step, old.differences) != (new.split, new.step, new.differences)
    ]
    write_evaluations(run, [*others, new])


def drop_evaluations_after(run: Path, step: int) -> None:
    """Remove the evaluations of checkpoints ahead of a step, from which training goes on."""
    before = read_evaluations(run)
    kept = [evaluation for evaluation in before if evaluation.step <= step]
    if len(kept) < len(before):
        write_evaluations(run, kept)


def evaluations_of_checkpoint(checkpoint: Mapping[str, Any], run: Path | None) -> list[Evaluation]:
    """Return every evaluation of a checkpoint's weights, oldest first; `run` is its run directory, if any."""
    callbacks = checkpoint.get("callbacks")
    state = callbacks.get(STATE) if isinstance(callbacks, Mapping) else None
    evaluations = [_parse(state)] if _is_valid(state) else []
    evaluations += read_evaluations(run) if run is not None else []
    return [evaluation for evaluation in evaluations if evaluation.step == checkpoint.get("global_step")]
