"""Which sample comes when: the same order for any number of processes, and from any batch on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor
from torch.utils.data import Sampler

Draw = tuple[int, int]  # (index of the sample, seed of the epoch's augmentation)
ORDER = 2  # version of the order; one more whenever a seed and an epoch mean another order
POOL = 50  # batches that are sorted together
DECILES = 10


def index_of(key: int | Draw) -> int:
    """Return the index of a sample that a data set is asked for by its index or by a draw."""
    return key[0] if isinstance(key, tuple) else key


class EpochSampler(Sampler[Draw]):
    """Shuffled draws of one process, whole batches only.

    The order is a function of (seed, epoch): the k-th batches of all processes together are the k-th batch of one
    process with a batch as large as theirs. A draw carries a seed made of (seed, epoch) to the data set, whose
    augmentation is a function of it and of the index, so that it too is the same for any number of processes and
    workers. With lengths, samples of like length share a batch, so that little of the batch is padding. With labels
    too, a sample's length is ranked among the samples of its own class: then each batch keeps the label mix of the
    data, however much the lengths differ between classes.

    Args:
        size: Number of samples.
        world: Number of processes.
        rank: This process.
        batch_size: Samples a step and process.
        seed: Seed of the order.
        lengths: Length of each sample, (size,); None for samples of one length.
        labels: Class (int64) or score (floating dtype) of each sample, (size,); None if there are none.
    """

    def __init__(
        self,
        size: int,
        world: int,
        rank: int,
        batch_size: int,
        seed: int,
        lengths: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        self.size, self.world, self.rank, self.batch_size, self.seed = size, world, rank, batch_size, seed
        self.lengths = lengths
        self.classes = None if labels is None else as_classes(labels)
        self.batches = size // (world * batch_size)  # in an epoch
        self.epoch = 0
        self._skip = 0

    def __len__(self) -> int:
        """Return the number of draws of this process in a whole epoch."""
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iterator; Lightning calls it."""
        self.epoch = epoch

    def seek(self, epoch: int, batches: int) -> None:
        """Begin the next iterator behind so many batches of an epoch; an epoch's end is the next one's start."""
        self.epoch, self._skip = epoch + batches // self.batches, batches % self.batches

    def __iter__(self) -> Iterator[Draw]:
        seed, skip = derive_seed(self.seed, self.epoch), self._skip
        self._skip = 0
        generator = torch.Generator().manual_seed(seed)
        step = self.batch_size * self.world
        order = torch.randperm(self.size, generator=generator)[: self.batches * step]
        if self.lengths is not None:
            key = self.lengths if self.classes is None else rank_in_class(self.lengths, self.classes, generator)
            order = bucketed(order, key, step, generator)
        own = order[self.rank :: self.world]
        return iter([(index, seed) for index in own[skip * self.batch_size :].tolist()])


def bucketed(order: Tensor, key: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Rearrange a shuffled order so that every `step` neighbours have like keys, in batches that come shuffled.

    Samples are sorted within pools of 50 batches, which leaves the company that a sample is in to chance.

    Args:
        order: Whole batches, (batches · step,).
        key: Length of each sample by index, or its rank.
        step: Samples in a batch of all processes.
        generator: Source of the shuffling.
    """
    pools = order.split(POOL * step)
    batches = torch.cat([pool[key[pool].argsort(stable=True)] for pool in pools]).view(-1, step)
    return batches[torch.randperm(len(batches), generator=generator)].flatten()


def rank_in_class(lengths: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Return the rank of each length among the samples of its class, scaled to (0, 1).

    The ranks of every class are spread evenly over (0, 1), so that neighbours by rank have the classes of a random
    draw. Equal lengths are ranked at random.

    Args:
        lengths: Length of each sample, (size,).
        classes: Number of its class, 0 or more, (size,).
        generator: Source of the random ranks, and of a random place within each rank.

    Returns:
        Ranks, (size,) float64.
    """
    size = len(lengths)
    rows = torch.randperm(size, generator=generator)
    rows = rows[lengths[rows].argsort(stable=True)]
    rows = rows[classes[rows].argsort(stable=True)]  # class by class, each from its shortest sample to its longest
    counts = classes.bincount()
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    within = torch.arange(size) - first + torch.rand(size, generator=generator, dtype=torch.float64)
    return torch.empty(size, dtype=torch.float64).scatter_(0, rows, within / counts.repeat_interleave(counts))


def as_classes(labels: Tensor) -> Tensor:
    """Number the classes 0, 1, …; scores become the ten classes between their deciles."""
    if labels.is_floating_point():
        ordered = labels.sort().values
        deciles = ordered[torch.arange(1, DECILES) * len(ordered) // DECILES]
        labels = torch.bucketize(labels, deciles)
    return labels.unique(return_inverse=True)[1]


def derive_seed(*keys: int) -> int:
    """Return a seed for torch, a function of the keys alone (BLAKE2b): the same in every process and Python."""
    return int.from_bytes(blake2b(repr(keys).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Draw from torch's global CPU generator as a function of the keys; its state before comes back at the end.

    For transforms that take no generator of their own. A `torch.random.fork_rng` would also visit every accelerator, at
    15 times the cost of this.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(derive_seed(*keys))
    try:
        yield
    finally:
        generator.set_state(state)
