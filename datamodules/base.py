"""What every data module shares: loaders that split among processes and continue where a checkpoint left them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.batching import EpochSampler
from datamodules.errors import DataError


class ResumableDataModule(L.LightningDataModule):
    """Loaders for training and evaluation.

    The training loader's position travels in the data module's own state: Lightning restores that before the optimizer
    asks for the number of steps, which makes it set up the loaders, and too early for the position that Lightning keeps
    itself (`fit_loop`'s `combined_loader`, ignored behind `estimated_stepping_batches` in 2.6).

    Args:
        batch_size: Samples a step and process, at least 1.
        num_workers: Processes that load, each; 0 loads in the training process.
    """

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise DataError("data.batch_size must be 1 or more, and data.num_workers 0 or more.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self._train_loader: StatefulDataLoader | None = None
        self._position: dict[str, Any] = {}

    def world(self) -> tuple[int, int]:
        """Number of processes, and which is this one."""
        assert self.trainer is not None
        return self.trainer.world_size, self.trainer.global_rank

    def train_loader(self, dataset: Dataset[Any], seed: int) -> StatefulDataLoader:
        """Shuffled, whole batches only, from the position of the checkpoint that is resumed.

        Raises:
            DataError: If there is not one whole batch for each process.
        """
        world, rank = self.world()
        size = len(dataset)  # type: ignore[arg-type]
        if size < self.batch_size * world:
            raise DataError(
                f"data.batch_size: {size} training samples are fewer than one batch of {self.batch_size} × {world} "
                "processes; choose a smaller batch."
            )
        sampler = EpochSampler(range(size), world, rank, seed)
        self._train_loader = self._loader(dataset, sampler, drop_last=True)
        if self._position:
            self._train_loader.load_state_dict(self._position)
            self._position = {}
        return self._train_loader

    def evaluation_loader(self, dataset: Dataset[Any]) -> StatefulDataLoader:
        """In order; every sample once, on whichever process: nothing is repeated to make the shares equal."""
        world, rank = self.world()
        return self._loader(dataset, range(rank, len(dataset), world), drop_last=False)  # type: ignore[arg-type]

    def _loader(self, dataset: Dataset[Any], sampler: EpochSampler | range, drop_last: bool) -> StatefulDataLoader:
        return StatefulDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # or each iterator draws from the global state, used by dropout
        )

    def state_dict(self) -> dict[str, Any]:
        """The training loader's position."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a position for the training loader that is to come."""
        self._position = state_dict
