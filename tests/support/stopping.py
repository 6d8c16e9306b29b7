"""A callback that stops the trainer early, as EarlyStopping and Timer do."""

from __future__ import annotations

from typing import Any

import lightning as L


class StopAt(L.Callback):
    """Set `trainer.should_stop` in a hook, once.

    Args:
        hook: Name of the hook.
        batch: Number of the batch in which the trainer is stopped, counted from 1 over all epochs.
    """

    def __init__(self, hook: str = "on_train_batch_end", batch: int = 1) -> None:
        def stop(trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.fit_loop.total_batch_idx + 1 == batch and not trainer.sanity_checking:
                trainer.should_stop = True

        setattr(self, hook, stop)
