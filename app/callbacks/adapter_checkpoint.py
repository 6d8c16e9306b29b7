"""Best and last checkpoint of a run, from which training continues bit for bit."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from app.callbacks.adapter_averaging import TRAINED, TrainedWeightAveraging
from app.callbacks.termination import Termination
from app.console import seconds_text
from app.run.checkpoint_io import (
    BEST,
    CHECKPOINTS,
    LAST,
    checkpoint_problem,
    saved_step,
    structure_problem,
)
from app.run.trainers import find_callback
from datamodules.base import ResumableDataModule
from datamodules.errors import CallbackError, CheckpointError, counted

_log = logging.getLogger(__name__)


class AdapterCheckpoint(ModelCheckpoint):
    """Keep `best.ckpt`, `last.ckpt` and, as `previous.ckpt`, the previous last.ckpt in the run directory.

    The module chooses which weights a checkpoint holds (`AdaptedModule.saved_state`: factors, head, buffers, never the
    frozen backbone). Lightning adds optimizer, schedule and the loader's position. This callback adds every rank's
    random-number state, which is restored just before the first training step after a resume.

    Args:
        monitor: Metric that decides which checkpoint is best. With None, the newest checkpoint is the best.
        mode: `max` if a larger metric is better, `min` if a smaller metric is better. Of checkpoints with equal values,
            the newest is the best: with few validation rows equal values are common, and later steps have learned more.
        last_every_n_steps: Number of optimizer steps between two saves of last.ckpt, at least 1. last.ckpt is also
            saved at a stop, after each validation in mid-epoch, at each epoch's end, and one step before both. A kill
            during a validation thus loses at most one step.
    """

    def __init__(
        self, monitor: str | None = "val/acc1", mode: Literal["min", "max"] = "max", last_every_n_steps: int = 200
    ) -> None:
        if last_every_n_steps < 1:
            raise CallbackError(f"checkpoint.last_every_n_steps: {last_every_n_steps} must be 1 or more.")
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename="best",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.last_every_n_steps = last_every_n_steps
        self._random_state: dict[str, Any] | None = None
        self._best_problem: str | None = None
        self._last_saved_step = -1
        self._events_due = False
        self._has_trained = False
        self._stop_delayed = False  # a requested stop waits for the end of the optimizer step
        self._limit_val_batches: int | float | None = None  # the trainer's value, while validation is switched off

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the folder of the checkpoints before the first step."""
        self.dirpath = str(Path(trainer.default_root_dir) / CHECKPOINTS)
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                Path(self.dirpath).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"Checkpoints cannot be written to {self.dirpath} ({error.strerror}). Make the directory writable, "
                    "or choose another trainer.default_root_dir."
                ) from error
        super().setup(trainer, pl_module, stage)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Return True if a value is better than the best value, or equal."""
        is_equal = current is not None and current == self.best_model_score
        return super().check_monitor_top_k(trainer, current) or trainer.strategy.reduce_boolean_decision(bool(is_equal))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, also if the run directory has moved or its path is spelt differently.

        If best.ckpt is not usable (`on_load_checkpoint` checks), the best checkpoint from here on is kept.
        """
        here = Path(str(self.dirpath))

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        paths = {key: moved(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        models = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": models, "dirpath": self.dirpath})
        if self.best_model_path and self._best_problem:
            _log.warning(f"{here / BEST} {self._best_problem}. The best checkpoint from here on is kept.")
            self.best_model_path = self.kth_best_model_path = ""
            self.best_k_models, self.best_model_score = {}, None
            self.kth_value = torch.tensor(float("inf" if self.mode == "min" else "-inf"))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save last.ckpt in mid-epoch, and finish the optimizer step before a requested stop.

        Before a validation nothing is saved, since a resumed run would skip the validation. `on_validation_end` or
        `on_train_epoch_end` saves then.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        termination = find_callback(trainer, Termination)
        interrupted = termination is not None and termination.is_requested_on_any_rank(trainer)
        if not _is_step_end(trainer, batch_idx):
            # Lightning would stop here and lose the gradients accumulated so far
            self._stop_delayed |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._stop_delayed
        self._stop_delayed = False
        stops = interrupted or _stops_here(trainer)
        if not trainer.is_last_batch and not _validates_within(trainer, batch_idx, batch_idx):
            accumulated = trainer.accumulate_grad_batches
            batches_left = trainer.num_training_batches - (batch_idx + 1)
            due = trainer.global_step % self.last_every_n_steps == 0 or batches_left <= accumulated or stops
            # a kill during the next validation then loses one step at most
            due = due or _validates_within(trainer, batch_idx + 1, batch_idx + accumulated)
            if due and trainer.global_step > self._last_saved_step:
                self._save_last(trainer)
        if _stops_here(trainer) and not _validates_within(trainer, batch_idx, batch_idx):
            # Lightning validates once more when a callback stops the fit. An uninterrupted run would not validate.
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        if termination is not None and interrupted:
            termination.stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save best.ckpt when it is due, and last.ckpt after a validation in mid-epoch."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or trainer.is_last_batch:
            return
        if _is_step_end(trainer, trainer.fit_loop.batch_idx):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save best.ckpt when it is due, and last.ckpt. Lightning also calls this hook at a stop in mid-epoch."""
        if self._limit_val_batches is not None:
            trainer.limit_val_batches = self._limit_val_batches
            self._limit_val_batches = None
        if not _is_epoch_over(trainer):
            if trainer.global_step > self._last_saved_step and _is_step_end(trainer, trainer.fit_loop.batch_idx):
                with _epoch_not_counted(trainer):  # a callback requested the stop after `on_train_batch_end`
                    self._save_last(trainer)
            return
        super().on_train_epoch_end(trainer, pl_module)
        self._save_last(trainer)
        termination = find_callback(trainer, Termination)
        if termination is not None and termination.is_requested_on_any_rank(trainer):
            termination.stop(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log a stop in mid-epoch, or that nothing was left to train. Warn if no validation has run."""
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        epochs: Any = trainer.fit_loop.epoch_progress.current
        last = Path(str(self.dirpath)) / LAST
        if not self._has_trained:
            timer = find_callback(trainer, Timer)
            left = None if timer is None else timer.time_remaining()
            time_limit = None if timer is None or left is None else seconds_text(timer.time_elapsed() + left)
            limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps, "max_time": time_limit}
            _log.info(nothing_left(epochs.processed, trainer.global_step, limits))
            return
        if not _is_epoch_over(trainer) and last.is_file():
            _log.info(
                f"Training stopped in mid-epoch, after {counted(trainer.global_step, 'step')}. --ckpt_path {last} "
                "resumes it."
            )
        if not self.best_model_path:
            _log.warning(
                f"No validation has run, so there is no {BEST}: the adapter has the last step's weights. Validate with "
                f"`validate --ckpt_path {last}`, or train on until the next scheduled validation."
            )

    def _save_last(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._last_saved_step = trainer.global_step
            path = Path(str(self.dirpath)) / LAST
            trainer.save_checkpoint(path, weights_only=False)
            if (termination := find_callback(trainer, Termination)) is not None:
                termination.checkpoint = path

    # --------------------------------------------------------------------------------------------- random numbers

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random-number states of all ranks, and flush TensorBoard's earlier events to disk."""
        _write_events(trainer)
        self._events_due = True  # the events of this step are logged later
        states: list[Any] = [_random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, _random_state())
        checkpoint["random_states"] = states
        checkpoint["samples_a_step"] = _samples_a_step(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's random-number state. If the number of ranks has changed, no state is restored.

        Raises:
            CheckpointError: If the ranks have chosen different checkpoints, or the checkpoint cannot be restored.
        """
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if is_fit:
            _check_progress(trainer, checkpoint)
            _repair_epoch_counts(trainer, checkpoint)
            _warn_of_changes(trainer, checkpoint)
        states = checkpoint.get("random_states", [])
        self._random_state = states[trainer.global_rank] if len(states) == trainer.world_size else None
        step = checkpoint.get("global_step", 0)
        chosen = f"{Path(str(trainer.ckpt_path)).name} of step {step}"
        first = trainer.strategy.broadcast(chosen)
        if not trainer.strategy.reduce_boolean_decision(chosen == first):
            other = (
                "another process took another" if chosen == first else f"process {trainer.global_rank} took {chosen}"
            )
            raise CheckpointError(
                f"ckpt_path: the processes do not see the same checkpoints: process 0 took {first}, {other}. Let "
                "the processes share the run directory, or name a file."
            )
        problem = self._problem_of_best(step) if is_fit and trainer.is_global_zero else None
        self._best_problem = trainer.strategy.broadcast(problem)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue at the checkpoint's position in the epoch, counted in batches of this run."""
        super().on_train_start(trainer, pl_module)
        self._has_trained = True
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.ready == epochs.processed:  # type: ignore[attr-defined]
            # with max_steps, Lightning would mistake the start of an epoch for the end of the previous epoch
            trainer.fit_loop.epoch_loop.restarting = False
        if isinstance(data := trainer.datamodule, ResumableDataModule):  # type: ignore[attr-defined]
            data.match_progress()

    def _problem_of_best(self, step: int) -> str | None:
        """Return why best.ckpt cannot be kept by a run that resumes from a step; None if it can be kept."""
        best = Path(str(self.dirpath)) / BEST
        problem = checkpoint_problem(best)
        step_of_best = saved_step(best) if problem is None else None
        if step_of_best is not None and step_of_best > step:
            return f"is of step {step_of_best}, ahead of {step}, from which the run is resumed"
        return problem

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the random-number state as late as possible, since earlier hooks may draw random numbers."""
        if self._events_due:
            _write_events(trainer)
            self._events_due = False
        if self._random_state is not None:
            _set_random_state(self._random_state)
            self._random_state = None


def nothing_left(epochs: int, steps: int, limits: Mapping[str, Any]) -> str:
    """Return the message of a resumed run that has nothing left to train.

    Args:
        epochs: Number of epochs that are done.
        steps: Number of steps that are done.
        limits: Values of the trainer's limits by key. None and -1 set no limit.
    """
    done = f"Nothing left to do: {counted(epochs, 'epoch')} and {counted(steps, 'step')} are done."
    named = [f"trainer.{key} is {value}" for key, value in limits.items() if value not in (None, -1)]
    remedy = "Raise this value" if len(named) == 1 else "Raise these values"
    return f"{done} {' and '.join(named)}. {remedy} to train on." if named else done


def _warn_of_changes(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Warn if training resumes from averaged weights, or with another number of samples a step."""
    if TRAINED in checkpoint and find_callback(trainer, TrainedWeightAveraging) is None:
        _log.warning(
            "ckpt_path: the weights of the checkpoint are averages, and this run has no callback that averages. "
            "Training continues from the averages. Add the callback to continue from the trained weights."
        )
    saved, current = checkpoint.get("samples_a_step", 0), _samples_a_step(trainer)
    if saved and current and saved != current:
        batches = trainer.world_size * trainer.accumulate_grad_batches
        advice = f": with the learning rates as they are, --data.batch_size {saved // batches} trains as before"
        _log.warning(
            f"The batch of a step is {counted(current, 'sample')} now and was "
            f"{saved}{'' if saved % batches else advice}."
        )


def _is_step_end(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return True if a batch completes an optimizer step; otherwise gradients accumulate."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def _is_epoch_over(trainer: L.Trainer) -> bool:
    """Return True if no batch of the epoch is left."""
    ready: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return trainer.is_last_batch or ready >= trainer.num_training_batches


def _stops_here(trainer: L.Trainer) -> bool:
    """Return True if Lightning ends the fit after this step: at max_steps, or because a callback requested the stop."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    epochs: Any = trainer.fit_loop.epoch_progress.current
    may_stop = epochs.processed >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return bool(trainer.should_stop and may_stop)


def _validates_within(trainer: L.Trainer, first: int, last: int) -> bool:
    """Return True if Lightning's schedule has a validation after any of the batches `first` to `last` of the epoch."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or every is None:  # None: validation by time
        return False
    if epochs is not None and (trainer.current_epoch + 1) % epochs != 0:
        return False
    # without check_val_every_n_epoch the batches of all epochs are counted together
    batches_before = trainer.fit_loop.total_batch_idx - trainer.fit_loop.batch_idx if epochs is None else 0
    return (batches_before + last + 1) // every > (batches_before + first) // every


def _check_progress(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Check that the counters, the callbacks' states and the random numbers of a checkpoint can be restored.

    Raises:
        CheckpointError: If a part cannot be restored. The message names the first such part.
    """
    saved, data = checkpoint["callbacks"], trainer.datamodule  # type: ignore[attr-defined]
    parts = {"loops": ({"fit_loop": trainer.fit_loop.state_dict()}, checkpoint["loops"])}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in saved:
            parts[f"callbacks.{type(callback).__name__}"] = (callback.state_dict(), saved[callback.state_key])
    problems = (structure_problem(expected, state, where) for where, (expected, state) in parts.items())
    problem = next((problem for problem in problems if problem is not None), None)
    if isinstance(data, ResumableDataModule) and type(data).__qualname__ not in checkpoint:
        problem = problem or f"{type(data).__qualname__}, the position in the data, is missing"
    now = _random_state()
    try:
        for state in checkpoint.get("random_states", []):
            _set_random_state(state)
    except Exception:  # torch, NumPy and Python raise different kinds of errors
        problem = problem or "random_states are no states of random numbers"
    finally:
        _set_random_state(now)
    if problem is not None:
        raise CheckpointError(
            f"ckpt_path: {trainer.ckpt_path} cannot be resumed: {problem}. Use another checkpoint of the run."
        )


def _repair_epoch_counts(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Correct Lightning's counts of epochs by the position in the data, before Lightning restores them.

    - A checkpoint at an epoch's end is written before that epoch counts as completed.
    - Earlier versions counted the epoch in the checkpoint of a run that max_steps or a callback stopped in mid-epoch.
    - A run with more epochs than trainer.max_epochs has nothing left to train. Lightning would raise an error.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    position = checkpoint.get(type(trainer.datamodule).__qualname__, {})  # type: ignore[attr-defined]
    for counts in (progress["total"], progress["current"]):
        if counts["ready"] == counts["processed"]:
            if position.get("samples"):
                counts["processed"] -= 1
            counts["completed"] = counts["processed"]
    if (max_epochs := trainer.max_epochs) not in (None, -1):
        progress["current"]["completed"] = min(progress["current"]["completed"], max_epochs)


@contextmanager
def _epoch_not_counted(trainer: L.Trainer) -> Iterator[None]:
    """Undo, for a checkpoint in mid-epoch, that Lightning has counted the unfinished epoch."""
    progress = trainer.fit_loop.epoch_progress
    for counts in (progress.total, progress.current):
        counts.processed -= 1  # type: ignore[attr-defined]
    try:
        yield
    finally:
        progress.increment_processed()


def _samples_a_step(trainer: L.Trainer) -> int:
    """Return the number of samples of an optimizer step over all ranks; 0 for a data module of another program."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    batch = data.batch_size if isinstance(data, ResumableDataModule) else 0
    return batch * trainer.world_size * trainer.accumulate_grad_batches


def _write_events(trainer: L.Trainer) -> None:
    """Flush TensorBoard's events, which are buffered for up to two minutes. A kill would otherwise leave a gap."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()


def _random_state() -> dict[str, Any]:
    """Return the states of torch (CPU, all CUDA devices), NumPy and Python, in types that `weights_only` loads."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
