"""Find a callback of a trainer by its class."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

T = TypeVar("T", bound=L.Callback)


def find_callback(trainer: L.Trainer, kind: type[T]) -> T | None:
    """Return the first callback of a class; None if there is none."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]
