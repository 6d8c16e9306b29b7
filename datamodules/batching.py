"""Which sample comes when: the same order for any number of processes, and from any batch on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import Sampler

Draw = tuple[int, int]  # (index of the sample, seed of the epoch's augmentation)
POOL = 50  # batches that are sorted together


class EpochSampler(Sampler[Draw]):
    """Shuffled draws of one process, whole batches only.

    The order is a function of (seed, epoch): the k-th batches of all processes together are the k-th batch of one
    process with a batch as large as theirs. A draw carries a seed made of (seed, epoch) to the data set, whose
    augmentation is a function of it and of the index, so that it too is the same for any number of processes and
    workers. With lengths, samples of like length share a batch, so that little of it is padding.

    Args:
        size: Number of samples.
        world: Number of processes.
        rank: This process.
        batch_size: Samples a step and process.
        seed: Seed of the order.
        lengths: Length of each sample, (size,); None for samples of one length.
    """

    def __init__(
        self, size: int, world: int, rank: int, batch_size: int, seed: int, lengths: Tensor | None = None
    ) -> None:
        self.size, self.world, self.rank, self.batch_size, self.seed = size, world, rank, batch_size, seed
        self.lengths = lengths
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
        generator = torch.Generator().manual_seed(seed)
        step = self.batch_size * self.world
        order = torch.randperm(self.size, generator=generator)[: self.batches * step]
        if self.lengths is not None:
            order = bucketed(order, self.lengths, step, generator)
        own = order[self.rank :: self.world]
        return iter([(index, seed) for index in own[skip * self.batch_size :].tolist()])


def bucketed(order: Tensor, lengths: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Rearrange a shuffled order so that every `step` neighbours are of like length, in batches that come shuffled.

    Samples are sorted within pools of 50 batches, which leaves the company that a sample is in to chance.

    Args:
        order: Whole batches, (batches · step,).
        lengths: Length of each sample by index.
        step: Samples in a batch of all processes.
        generator: Source of the shuffling.
    """
    pools = order.split(POOL * step)
    batches = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools]).view(-1, step)
    return batches[torch.randperm(len(batches), generator=generator)].flatten()


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
