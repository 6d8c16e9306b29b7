"""All of a trainer that a data module looks at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def _alone(value: Any = None) -> Any:
    return value


def stub_trainer(
    world: int = 1, rank: int = 0, *, epoch: int = 0, batches_done: int = 0, epoch_batches: int = 100, **keys: Any
) -> Any:
    """A trainer of one process among several, in the middle of an epoch; keys replace or add attributes."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=batches_done))
    attributes = {
        "world_size": world,
        "global_rank": rank,
        "local_rank": rank,
        "is_global_zero": rank == 0,
        "strategy": SimpleNamespace(broadcast=_alone, root_device=torch.device("cpu"), reduce_boolean_decision=_alone),
        "_accelerator_connector": SimpleNamespace(use_distributed_sampler=False),
        "fit_loop": SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        "num_training_batches": epoch_batches,
        "current_epoch": epoch,
        "state": SimpleNamespace(fn="fit"),
    }
    return SimpleNamespace(**{**attributes, **keys})


def text_model(tokenizer: Any, class_names: list[str] | None = None, position_limit: int | None = None) -> Any:
    """All of a text model that a data module looks at."""
    return SimpleNamespace(tokenizer=tokenizer, class_names=class_names, position_limit=position_limit)
