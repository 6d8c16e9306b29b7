"""Order of the samples: shuffling and length buckets, the same for any number of processes and after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Sampler

Draw = tuple[int, int]  # (index of the sample, seed of the epoch's augmentation)
ORDER = 2  # Version of the order. Increase the version whenever the order for a seed and an epoch changes.
POOL = 50  # Number of batches whose samples are sorted together.
DECILES = 10


def index_of(key: int | Draw) -> int:
    """Return the index of a sample for a key, which is an index or a draw."""
    return key[0] if isinstance(key, tuple) else key


class EpochSampler(Sampler[Draw]):
    """Shuffled draws of one process, in whole batches.

    The order is a function of (seed, epoch). The k-th batches of all processes together equal the k-th batch of a
    single process with the same total batch size. A draw also carries a seed, derived from (seed, epoch). Augmentation
    is a function of this seed and the index. For one total batch size, order and augmentation do not depend on the
    number of processes or workers.

    With lengths, samples of similar length share a batch, which saves padding. With labels too, lengths are ranked
    within each class. Each batch then keeps the label mix of the data, even if the lengths differ between classes.

    Args:
        size: Number of samples.
        world: Number of processes.
        rank: This process.
        batch_size: Samples in a batch of one process.
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
        self.batches = size // (world * batch_size)  # Batches of an epoch.
        self.epoch = 0
        self._skip = 0

    def __len__(self) -> int:
        """Return the number of draws of this process in an epoch."""
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iterator. Lightning calls this method."""
        self.epoch = epoch

    def seek(self, epoch: int, batches: int) -> None:
        """Start the next iterator after some batches of an epoch. After the last batch, the next epoch starts."""
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
        of_this_rank = order[self.rank :: self.world]
        return iter([(index, seed) for index in of_this_rank[skip * self.batch_size :].tolist()])


class PartSampler(Sampler[Draw]):
    """Draws of some rows of a data set, in consecutive batches of an endless training on these rows.

    Batch k of the training is batch k % n of epoch k // n, with n complete batches in an epoch. Training in parts
    therefore draws the same batches as one uninterrupted training.

    Args:
        rows: Indices of the rows, (rows,) int64; at least one batch.
        first: Number of batches of the training before this part.
        batches: Number of batches of this part.
        batch_size: Rows in a batch.
        seed: Seed of the order.
        lengths: Length of each row of the data set, as for `EpochSampler`.
        labels: Class of each row of the data set, as for `EpochSampler`.
    """

    def __init__(
        self,
        rows: Tensor,
        first: int,
        batches: int,
        batch_size: int,
        seed: int,
        lengths: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        of_rows = [None if values is None else values[rows] for values in (lengths, labels)]
        self.rows, self.first, self.batches, self.batch_size = rows, first, batches, batch_size
        self.epochs = EpochSampler(len(rows), 1, 0, batch_size, seed, *of_rows)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        epoch, skip = divmod(self.first, self.epochs.batches)
        left = len(self)
        while left:
            self.epochs.seek(epoch, skip)
            for index, seed in islice(self.epochs, left):
                yield int(self.rows[index]), seed
                left -= 1
            epoch, skip = epoch + 1, 0


def bucketed(order: Tensor, key: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Rearrange a shuffled order into batches of samples with similar keys. The batches are shuffled.

    Samples are sorted within pools of 50 batches only, so that a sample shares its batch with random others.

    Args:
        order: Whole batches, (batches · step,).
        key: Length of each sample, or rank of the length, by index.
        step: Samples in a batch of all processes.
        generator: Source of the shuffling.
    """
    pools = order.split(POOL * step)
    batches = torch.cat([pool[key[pool].argsort(stable=True)] for pool in pools]).view(-1, step)
    return batches[torch.randperm(len(batches), generator=generator)].flatten()


def rank_in_class(lengths: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Return the rank of each length among the samples of its class, scaled to [0, 1).

    The ranks of every class are spread evenly over [0, 1), so that samples of similar rank have the label mix of the
    data. Equal lengths are ranked at random.

    Args:
        lengths: Length of each sample, (size,).
        classes: Class of each sample, 0 or more, (size,).
        generator: Source of the random ranks, and of a random offset within each rank.

    Returns:
        Ranks, (size,) float64.
    """
    size = len(lengths)
    rows = torch.randperm(size, generator=generator)
    rows = rows[lengths[rows].argsort(stable=True)]
    rows = rows[classes[rows].argsort(stable=True)]  # By class, and by length within a class.
    counts = classes.bincount()
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    within = torch.arange(size) - first + torch.rand(size, generator=generator, dtype=torch.float64)
    return torch.empty(size, dtype=torch.float64).scatter_(0, rows, within / counts.repeat_interleave(counts))


def as_classes(labels: Tensor) -> Tensor:
    """Number the classes 0, 1, …; scores become at most ten classes between their deciles."""
    if labels.is_floating_point() and len(labels):
        ordered = labels.sort().values
        deciles = ordered[torch.arange(1, DECILES) * len(ordered) // DECILES]
        labels = torch.bucketize(labels, deciles)
    return labels.unique(return_inverse=True)[1]


def derive_seed(*keys: int) -> int:
    """Return a seed for torch, a function of the keys alone (BLAKE2b), the same in every process."""
    return int.from_bytes(blake2b(repr(keys).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Seed torch's global CPU generator with a function of the keys, and restore its state at the end.

    Use this context for transforms that take no generator. `torch.random.fork_rng` would take 15 times as long, since
    `fork_rng` also saves the state of every accelerator.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(derive_seed(*keys))
    try:
        yield
    finally:
        generator.set_state(state)
