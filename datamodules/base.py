"""Base class of the data modules: loaders that split the rows among processes and resume from a checkpoint."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset

from datamodules.contract import DataKind, HasClasses, HasFrozenPrefix, Prefix
from datamodules.errors import DataError, counted
from datamodules.loading.batching import ORDER, EpochSampler, PartSampler
from datamodules.loading.length_effect import strong_effect
from datamodules.loading.prefix_cache import HiddenStates, WithHidden, filling_order, hidden_states
from datamodules.sources.findings import Findings
from datamodules.sources.tables import Table, check_column

_log = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]
BEAT = 20.0  # Seconds between two collectives while processes wait. A process group times out after 10 minutes or more.


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


@runtime_checkable
class DigestedRows(Protocol):
    """A data set whose rows can be compared with the rows of an earlier run."""

    def rows_digest(self) -> str:
        """Return a digest of all rows in their order, with their labels."""


@dataclass(frozen=True)
class Part:
    """A part of a longer training on some of the training rows.

    Args:
        rows: Indices of the rows, (rows,) int64.
        first: Number of batches of the training before this part.
        batches: Number of batches of this part.
        seed: Seed of the order of the rows.
    """

    rows: Tensor
    first: int
    batches: int
    seed: int


class ResumableDataModule(L.LightningDataModule):
    """Loaders for training and evaluation.

    The data module's state holds the position in training: the epoch, and the number of samples done in the epoch. The
    position does not depend on the number of workers. Lightning restores the position before it builds the loaders. A
    run may be resumed with another batch size or number of processes: the position is then rounded down to a whole
    batch. At least one batch of an unfinished epoch is left. The order of length buckets depends on the product of both
    numbers. If the product changes, some samples of the resumed epoch come twice and others not at all.

    A checkpoint also has a digest of the training rows. If the rows have changed since, a checkpoint from mid-epoch is
    refused, because the rows left in that epoch are unknown. With a checkpoint from an epoch's end, a warning is logged
    and training goes on with the new rows. Checkpoints of earlier versions have no digest.

    Args:
        batch_size: Samples in a batch of one process, at least 1.
        num_workers: Processes that load, for each process that trains. At most one for each usable CPU is started. 0
            loads in the training process, which is fast enough for tokens and small images.
        skip_bad_rows: Largest number of unusable rows that are skipped in each split, 0 or more. A further unusable row
            is an error.
        adapter_column: With `predict --bank FILE`: column of the table to predict that names the adapter of each row.
    """

    kind: DataKind
    cache_prefix = False  # True if a fit reads the output of the model's frozen prefix. Some tasks have this key.

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        skip_bad_rows: int = 0,
        adapter_column: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # This call also saves the arguments of subclasses.
        if batch_size < 1 or num_workers < 0:
            raise DataError(
                f"data.batch_size: {batch_size} must be 1 or more, and data.num_workers: {num_workers} 0 or more."
            )
        self.batch_size, self.num_workers = batch_size, num_workers
        self.adapter_column = adapter_column
        self.predicted: list[Table] = []  # The tables to predict, one for each loader; empty without tables.
        self.findings = Findings(skip_bad_rows)
        self.cached_states: dict[str, HiddenStates] = {}  # Output of the model's frozen prefix, by split.
        self._seed: int | None = None
        self._position: dict[str, Any] = {}
        self._rows_digest: dict[str, Any] = {}  # Digest and number of the training rows.
        self._digest_before: dict[str, Any] = {}  # Digest and number of the checkpoint's training rows.
        self._resumed_at: float | None = None  # Batches of the epoch that are done; infinite at its end.
        self.part: Part | None = None  # If set, `train_loader` returns only the batches of this part.
        self.training_size = 0  # Number of training rows at the last `train_loader`.
        self.training_labels: Tensor | None = None  # Classes or scores of the training rows; None without labels.
        self.caches_validation = False  # If true, `validate` also reads the output of the model's frozen prefix.

    def world(self) -> tuple[int, int]:
        """Return the number of processes, and the rank of this process."""
        trainer = self.trainer
        assert trainer is not None
        return trainer.world_size, trainer.global_rank

    @property
    def model_classes(self) -> list[str] | None:
        """Return the class names of the trainer's model; None if unknown."""
        assert self.trainer is not None
        model = self.trainer.lightning_module
        return list(model.class_names) if isinstance(model, HasClasses) and model.class_names is not None else None

    @contextmanager
    def first_process_first(self) -> Iterator[Callable[[], None]]:
        """Let a node's first process fill the caches (downloads, tokenised texts) before the other processes read them.

        Yields a function that the first process calls often while it fills the caches. The other processes wait in a
        collective, which fails after the process group's timeout. The function starts a new collective every `BEAT`
        seconds.
        """
        trainer = self.trainer
        assert trainer is not None
        first, all_done = trainer.local_rank == 0, trainer.strategy.reduce_boolean_decision
        last_beat = time.monotonic()

        def beat() -> None:
            nonlocal last_beat
            if first and time.monotonic() - last_beat >= BEAT:
                all_done(False)
                last_beat = time.monotonic()

        def wait() -> None:
            while not all_done(True):
                pass

        if not first:
            wait()
        try:
            yield beat
        finally:  # Also after an error, so that the other processes try too and raise their own error.
            if first:
                wait()

    def failed_rows(self, file: int) -> list[dict[str, Any]]:
        """Return the rows of a loader that cannot be predicted: `index`, and `error` with the reason.

        Args:
            file: Number of the loader, whose predictions go to one file.
        """
        return []

    def adapter_names(self) -> list[list[str]]:
        """Return the name of each row's adapter, by loader and row of the table to predict.

        Raises:
            DataError: If `adapter_column` is missing, or a row has no name.
        """
        column = self.adapter_column
        if column is None:
            raise DataError(
                "data.adapter_column: --bank needs the column that names the adapter of each row. Name a column of the "
                "table to predict."
            )
        names = []
        for table in self.predicted:
            check_column(table, "adapter_column", column)
            cells = list(table.data[column])
            if missing := [row for row, cell in enumerate(cells) if cell in (None, "")]:
                raise DataError(
                    f"data.adapter_column: row {missing[0]} of {table.where} has no {column}. Fill the cell."
                )
            names.append([str(cell) for cell in cells])
        return names

    @property
    def caches(self) -> bool:
        """Return True in a fit with `cache_prefix`: other commands read each row once and would gain nothing.

        With `caches_validation`, a validation returns True too.
        """
        assert self.trainer is not None
        stages = ("fit", "validate") if self.caches_validation else ("fit",)
        return self.cache_prefix and self.trainer.state.fn in stages

    def frozen_prefix(self) -> Prefix:
        """Return the frozen prefix of the trainer's model.

        Raises:
            DataError: If the model does not define a frozen prefix.
            ModelError: If the model has no frozen prefix.
        """
        assert self.trainer is not None
        model = self.trainer.lightning_module
        if not isinstance(model, HasFrozenPrefix):
            raise DataError("data.cache_prefix: the model does not define a frozen prefix. Set the key to false.")
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
        """Return a collate function that adds the cached output of the frozen prefix to each batch.

        `datamodules.loading.prefix_cache` writes and reads the cache.

        Args:
            name: Name of the split.
            dataset: Rows of the split, as the model takes them.
            rows_key: Identifies the rows: other rows have another key.
            lengths: Length of each row in tokens; None if all rows have the same length.
            filling: Collate function of the batches for the prefix; None stacks the rows.
            collate: Collate function of the rest of a batch.

        Raises:
            DataError: If the model has no such prefix, or the cache cannot be written or read.
            ModelError: If the model has no frozen prefix, or cannot continue from its output.
        """
        assert self.trainer is not None
        if self.part is not None and name in self.cached_states:  # An earlier part of the training has opened the file.
            return WithHidden(collate, self.cached_states[name])
        rows = range(len(dataset)) if lengths is None else filling_order(lengths).tolist()  # type: ignore[arg-type]
        loader = self._loader(dataset, rows, filling)
        with self.first_process_first() as beat:
            prefix = self.frozen_prefix()
            self.cached_states[name] = hidden_states(self.trainer, prefix, loader, lengths, rows_key, name, beat)
        return WithHidden(collate, self.cached_states[name])

    def train_loader(
        self,
        dataset: Dataset[Any],
        lengths: Tensor | None = None,
        collate: Collate | None = None,
        labels: Tensor | None = None,
    ) -> DataLoader[Any]:
        """Return the training loader: whole batches, shuffled by the run's seed, from the resumed position on.

        Args:
            dataset: The samples.
            lengths: Length of each sample, if samples of similar length are to share a batch.
            collate: Makes a batch of samples; None stacks them.
            labels: Class or score of each sample, if batches by length are to keep the label mix of the data.

        Raises:
            DataError: If the samples do not fill one batch for each process, or if the rows have changed since a
                checkpoint from mid-epoch.
        """
        world, rank = self.world()
        size = len(dataset)  # type: ignore[arg-type]
        self.training_size, self.training_labels = size, labels
        if (part := self.part) is not None:
            draws = PartSampler(part.rows, part.first, part.batches, self.batch_size, part.seed, lengths, labels)
            return self._loader(dataset, draws, collate)
        self._rows_digest = {"rows": dataset.rows_digest(), "size": size} if isinstance(dataset, DigestedRows) else {}
        self._compare_rows()
        if size < self.batch_size * world:
            raise DataError(
                f"data.batch_size: {counted(size, 'training sample')} cannot fill one batch of {self.batch_size} for "
                f"{counted(world, 'process')}. Choose a smaller batch, or add samples."
            )
        if self._seed is None:
            assert self.trainer is not None
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed()))
        if lengths is not None and labels is not None and rank == 0 and (effect := strong_effect(lengths, labels)):
            _log.warning(
                "data.bucket_by_length: the length of a training text correlates with its label (%s). A model can "
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
            # The position counts samples, since the batch size and the number of processes may have changed.
            batches = min(self._position["samples"] // (self.batch_size * world), sampler.batches - 1)
            self._resumed_at = batches if self._position["samples"] else math.inf
            sampler.seek(self._position["epoch"], batches)
            self._position = {}
        return self._loader(dataset, sampler, collate)

    def evaluation_loader(
        self, dataset: Dataset[Any], lengths: Tensor | None = None, collate: Collate | None = None
    ) -> DataLoader[Any]:
        """Return a loader that evaluates every sample exactly once, on one of the processes.

        Without lengths, the samples come in order. With lengths, samples of similar length share a batch, which saves
        padding. The longest batch comes first, so that a lack of memory shows at once. A smaller batch comes last. The
        other batches come in a shuffled order, which is the same in every run.

        Raises:
            DataError: If there are fewer samples than processes.
        """
        world, rank = self.world()
        size = len(dataset)  # type: ignore[arg-type]
        if size < world:
            raise DataError(
                f"{counted(size, 'sample to evaluate is', 'samples to evaluate are')} fewer than the {world} "
                "processes. Use fewer processes."
            )
        if lengths is None:
            return self._loader(dataset, range(rank, size, world), collate)
        step = self.batch_size * world
        first, *others = lengths.argsort(descending=True, stable=True).split(step)
        rest = [others.pop()] if others and len(others[-1]) < step else []  # A smaller batch stays last.
        shuffled = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).tolist()
        of_this_rank = [batch[rank::world] for batch in (first, *(others[i] for i in shuffled), *rest)]
        return self._loader(dataset, torch.cat(of_this_rank).tolist(), collate)

    def evaluated_training_rows(self) -> tuple[Dataset[Any], Tensor | None, Collate | None]:
        """Return the arguments of `evaluation_loader` for the training rows.

        A task implements this method. The rows are neither augmented nor packed. If the fit has cached the output of
        the frozen prefix for these rows, the batches hold this output.
        """
        raise NotImplementedError

    def training_sample(self, size: int) -> DataLoader[Any]:
        """Return a loader that evaluates a fixed sample of the training rows.

        The sample depends on the number of training rows and on `size` alone, not on the seed of the run.

        Args:
            size: Largest number of rows, at least the number of processes.

        Raises:
            DataError: If there are fewer rows than processes.
        """
        dataset, lengths, collate = self.evaluated_training_rows()
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        rows = order[:size].sort().values
        sample = Subset(dataset, rows.tolist())
        return self.evaluation_loader(sample, None if lengths is None else lengths[rows], collate)

    def _loader(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler | PartSampler | BatchSampler | range | list[int],
        collate: Collate | None,
    ) -> DataLoader[Any]:
        assert self.trainer is not None
        is_batched = isinstance(sampler, BatchSampler)
        order = {"batch_sampler": sampler} if is_batched else {"sampler": sampler, "batch_size": self.batch_size}
        workers = min(self.num_workers, usable_cpus())
        return DataLoader(
            dataset,
            **order,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # Otherwise iterators would draw from dropout's state.
        )

    def match_progress(self) -> None:
        """Correct Lightning's number of done batches in a resumed epoch.

        Lightning restores the number from the checkpoint. The batches of this run may have another size. At least one
        batch of an unfinished epoch is left: without a batch, Lightning would not end the epoch. Call this method when
        training starts, before the first batch.
        """
        assert self.trainer is not None
        done: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        if self._resumed_at is not None and done.processed:
            batches = int(self.trainer.num_training_batches)
            position = batches if math.isinf(self._resumed_at) else min(int(self._resumed_at), batches - 1)
            missing = position - done.processed
            done.ready, done.started = done.ready + missing, done.started + missing
            done.processed, done.completed = done.processed + missing, done.completed + missing
        self._resumed_at = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position in training: epoch, samples done in this epoch, seed, order, digest of the rows."""
        trainer = self.trainer
        assert trainer is not None
        done: int = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        samples = done * self.batch_size * trainer.world_size
        at_end = done >= trainer.num_training_batches
        position = {"epoch": trainer.current_epoch + at_end, "samples": 0 if at_end else samples, "seed": self._seed}
        return position | {"order": ORDER} | self._rows_digest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a position until the training loader is built.

        Raises:
            DataError: If the state holds no position, or a position that is not valid.
        """
        state = state_dict if isinstance(state_dict, dict) else {}
        numbers = [state.get(key) for key in ("epoch", "samples", "seed")]
        if not all(type(n) is int for n in numbers) or min(numbers[:2]) < 0:  # type: ignore[type-var, operator]
            raise DataError(
                f"ckpt_path: the checkpoint's position in the data is damaged ({state_dict}). Use another checkpoint."
            )
        self._seed = state_dict["seed"]
        self._position = {key: state.get(key) for key in ("epoch", "samples", "order")}
        self._digest_before = {key: state.get(key) for key in ("rows", "size")}

    def _compare_rows(self) -> None:
        """Compare the training rows with the checkpoint's training rows, once.

        Raises:
            DataError: If the rows differ and the checkpoint is from mid-epoch.
        """
        current, previous, self._digest_before = self._rows_digest, self._digest_before, {}
        if not current or previous.get("rows") is None or current == previous:
            return
        edited = f"still {current['size']}, but with other content or in another order"
        resized = f"{previous['size']} before, {current['size']} now"
        change = edited if current["size"] == previous["size"] else resized
        if self._position.get("samples"):
            raise DataError(
                f"data: the training rows have changed since the checkpoint ({change}). The checkpoint is from the "
                "middle of an epoch, and the rows left in that epoch are unknown. Restore the rows, resume a "
                "checkpoint of an epoch's end, or start a new run from the adapter with --model.adapter_path."
            )
        _log.warning(
            f"data: the training rows have changed since the checkpoint ({change}). Training uses the new rows."
        )
