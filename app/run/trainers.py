"""Trainers: find a callback, and train or evaluate outside of a run directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import lightning as L
import torch

T = TypeVar("T", bound=L.Callback)


def find_callback(trainer: L.Trainer, kind: type[T]) -> T | None:
    """Return the first callback of a class; None if there is none."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]


def quiet_trainer(**keys: Any) -> L.Trainer:
    """Return a trainer on one device that logs, prints and saves nothing. `keys` are further keys of the trainer."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    return L.Trainer(devices=1, use_distributed_sampler=False, **quiet | keys)


def metrics_of(results: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the results of `trainer.validate` or `trainer.test` by logged name."""
    return {name: float(torch.as_tensor(value)) for result in results for name, value in result.items()}
