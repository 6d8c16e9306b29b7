"""Which sample comes when: the same order for any number of processes, and from any batch on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import Sampler

Draw = tuple[int, int]  # (index of the sample, seed of the epoch's augmentation)


class EpochSampler(Sampler[Draw]):
    """Shuffled draws of one process, whole batches only.

    The order is a function of (seed, epoch): the k-th batches of all processes together are the k-th batch of one
    process with a batch as large as theirs. A draw carries a seed made of (seed, epoch) to the data set, whose
    augmentation is a function of it and of the index, so that it too is the same for any number of processes and
    workers.

    Args:
        size: Number of samples.
        world: Number of processes.
        rank: This process.
        batch_size: Samples a step and process.
        seed: Seed of the order.
    """

    def __init__(self, size: int, world: int, rank: int, batch_size: int, seed: int) -> None:
        self.size, self.world, self.rank, self.batch_size, self.seed = size, world, rank, batch_size, seed
        self.batches = size // (world * batch_size)  # in an epoch
        self.epoch = 0
        self._skip = 0

    def __len__(self) -> int:
        """Draws of this process in a whole epoch."""
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iterator; Lightning calls it."""
        self.epoch = epoch

    def seek(self, epoch: int, batches: int) -> None:
        """Have the next iterator begin behind so many batches of an epoch; an epoch's end is the next one's start."""
        self.epoch, self._skip = epoch + batches // self.batches, batches % self.batches

    def __iter__(self) -> Iterator[Draw]:
        seed, skip = hash((self.seed, self.epoch)), self._skip
        self._skip = 0
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        own = order[self.rank : self.batches * self.batch_size * self.world : self.world]
        return iter([(index, seed) for index in own[skip * self.batch_size :].tolist()])


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Draw from torch's global CPU generator as a function of the keys; its state before comes back at the end.

    For transforms that take no generator of their own. A `torch.random.fork_rng` would also visit every accelerator, at
    15 times the cost of this.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(hash(keys))  # of a tuple of int: the same in every process
    try:
        yield
    finally:
        generator.set_state(state)
