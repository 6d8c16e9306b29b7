"""Predict the memory of a fit from its keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from jsonargparse import Namespace

from app.commands.memory_estimate import BatchSize, MemoryEstimate, Precision, fit_memory
from app.config.constructors import construct
from app.config.fit_keys import ParseFit
from datamodules.contract import HasKind
from datamodules.errors import UsageError, counted
from datamodules.sources.findings import Findings
from modules.base import AdaptedModule

if TYPE_CHECKING:  # the recipe decides whether timm is imported
    from modules.image_classification import ImageClassifier


@dataclass(frozen=True)
class Prediction:
    """Memory of a fit, and the setting of the prediction.

    Args:
        estimate: Bytes by part.
        setting: Batch, precision and processes, as text.
        trained: Trained parameters.
        total: All parameters.
        tuning: The key `model.tuning`.
    """

    estimate: MemoryEstimate
    setting: str
    trained: int
    total: int
    tuning: str


def predict(parse_fit: ParseFit, fit_arguments: Sequence[str], classes: int) -> Prediction:
    """Predict the memory of a fit.

    Args:
        parse_fit: Parser of `fit`.
        fit_arguments: Options of `fit`.
        classes: Number of classes of the head, if neither recipe, task nor data give the number.

    Raises:
        UsageError: For options that `fit` refuses, or for data without training rows.
        DataError: If data on this machine are damaged.
        ModelError: If the model cannot be built from its configuration, or its memory cannot be predicted.
    """
    config = parse_fit(fit_arguments)
    size, batch = batch_of(config)
    head = ""
    precision = precision_of(config.trainer.precision)
    processes = processes_of(config)
    keys = config.model.init_args
    if "class_names" in keys and keys.class_names is None:
        names = read_classes(config)
        keys.class_names = [f"class {number}" for number in range(classes)] if names is None else names
        head = f", a head of {counted(len(keys.class_names), 'class')}" if keys.class_names else ", a head of one score"
        head += " (--classes)" if names is None else ""
    keys.adapter.init_a = keys.adapter.init_b = "given"  # no values are drawn
    with torch.device("meta"):
        module = construct(AdaptedModule, config.model)
    counts = module.parameter_counts()
    shares = processes if module.shard_frozen else 1
    if not size.tokens:
        batch += " of {} × {} pixels".format(*cast("ImageClassifier", module).preprocessing["input_size"][1:])
    setting = f"{batch}{head}, precision {precision}"
    if shares > 1:
        setting += f", frozen weights shared by {shares} processes"
    estimate = fit_memory(module, size, precision, shares)
    return Prediction(estimate, setting, counts["params/trainable"], counts["params/total"], module.tuning)


def batch_of(config: Namespace) -> tuple[BatchSize, str]:
    """Return the size of the largest training batch of a fit, and the size as text.

    Raises:
        UsageError: For data without training rows.
    """
    data = resolve_name(config.data.class_path)
    kind = data.kind if isinstance(data, HasKind) else "data of no known kind"
    keys: Any = config.data.init_args
    if kind == "images":
        return BatchSize(keys.batch_size), f"{counted(keys.batch_size, 'image')} a step"
    if kind == "labelled texts":
        text = f"{counted(keys.batch_size, 'text')} a step of {keys.max_length} tokens"
        return BatchSize(keys.batch_size, keys.max_length), text
    if kind == "summaries":
        text = f"{counted(keys.batch_size, 'text')} a step of {keys.max_source_length} tokens"
        size = BatchSize(keys.batch_size, keys.max_source_length, keys.max_target_length)
        return size, f"{text} with summaries of {keys.max_target_length} tokens"
    if kind == "instructions":
        text = f"{counted(keys.batch_size, 'conversation')} a step of {keys.max_length} tokens, all learnt"
        return BatchSize(keys.batch_size, keys.max_length), text
    raise UsageError(
        f"data: {config.data.class_path} gives {kind}, which no task is trained on. Give a recipe for fit."
    )


def read_classes(config: Namespace) -> list[str] | None:
    """Return the classes of the task or else of the training rows, [] for a regression; None if both are unknown.

    The classes of training rows are unknown if the data are not on this machine.

    Raises:
        DataError: If the data are damaged.
    """
    from datamodules.sources.images import open_split
    from datamodules.sources.labels import parse_labels
    from datamodules.text_classification import TASKS

    keys: Any = config.data.init_args
    task = TASKS.get(keys.get("task") or "")
    if task is not None:
        return list(task.class_names)
    if not Path(keys.path).exists():
        return None
    if resolve_name(config.data.class_path).kind == "images":
        folder = str(Path(keys.path, keys.get("environment") or ""))  # the domain to train on, if there are several
        columns = (keys.get("image_column"), keys.get("label_column"))
        table = open_split(folder, "train", *columns, Findings(keys.skip_bad_rows), keys.get("skip_label"))
        return None if table is None else table.class_names
    data: Any = construct(L.LightningDataModule, config.data)
    data.guess_columns()
    return parse_labels(data.training_table(), str(data.label_column), None, data.skip_label).class_names


def precision_of(value: Any) -> Precision:
    """Return the canonical name of a precision. Lightning accepts several names.

    Raises:
        UsageError: For a precision that a fit refuses.
    """
    names: dict[str, Precision] = {
        **dict.fromkeys(("None", "32", "32-true"), "32-true"),
        **dict.fromkeys(("bf16", "bf16-mixed"), "bf16-mixed"),
        **dict.fromkeys(("16", "16-mixed"), "16-mixed"),
    }
    if str(value) not in names:
        raise UsageError(f"trainer.precision: {value} is none of 32-true, bf16-mixed and 16-mixed.")
    return names[str(value)]


def processes_of(config: Namespace) -> int:
    """Return the number of processes of a fit. With `trainer.devices: auto`, count this machine's GPUs."""
    devices = config.trainer.devices
    if isinstance(devices, list):
        count = len(devices)
    else:
        count = int(devices) if str(devices).isdigit() else torch.cuda.device_count()
    return max(count, 1) * int(config.trainer.num_nodes)
