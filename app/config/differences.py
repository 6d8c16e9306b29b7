"""Differences between the configuration of a checkpoint and the configuration of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace

from app.config.constructors import constructor_parameters
from app.config.imports import same_class

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
# Keys that a checkpoint fixes: no evaluation of the checkpoint can have other values.
_FIXED = ("model.adapter", "model.tuning", "model.backbone_args", "model.class_names")
# Keys that choose the rows of the splits. A prediction of another file does not read them.
_SPLITS = {
    *("path", "config", "revision", "val_fraction", "val_seed", "test_fraction", "test_on_validation"),
    *("max_train_samples", "max_val_samples", "max_test_samples"),
}


def can_change_evaluation(key: str, reads_splits: bool) -> bool:
    """Return True if a dotted key of `model` or `data` can change an evaluation of a checkpoint.

    Args:
        key: The key, such as `data.max_length`.
        reads_splits: False if the rows come from `data.predict_path`.
    """
    section, name = key.split(".")[:2]
    has_no_effect = name in _WITHOUT_EFFECT[section] or f"{section}.{name}" in _FIXED
    return not has_no_effect and (reads_splits or section == "model" or name not in _SPLITS)


def compare_configurations(saved: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """Return the keys of `model` and `data` that can change a metric and differ between a checkpoint and an evaluation.

    If the classes of a section differ, return the name of the section in place of its keys.

    Args:
        saved: The sections that a checkpoint was trained with, as `saved_configuration` gives them.
        used: The sections of the evaluation. Their classes must be imported already.
    """
    different: list[str] = []
    for section in [section for section in _WITHOUT_EFFECT if section in saved and section in used]:
        before, now = saved[section], used[section]
        if not same_class(before["class_path"], now["class_path"]):
            different.append(section)
            continue
        # A checkpoint of an earlier version lacks newer keys.
        first, second = (_with_defaults(now["class_path"], values["init_args"]) for values in (before, now))
        keys = sorted({*first, *second} - _WITHOUT_EFFECT[section])
        different += [f"{section}.{key}" for key in keys if _canonical(first.get(key)) != _canonical(second.get(key))]
    return different


def _with_defaults(class_path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a class. Add the defaults of missing arguments, also inside groups of keys."""
    complete: dict[str, Any] = dict(values)
    for name, parameter in constructor_parameters(resolve_name(class_path)).items():
        default = None if parameter.default is parameter.empty else parameter.default
        argument = complete.setdefault(name, default)
        if isinstance(argument, Mapping) and is_dataclass(default) and not isinstance(default, type):
            complete[name] = asdict(default) | dict(argument)
    return complete


def _canonical(value: Any) -> str:
    """Return a value as JSON. Equal values of a parser, a dataclass and a checkpoint have the same JSON."""

    def plain(other: Any) -> Any:
        if isinstance(other, Namespace):
            return other.as_dict()
        return asdict(other) if is_dataclass(other) and not isinstance(other, type) else str(other)

    return json.dumps(value, sort_keys=True, default=plain)
