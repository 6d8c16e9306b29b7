"""Loaders of every data module: they split among processes and continue where a checkpoint left them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset

from datamodules.contract import DataKind, HasClasses, HasFrozenPrefix, Prefix
from datamodules.errors import DataError
from datamodules.loading.batching import ORDER, EpochSampler
from datamodules.loading.length_effect import strong_effect
from datamodules.loading.prefix_cache import HiddenStates, WithHidden, filling_order, hidden_states
from datamodules.sources.findings import Findings

_log = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]
BEAT = 20.0  # seconds; a process group gives up after 10 minutes or more


@runtime_checkable
class DigestedRows(Protocol):
    """A data set whose rows can be compared with those of an earlier run."""

    def rows_digest(self) -> str:
        """Return a digest of all rows, their order and their labels included."""


class ResumableDataModule(L.LightningDataModule):
    """Loaders for training and evaluation.

    The position in training is part of the data module's own state, (epoch, samples done), which needs no loader to
    cooperate: it is the same with any number of workers, and Lightning restores it before it builds the loaders.
    Resumed with another batch size or number of processes, an epoch goes on at the same place, rounded down to a whole
    batch, and with the last one if none is left; with length buckets, whose order depends on the batch, some samples of
    that one epoch then come twice and others not.

    A checkpoint also has a digest of the training rows. If rows were removed, added, edited or put in another order
    since, a checkpoint in mid-epoch is refused, for nobody knows which rows of that epoch are left. At an epoch's end
    the change is logged, and training goes on with the new rows. Checkpoints of earlier versions have no digest.

    Args:
        batch_size: Samples a step and process, at least 1.
        num_workers: Processes that load, for each process that trains; 0 loads in the training process, which is fast
            enough for tokens and small images.
        skip_bad_rows: Rows of each split that may be skipped because they cannot be used, 0 or more; one more is an
            error.
    """

    kind: DataKind
    cache_prefix = False  # whether a fit reads what the model's frozen prefix makes of its rows; a task's own key

    def __init__(self, batch_size: int = 32, num_workers: int = 0, skip_bad_rows: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()  # those of the task too
        if batch_size < 1 or num_workers < 0:
            raise DataError("data.batch_size must be 1 or more, and data.num_workers 0 or more.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.findings = Findings(skip_bad_rows)
        self.kept_states: dict[str, HiddenStates] = {}  # output of the model's frozen prefix, by split
        self._seed: int | None = None
        self._position: dict[str, Any] = {}
        self._rows_digest: dict[str, Any] = {}  # digest and number of the training rows
        self._digest_before: dict[str, Any] = {}  # those of the checkpoint that is resumed
        self._resumed_at: float | None = None  # batches of the epoch that are done; infinite when it is over

    def world(self) -> tuple[int, int]:
        """Number of processes, and which is this one."""
        trainer = self.trainer
        assert trainer is not None
        return trainer.world_size, trainer.global_rank

    @property
    def model_classes(self) -> list[str] | None:
        """Return the class names of the trainer's model; None if the model does not know them."""
        assert self.trainer is not None
        model = self.trainer.lightning_module
        return list(model.class_names) if isinstance(model, HasClasses) and model.class_names is not None else None

    @contextmanager
    def first_process_first(self) -> Iterator[Callable[[], None]]:
        """Let a node's first process fill the caches (downloads, tokenised texts) that the others then read.

        Gives a function to call now and then while they are filled: the others wait in a collective operation, which
        fails when it takes as long as the process group's timeout, and each `BEAT` seconds gets them into a new one.
        """
        trainer = self.trainer
        assert trainer is not None
        first, all_done = trainer.local_rank == 0, trainer.strategy.reduce_boolean_decision
        before = time.monotonic()

        def beat() -> None:
            nonlocal before
            if first and time.monotonic() - before >= BEAT:
                all_done(False)
                before = time.monotonic()

        def wait() -> None:
            while not all_done(True):
                pass

        if not first:
            wait()
        try:
            yield beat
        finally:  # an error is every process's own
            if first:
                wait()

    def failed_rows(self, file: int) -> list[dict[str, Any]]:
        """Return the rows of a file that cannot be predicted: `index`, and `error` with the reason.

        Args:
            file: Number of the loader that the file is of.
        """
        return []

    @property
    def caches(self) -> bool:
        """Return True in a fit with `cache_prefix`; what reads each row once has nothing to gain."""
        assert self.trainer is not None
        return self.cache_prefix and self.trainer.state.fn == "fit"

    def frozen_prefix(self) -> Prefix:
        """Return the frozen prefix of the trainer's model.

        Raises:
            DataError: If the model does not say what its frozen prefix is.
            ModelError: If the model has none.
        """
        assert self.trainer is not None
        model = self.trainer.lightning_module
        if not isinstance(model, HasFrozenPrefix):
            raise DataError("data.cache_prefix: the model does not say what its frozen prefix is; set it to false.")
        return model.frozen_prefix()

    def cached(
        self,
        name: str,
        dataset: Dataset[Any],
        rows_key: str,
        lengths: Tensor | None,
        filling: Collate | None,
        collate: Collate,
    ) -> WithHidden:
        """Return the function that makes batches with the output of the model's frozen prefix.

        Args:
            name: Of the split.
            dataset: Its rows as the model takes them.
            rows_key: Another one for other rows.
            lengths: Their lengths in tokens; None if all have as many.
            filling: Makes the batches that the prefix gets; None stacks them.
            collate: Makes all of a batch that is not from the prefix.
        """
        assert self.trainer is not None
        rows = range(len(dataset)) if lengths is None else filling_order(lengths).tolist()  # type: ignore[arg-type]
        loader = self._loader(dataset, rows, filling)
        with self.first_process_first() as beat:
            prefix = self.frozen_prefix()
            self.kept_states[name] = hidden_states(self.trainer, prefix, loader, lengths, rows_key, name, beat)
        return WithHidden(collate, self.kept_states[name])

    def train_loader(
        self,
        dataset: Dataset[Any],
        lengths: Tensor | None = None,
        collate: Collate | None = None,
        labels: Tensor | None = None,
    ) -> DataLoader[Any]:
        """Return a loader that shuffles by the run's seed, in whole batches, from the position of a resumed checkpoint.

        Args:
            dataset: The samples.
            lengths: Their lengths, if samples of like length are to share a batch.
            collate: Makes a batch of samples; None stacks them.
            labels: Their classes or scores, if batches by length are to keep the label mix of the data.

        Raises:
            DataError: If there is not one whole batch for each process, or if the rows have changed since a checkpoint
                of mid-epoch.
        """
        world, rank = self.world()
        size = len(dataset)  # type: ignore[arg-type]
        self._rows_digest = {"rows": dataset.rows_digest(), "size": size} if isinstance(dataset, DigestedRows) else {}
        self._compare_rows()
        if size < self.batch_size * world:
            raise DataError(
                f"data.batch_size: {size} training samples are fewer than one batch of {self.batch_size} × {world} "
                "processes; choose a smaller batch."
            )
        if self._seed is None:
            assert self.trainer is not None
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed()))
        if lengths is not None and labels is not None and rank == 0 and (effect := strong_effect(lengths, labels)):
            _log.warning(
                "data.bucket_by_length: the length of a training text tells much about its label (%s). A model can "
                "learn the length instead of the text, and length buckets save little padding here, because each batch "
                "keeps the label mix. --data.bucket_by_length false draws batches regardless of length.",
                effect,
            )
        sampler = EpochSampler(size, world, rank, self.batch_size, self._seed, lengths, labels)
        if self._position:
            if self._position["samples"] and self._position["order"] != ORDER:
                _log.warning(
                    "ckpt_path: another version of this program wrote the checkpoint in mid-epoch, and shuffled in "
                    "another order. In the rest of this epoch some samples come twice and others not at all."
                )
            # in samples, since another batch size or number of processes may go on from there
            batches = min(self._position["samples"] // (self.batch_size * world), sampler.batches - 1)
            self._resumed_at = batches if self._position["samples"] else math.inf
            sampler.seek(self._position["epoch"], batches)
            self._position = {}
        return self._loader(dataset, sampler, collate)

    def evaluation_loader(
        self, dataset: Dataset[Any], lengths: Tensor | None = None, collate: Collate | None = None
    ) -> DataLoader[Any]:
        """Return a loader of every sample once, on whichever process: no sample is repeated to make the shares equal.

        In order; or with lengths in batches of like length, so that little is padding: the longest batch first, which
        shows at once whether it fits, and the others in an order that is shuffled but always the same.
        """
        world, rank = self.world()
        size = len(dataset)  # type: ignore[arg-type]
        if size < world:
            raise DataError(f"{size} samples to evaluate are fewer than the {world} processes; use fewer processes.")
        if lengths is None:
            return self._loader(dataset, range(rank, size, world), collate)
        step = self.batch_size * world
        first, *others = lengths.argsort(descending=True, stable=True).split(step)
        rest = [others.pop()] if others and len(others[-1]) < step else []  # smaller batches stay the last
        shuffled = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).tolist()
        own = [batches[rank::world] for batches in (first, *(others[i] for i in shuffled), *rest)]
        return self._loader(dataset, torch.cat(own).tolist(), collate)

    def evaluated_training_rows(self) -> tuple[Dataset[Any], Tensor | None, Collate | None]:
        """Return the training rows as they are evaluated, with the lengths and the collation of `evaluation_loader`.

        A task implements this method. The rows are neither augmented nor packed. If the fit has kept the output of the
        frozen prefix for them, the batches hold this output.
        """
        raise NotImplementedError

    def training_sample(self, size: int) -> DataLoader[Any]:
        """Return a loader that evaluates a fixed sample of the training rows.

        The sample depends on the number of training rows and on `size` alone, not on the seed of the run.

        Args:
            size: Most rows, at least the number of processes.
        """
        dataset, lengths, collate = self.evaluated_training_rows()
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        rows = order[:size].sort().values
        sample = Subset(dataset, rows.tolist())
        return self.evaluation_loader(sample, None if lengths is None else lengths[rows], collate)

    def _loader(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler | BatchSampler | range | list[int],
        collate: Collate | None,
    ) -> DataLoader[Any]:
        assert self.trainer is not None
        whole = isinstance(sampler, BatchSampler)
        order = {"batch_sampler": sampler} if whole else {"sampler": sampler, "batch_size": self.batch_size}
        return DataLoader(
            dataset,
            **order,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # or each iterator draws from the global state, used by dropout
        )

    def match_progress(self) -> None:
        """Count the resumed epoch in batches of this run: Lightning goes on counting in those of the checkpoint.

        An epoch that was not over has one batch left at least, without which Lightning would not end it. To be called
        when training starts, before the first batch.
        """
        assert self.trainer is not None
        done: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        if self._resumed_at is not None and done.processed:
            whole = int(self.trainer.num_training_batches)
            place = whole if math.isinf(self._resumed_at) else min(int(self._resumed_at), whole - 1)
            missing = place - done.processed
            done.ready, done.started = done.ready + missing, done.started + missing
            done.processed, done.completed = done.processed + missing, done.completed + missing
        self._resumed_at = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position in training: epoch, samples of it that are done, seed, order, digest of the rows."""
        trainer = self.trainer
        assert trainer is not None
        done: int = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        samples = done * self.batch_size * trainer.world_size
        at_end = done >= trainer.num_training_batches
        position = {"epoch": trainer.current_epoch + at_end, "samples": 0 if at_end else samples, "seed": self._seed}
        return position | {"order": ORDER} | self._rows_digest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a position for the training loader that is to come.

        Raises:
            DataError: If it is no position.
        """
        known = state_dict if isinstance(state_dict, dict) else {}
        numbers = [known.get(key) for key in ("epoch", "samples", "seed")]
        if not all(type(n) is int for n in numbers) or min(numbers[:2]) < 0:  # type: ignore[type-var, operator]
            raise DataError(
                f"ckpt_path: the checkpoint's position in the data is damaged ({state_dict}). Use another checkpoint."
            )
        self._seed = state_dict["seed"]
        self._position = {key: known.get(key) for key in ("epoch", "samples", "order")}
        self._digest_before = {key: known.get(key) for key in ("rows", "size")}

    def _compare_rows(self) -> None:
        """Compare the training rows with those of the checkpoint that is resumed, once.

        Raises:
            DataError: If the rows differ and the checkpoint is from mid-epoch.
        """
        now, before, self._digest_before = self._rows_digest, self._digest_before, {}
        if not now or before.get("rows") is None or now == before:
            return
        edited = f"still {now['size']}, but with other content or in another order"
        change = edited if now["size"] == before["size"] else f"{before['size']} before, {now['size']} now"
        if self._position.get("samples"):
            raise DataError(
                f"data: the training rows have changed since the checkpoint ({change}). The checkpoint is from the "
                "middle of an epoch, and the rows left in that epoch are unknown. Restore the rows, resume a "
                "checkpoint of an epoch's end, or start a new run from the adapter with --model.adapter_path."
            )
        _log.warning(
            f"data: the training rows have changed since the checkpoint ({change}). Training goes on with them."
        )
